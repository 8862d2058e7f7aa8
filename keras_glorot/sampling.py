"""From a seed and a shape to an array: NumPy only, the same bits on every machine.

A tensor is drawn in chunks of 2**19 elements. Each is the raw output of a SFC64 bit
generator of its own, keyed by version, distribution, seed, shape and the chunk's number.
NumPy's "compatibility guarantee" says that a fixed seed "will always produce the same
random integer stream". Element i of a chunk is made from the i-th 32 bits (float64: the
i-th 64 bits) alone, by IEEE additions, multiplications and divisions, so that it does
not matter who draws it: any thread, for any shard, gets the same bits.

SFC64 is the fastest of NumPy's generators: 1.7 ns a word, where PCG64 takes 2.3. It
can't jump ahead, and so a shard makes the bits of every chunk that it touches.
"""

import contextlib
import math
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

__all__ = ["TRUNCATED_STD", "draw"]

Bounds = tuple[tuple[int, int], ...]
Distribution = Literal["uniform", "truncated_normal"]

# Part of every key. Whatever changes the bits of any draw must raise it.
VERSION = 2

# The std that is left of a standard normal truncated at two: sqrt(1 - 4 φ(2) / erf(√2)).
TRUNCATED_STD = 0.8796256610342398

# Elements that share a bit generator: part of the stream, to be changed with VERSION.
# To set one up takes 8 µs, to draw from it 1000.
CHUNK = 1 << 19
# Elements worked on at a time, which only time depends on. Large enough that a NumPy call
# outlasts the hand-over of Python's lock between threads, small enough for the cache.
PIECE = 1 << 18
# More threads than this spend their time on that lock.
MOST_THREADS = 16

# q(x) / x = N(s) / D(s), s = 1 - x², highest power first, D without its leading 1: the
# quantile function of a normal truncated at ±2, derived by benchmarks/fit_quantile.py.
# Relative error 5e-6 for float32, 9e-16 for float64, so that the distribution function
# is within 1.3e-6; a Kolmogorov-Smirnov test on 1e9 values sees 4e-5. All positive: no
# digits are lost.
_QUANTILE = {
    np.float32: (
        (0.4888474189943596, 3.5901615071821937, 2.437800558322217, 0.2912034077266288),
        (3.077595462703375, 1.4677508462923619, 0.1456017038633144),
    ),
    np.float64: (
        (
            0.2236046036044907, 13.710309516450966, 121.44752932855654,
            351.75594752834684, 438.53870101827914, 268.6122732133559, 86.15634884592819,
            14.623917517225069, 1.2356740223010445, 0.0407313645281624,
        ),
        (
            24.727568607031035, 145.74482529072725, 327.09178338758977,
            340.7823867965929, 182.5675769555217, 52.79729001351008, 8.255120987512248,
            0.6526594727617692, 0.0203656822640812,
        ),
    ),
}  # fmt: skip


# Little-endian everywhere: the low half of a word comes first.
_WORDS = np.dtype("<u8")
_SIGNED = {np.float32: np.dtype("<i4"), np.float64: np.dtype("<i8")}


def draw(
    distribution: Distribution,
    shape: Sequence[int],
    scale: float,
    dtype: np.dtype | str,
    seed: Sequence[int],
    region: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Draws a tensor, or a region of it.

    Args:
        distribution: `"uniform"` on [-scale, scale], or `"truncated_normal"`: a normal
            with standard deviation `scale`, cut off at ±2 `scale`.
        shape: The tensor's shape.
        scale: Positive float.
        dtype: `float16`, `bfloat16`, `float32` or `float64`. Half precision is the
            float32 draw, rounded.
        seed: One or more Python integers, of any size and sign.
        region: A start and a stop for each axis. Chunks that hold nothing of it are not
            drawn, and nothing of its size is made but the result.

    Returns:
        A new C-contiguous array, aligned to 64 bytes.
    """
    shape = tuple(shape)
    dtype = np.dtype(dtype)
    work = np.float64 if dtype == np.float64 else np.float32
    key = _key(distribution, work, seed, shape)
    first, last = 0, math.prod(shape)
    box = None if region is None else _Box(shape, region)
    out = _empty(shape if box is None else box.shape, dtype)
    if not out.size:
        return out
    if box is not None:
        first, last = box.start(0), box.start(box.runs - 1) + box.length
    flat = out.reshape(-1)
    todo = deque(range(first // CHUNK, -(-last // CHUNK)))

    def fill_chunks() -> None:
        # Made once: memory that is given back costs a page fault per 4 KiB to get again.
        # For the same reason `bits` lives on until there are new ones.
        scratch = np.empty((2, min(PIECE, flat.size)), work)
        while True:
            try:
                chunk = todo.popleft()  # all threads take from it: a deque allows that
            except IndexError:
                return
            begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, last)
            if box is not None and box.before(begin) == box.before(end):
                continue
            words = np.array([*key, chunk], np.uint32)
            stream = np.random.SFC64(np.random.SeedSequence(words))
            for start in range(begin, end, PIECE):
                stop = min(start + PIECE, end)
                bits, bound = _odd_integers(stream, stop - start, work)
                if box is None:
                    part, place = bits, slice(start, stop)
                else:
                    part, place = box.cut(bits, start, stop)
                _fill(flat[place], part, bound, distribution, scale, scratch)

    if len(todo) == 1:
        fill_chunks()
        return out
    workers = min(len(todo), available_cores(), MOST_THREADS)
    # Threads of this call alone: nothing to start at import or to lose in a fork.
    with ThreadPoolExecutor(workers) as pool:
        others = []
        with contextlib.suppress(RuntimeError):  # where no thread can be had, do without
            for _ in range(workers - 1):
                others.append(pool.submit(fill_chunks))
        try:
            fill_chunks()
        finally:
            todo.clear()  # after an error or an interrupt, the others stop too
        for other in others:
            other.result()
    return out


class _Box:
    """A region of a tensor: runs of neighbouring elements, of one length.

    Args:
        shape: The tensor's shape.
        bounds: A start and a stop for each axis.
    """

    def __init__(self, shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]):
        self.shape = tuple(stop - start for start, stop in bounds)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        self._base = sum(
            start * stride for (start, _), stride in zip(bounds, strides, strict=True)
        )
        axis = len(shape)
        while axis and self.shape[axis - 1] == shape[axis - 1]:
            axis -= 1  # the axes from here on are in the region whole
        axis = max(axis - 1, 0)  # and of this one a stretch
        self._steps = list(zip(self.shape[:axis], strides[:axis], strict=True))[::-1]
        self.runs = math.prod(self.shape[:axis])
        self.length = math.prod(self.shape[axis:])

    def start(self, run: Any) -> Any:
        """Where a run starts in the tensor: for one number, or an array of them."""
        start = self._base + 0 * run
        for extent, stride in self._steps:
            run, coordinate = divmod(run, extent)
            start += coordinate * stride
        return start

    def before(self, index: int) -> int:
        """How many elements of the region lie before the tensor's index-th."""
        run = bisect_left(range(self.runs), index, key=self.start) - 1
        if run < 0:
            return 0
        return run * self.length + min(index - self.start(run), self.length)

    def cut(self, values: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, slice]:
        """What the region has of a tensor's elements from start to stop.

        Returns:
            Those of the values, and their place in the region.
        """
        begin, end = self.before(start), self.before(stop)
        first, skipped = divmod(begin, self.length)
        runs = np.arange(first, -(-end // self.length), dtype=np.int64)
        starts = self.start(runs) - start
        if self.length < 256:  # an index for each element, or a slice for each run
            indices = np.add.outer(starts, np.arange(self.length)).ravel()
            return values[indices[skipped:][: end - begin]], slice(begin, end)
        parts = [values[max(i, 0) : i + self.length] for i in starts.tolist()]
        return np.concatenate([values[:0], *parts]), slice(begin, end)


def _key(distribution: Distribution, work: type, seed: Sequence[int], shape) -> list[int]:
    """The 32-bit words that, with a chunk's number behind them, seed its generator.

    Every entry carries its length, so that no two keys can run into the same words.
    The shape is in it: two shapes with one seed share nothing.
    """
    kind = {"uniform": 0, "truncated_normal": 1}[distribution]
    words = [VERSION, kind, np.dtype(work).itemsize]
    for entries in (seed, shape):
        words.append(len(entries))
        for entry in entries:
            magnitude = abs(entry)
            digits = [
                magnitude >> shift & 0xFFFFFFFF
                for shift in range(0, max(1, magnitude.bit_length()), 32)
            ]
            words += [len(digits) * 2 + (entry < 0), *digits]
    return words


def _odd_integers(
    stream: np.random.BitGenerator, count: int, work: type
) -> tuple[np.ndarray, float]:
    """Random odd integers and their bound: symmetric about zero and never zero.

    float32: ±1, ±3, ... ±(2**31 - 1), to be rounded to 24 bits.
    float64: ±1, ±3, ... ±(2**53 - 1), which are exact.
    """
    signed = _SIGNED[work]
    words = stream.random_raw(-(-count * signed.itemsize // 8)).astype(_WORDS, copy=False)
    bits = words.view(signed)[:count]
    if work is np.float64:
        np.right_shift(bits, 10, out=bits)
    return np.bitwise_or(bits, 1, out=bits), 2.0**53 if work is np.float64 else 2.0**31


def _fill(
    out: np.ndarray,
    bits: np.ndarray,
    bound: float,
    distribution: Distribution,
    scale: float,
    scratch: np.ndarray,
) -> None:
    """Writes one value for each random integer; the integers are lost."""
    work = scratch.dtype.type
    x = out if out.dtype == work else scratch[0, : out.size]
    # Division by a power of two is exact, but for results as small as subnormal numbers:
    # the scale can be in the one product that casts, and gives the same bits.
    at_once = distribution == "uniform" and scale > 1e-20
    factor = work((scale if at_once else 1) / bound)
    np.multiply(bits, factor, out=x, casting="unsafe", dtype=work)
    if distribution == "truncated_normal":
        # The bits have been read: their memory is free.
        _truncated_normal_quantile(x, bits.view(work), scratch[1, : out.size])
    if not at_once:
        np.multiply(x, work(scale), out=x)
    if x is not out:
        with np.errstate(under="ignore"):
            np.copyto(out, x, casting="unsafe")  # rounds to nearest even


def _truncated_normal_quantile(
    x: np.ndarray, s: np.ndarray, polynomial: np.ndarray
) -> None:
    """Turns uniform values on (-1, 1) into normal ones truncated at ±2, in place.

    `s` and `polynomial` are scratch of the same size and dtype.
    """
    (leading, *numerator), (second, *denominator) = _QUANTILE[x.dtype.type]
    np.multiply(x, x, out=s)
    np.subtract(1, s, out=s)
    # Horner's rule, for one polynomial after the other.
    np.multiply(s, leading, out=polynomial)
    for coefficient in numerator[:-1]:
        np.add(polynomial, coefficient, out=polynomial)
        np.multiply(polynomial, s, out=polynomial)
    np.add(polynomial, numerator[-1], out=polynomial)
    np.multiply(x, polynomial, out=x)
    np.add(s, second, out=polynomial)
    for coefficient in denominator:
        np.multiply(polynomial, s, out=polynomial)
        np.add(polynomial, coefficient, out=polynomial)
    np.divide(x, polynomial, out=x)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary, where backends can adopt it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    offset = -buffer.__array_interface__["data"][0] % 64
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
