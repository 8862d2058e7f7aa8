"""From a seed and a shape to an array: NumPy only, the same bits on every machine.

The stream of a tensor is the raw output of one PCG64 bit generator, keyed by version,
distribution, seed and shape. NumPy's "compatibility guarantee" says that a fixed seed
"will always produce the same random integer stream". Element i is made from the i-th 32
bits (float64: the i-th 64 bits) alone, by IEEE additions, multiplications and divisions,
so that it does not matter who draws it: any piece, on any thread, for any shard, jumps
to its place in the stream and gets the same bits.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

__all__ = ["TRUNCATED_STD", "draw"]

Bounds = tuple[tuple[int, int], ...]
Distribution = Literal["uniform", "truncated_normal"]

# Part of every key. Whatever changes the bits of any draw must raise it.
VERSION = 1

# The std that is left of a standard normal truncated at two: sqrt(1 - 4 φ(2) / erf(√2)).
TRUNCATED_STD = 0.8796256610342398

# Elements worked on at a time. Large enough that a NumPy call outlasts the hand-over of
# Python's lock between threads, small enough that its scratch stays in the last cache.
# Nothing depends on it but time. A tensor of one piece is drawn where it is asked for.
PIECE = 1 << 19
# More threads than this spend their time on that lock.
MOST_THREADS = 16

# q(x) / x = N(s) / D(s), s = 1 - x², lowest power first: the quantile function of a
# normal truncated at ±2, derived by benchmarks/fit_quantile.py. Relative error 1.1e-7
# for float32, 9e-16 for float64, so the distribution function is within 3e-8; a
# Kolmogorov-Smirnov test on 1e9 values sees 6e-5. All positive: no digits are lost.
_QUANTILE = {
    np.float32: (
        (2.0, 24.128771269065293, 73.35098440267329, 52.45748668255495, 4.129031687243529),
        (1.0, 13.77421938220397, 51.74634923837898, 53.7458063662613, 10.192404423703934),
    ),
    np.float64: (
        (
            2.0, 60.674324890180245, 718.0666636942068, 4230.467102881276,
            13189.456151297483, 21533.219232813353, 17271.994277782487,
            5963.342045395289, 673.206492111081, 10.979480122738654,
        ),
        (
            1.0, 32.04702225531917, 405.344681335412, 2592.463602686577,
            8964.47143720369, 16733.168198230618, 16060.929319538636,
            7156.3929654238145, 1214.1782576389724, 49.102209640366056,
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
        distribution: `"uniform"` on (-scale, scale), or `"truncated_normal"`: a normal
            with standard deviation `scale`, cut off at ±2 `scale`.
        shape: The tensor's shape.
        scale: Positive float.
        dtype: `float16`, `bfloat16`, `float32` or `float64`. Half precision is the
            float32 draw, rounded.
        seed: One or more integers of any size and sign.
        region: A start and a stop for each axis. Nothing outside of it is drawn, and
            nothing of its size is made but the result.

    Returns:
        A new C-contiguous array, aligned to 64 bytes.
    """
    shape = tuple(shape)
    dtype = np.dtype(dtype)
    work = np.float64 if dtype == np.float64 else np.float32
    key = _key(distribution, work, seed, shape)
    bounds = tuple(region) if region is not None else tuple((0, size) for size in shape)
    out = _empty(tuple(stop - start for start, stop in bounds), dtype)
    flat = out.reshape(-1)
    starts, length = _runs(shape, bounds)

    def fill(begin: int) -> None:
        end, runs = min(begin + PIECE, flat.size), []
        position = begin
        while position < end:
            run, offset = divmod(position, length)
            count = min(length - offset, end - position)
            runs.append((int(starts[run]) + offset, count))
            position += count
        _fill(flat[begin:end], runs, key, distribution, scale, work)

    pieces = range(0, flat.size, PIECE)
    workers = min(len(pieces), available_cores(), MOST_THREADS)
    if workers > 1:
        # Threads of this call alone: nothing to start at import or to lose in a fork.
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, pieces))
    else:
        for begin in pieces:
            fill(begin)
    return out


def _runs(shape: tuple[int, ...], bounds: Bounds) -> tuple[np.ndarray, int]:
    """Where a region's runs of neighbouring elements start, and their common length."""
    axis = len(shape)  # the axes from here on are in the region whole
    while axis and bounds[axis - 1] == (0, shape[axis - 1]):
        axis -= 1
    if axis == 0:
        return np.zeros(1, np.int64), math.prod(shape)
    axis -= 1  # and of this one a stretch
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    starts = np.zeros(1, np.int64)
    for (start, stop), stride in zip(bounds[:axis], strides, strict=False):
        starts = np.add.outer(starts, np.arange(start, stop) * stride).ravel()
    start, stop = bounds[axis]
    return starts + start * strides[axis], (stop - start) * strides[axis]


def _key(distribution: Distribution, work: type, seed: Sequence[int], shape) -> np.ndarray:
    """The entropy of a tensor's stream, as the 32-bit words NumPy is to hash.

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
    return np.array(words, np.uint32)


def _fill(
    out: np.ndarray,
    runs: list[tuple[int, int]],
    key: np.ndarray,
    distribution: Distribution,
    scale: float,
    work: type,
) -> None:
    """Writes the elements of some runs (start, length) of the stream to a flat array."""
    x = out if out.dtype == work else np.empty(out.size, work)
    bits, bound = _odd_integers(key, runs, work)
    if distribution == "uniform":
        # Division by a power of two is exact: one rounding to float, one product.
        np.multiply(bits, work(scale / bound), out=x, casting="unsafe", dtype=work)
    else:
        np.multiply(bits, work(1 / bound), out=x, casting="unsafe", dtype=work)
        _truncated_normal_quantile(x, s=bits.view(work))  # the bits have been read
        np.multiply(x, work(scale), out=x)
    if x is not out:
        # To half precision: rounds to nearest even.
        np.copyto(out, x, casting="unsafe")


def _odd_integers(
    key: np.ndarray, runs: list[tuple[int, int]], work: type
) -> tuple[np.ndarray, float]:
    """Random odd integers below a bound: symmetric about zero and never zero.

    float32: ±1, ±3, ... ±(2**31 - 1), to be rounded to 24 bits.
    float64: ±1, ±3, ... ±(2**53 - 1), which are exact.
    """
    stream = np.random.PCG64(np.random.SeedSequence(key))
    signed = _SIGNED[work]
    per_word = 8 // signed.itemsize
    parts, position = [], 0
    for start, length in runs:
        first, last = start // per_word, -(-(start + length) // per_word)
        stream.advance(first - position)
        words = stream.random_raw(last - first).astype(_WORDS, copy=False)
        parts.append(words.view(signed)[start % per_word :][:length])
        position = last
    bits = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if work is np.float64:
        np.right_shift(bits, 10, out=bits)
    return np.bitwise_or(bits, 1, out=bits), 2.0**53 if work is np.float64 else 2.0**31


def _truncated_normal_quantile(x: np.ndarray, s: np.ndarray) -> None:
    """Turns uniform values on (-1, 1) into normal ones truncated at ±2, in place.

    `s` is scratch of the same size and dtype.
    """
    numerator, denominator = _QUANTILE[x.dtype.type]
    fraction = np.empty((2, x.size), x.dtype)
    np.multiply(x, x, out=s)
    np.subtract(1, s, out=s)
    # Horner's rule for both polynomials at once: one row each.
    highest, *middle, lowest = np.array([numerator, denominator], x.dtype).T[::-1, :, None]
    np.multiply(highest, s, out=fraction)
    for coefficients in middle:
        np.add(fraction, coefficients, out=fraction)
        np.multiply(fraction, s, out=fraction)
    np.add(fraction, lowest, out=fraction)
    np.multiply(x, fraction[0], out=x)
    np.divide(x, fraction[1], out=x)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary, where backends can adopt it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    offset = -buffer.ctypes.data % 64
    return buffer[offset : offset + size].view(dtype).reshape(shape)


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
