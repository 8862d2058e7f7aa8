"""From a seed and a shape to an array: NumPy only, the same bits on every machine.

This is the contract of the stream, version 3. All arithmetic on words is modulo 2**32; a
list of words that does not fill its last block of four is filled up with zeros.

**Blocks.** Philox4x32-10 (Salmon et al. 2011) turns a counter of four words and a key of
two into four words.

**Key.** Start with the key (0, 0). For each block of four words in the list below, the
first two words of Philox4x32-10 at that counter become the new key. The list is

    3, form (uniform 0, truncated normal 1, orthogonal 2),
    bits of the work dtype (32 or 64), rank,
    each extent of the shape as two words, low and high,
    the number of seed words, and how many 32-bit digits each of them has,
    zeros up to a full block,
    the digits of all seed words, lowest first, in two's complement.

A seed word is an integer: it has two digits if they hold it, else as many as it needs. An
int seed is one seed word; the state of a `SeedGenerator`, seed and counter, is two, which
fill one block: a traced program makes its key with one call of Philox. The work dtype is
float64 for float64 and float32 for all else. (Orthogonal matrices have words, values and a
contract of their own, in `orthogonal.py`.)

**Words.** With the key (k0, k1), block b of the tensor is Philox4x32-10 of the counter
(b modulo 2**32, b // 2**32, k0, k1). (That the key is in the counter too says nothing new:
XLA's generator is made so.) Element i, counted in row-major order, has word i % 4 of block
i // 4; in float64 it has words 2 (i % 2), the low one, and 2 (i % 2) + 1 of block i // 2.
No element depends on another, so that any region costs what it holds.

**Uniform.** The word with its lowest bit set is, as a signed integer, odd: symmetric about
zero and never zero. float32: its value is rounded to float32, divided by 2**31, multiplied
by `scale`. float64: the same with the signed 64-bit word shifted right by 10 and 2**53.

**Truncated normal**, float32. For a word w below 2**31 let j = w // 2**19, t = w % 2**19,
K the table of knots and y = K[j] + (K[j + 1] - K[j]) t // 2**19. The value is that of the
odd integer 2 y + 1, rounded to float32, divided by 2**31, multiplied by 2 `scale`. For any
other word it is minus the value of 2**32 - 1 - w. Only integers, one conversion and one
product, so that no compiler can change a bit; within 5.1e-8 of the distribution function
(a Kolmogorov-Smirnov test on 1e9 values sees 4e-5).

Knots: K[4096] = 2**30, else K[j] = 2**29 (q[j] - (q[j - 1] - 2 q[j] + q[j + 1]) / 16),
rounded, where q[j] is the quantile of j / 4096: a chord runs above the curve, and knots
below it halve the distance.

Truncated normal, float64: the uniform value x at scale 1 goes through the quantile
x N(s) / D(s), s = 1 - x², in Horner's order, and is multiplied by `scale`; additions and
multiplications must not be fused.

**Half precision** is the float32 value, rounded to nearest, ties to even.

**Collisions.** A key has 64 bits. Two tensors that differ in form, dtype, shape or seed
share one, and so their words, with a chance of 2**-64; any two of a million do with a
chance of 3e-8, of a thousand million 3 %.
"""

import contextlib
import ctypes
import functools
import importlib
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

__all__ = [
    "TRUNCATED_STD",
    "WEIGHT_DTYPES",
    "Bounds",
    "Key",
    "draw",
    "empty",
    "knots",
    "native",
    "native_name",
    "philox",
    "share",
    "state_words",
    "static_key",
    "stream_key",
    "truncated_normal_quantile",
    "words_of_blocks",
]

Bounds = tuple[tuple[int, int], ...]
Form = Literal["uniform", "truncated_normal", "orthogonal"]
Key = tuple[int, int]

# Part of every key. Whatever changes the bits of any draw must raise it.
VERSION = 3

# The std that is left of a standard normal truncated at two: sqrt(1 - 4 φ(2) / erf(√2)).
TRUNCATED_STD = 0.8796256610342398

WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")
FORMS = {"uniform": 0, "truncated_normal": 1, "orthogonal": 2}

# Elements that one thread takes at a time: long enough for the hand-over of Python's
# lock to be nothing, and for NumPy short enough for the cache.
NATIVE_PIECE = 1 << 20
NUMPY_PIECE = 1 << 17
# Fewer elements than this are not worth a thread.
WORTH_THREADS = 1 << 18
# More threads than this wait for Python's lock, or for the memory.
MOST_THREADS = 32

_MASK = 0xFFFFFFFF
# Philox4x32: the multipliers, and the numbers added to the key in each round.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

# q(x) / x = N(s) / D(s), s = 1 - x², highest power first, D without its leading 1: the
# quantile function of a normal truncated at ±2, with a relative error of 9e-16. Derived
# by benchmarks/derivations/fit_quantile.py. All positive: no digits are lost.
_NUMERATOR = (
    0.2236046036044907, 13.710309516450966, 121.44752932855654,
    351.75594752834684, 438.53870101827914, 268.6122732133559, 86.15634884592819,
    14.623917517225069, 1.2356740223010445, 0.0407313645281624,
)  # fmt: skip
_DENOMINATOR = (
    24.727568607031035, 145.74482529072725, 327.09178338758977,
    340.7823867965929, 182.5675769555217, 52.79729001351008, 8.255120987512248,
    0.6526594727617692, 0.0203656822640812,
)  # fmt: skip
_RATIONAL = np.array([*_NUMERATOR, *_DENOMINATOR])


def _load_native() -> tuple[Any, str]:
    """The compiled kernel; or None, and the reason why NumPy draws in its place."""
    if os.environ.get("KERAS_GLOROT_NATIVE") == "0":
        return None, "the native kernel is switched off by KERAS_GLOROT_NATIVE=0"
    try:
        return importlib.import_module("keras_glorot._drawing._native"), ""
    except ModuleNotFoundError:
        return None, "the native kernel was not built for this Python"
    except ImportError as error:  # built for another machine
        return None, f"the native kernel can't be loaded: {error}"


native, _reason = _load_native()


def native_name() -> str:
    """Whether the native kernel draws, and with which instructions, or NumPy, and why."""
    if native is None:
        return f"NumPy ({_reason})"
    return f"native kernel, {native.CLONES[-1]}"


def draw(
    form: Form,
    shape: Sequence[int],
    scale: float,
    dtype: str,
    seed_words: Sequence[int],
    region: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Draws a tensor, or a region of it.

    Args:
        form: `"uniform"` on [-scale, scale], or `"truncated_normal"`: a normal with
            standard deviation `scale`, cut off at ±2 `scale`.
        shape: The tensor's shape, of fewer than 2**63 elements.
        scale: Positive float.
        dtype: `float16`, `bfloat16`, `float32` or `float64`. Half precision is the
            float32 draw, rounded.
        seed_words: One or more Python integers, of any size and sign.
        region: A start and a stop for each axis. It costs what it holds.

    Returns:
        A new C-contiguous array, aligned to 64 bytes.
    """
    shape = tuple(shape)
    runs = _Runs(shape, region)
    out, memory = empty(runs.shape, dtype)
    if not out.size:
        return out
    key = stream_key(form, shape, dtype, seed_words)
    if native is None:
        fill, piece = _numpy_filler(out, form, key, scale, runs)
    else:
        fill, piece = _native_filler(memory, dtype, form, key, scale, runs)
    if out.size < WORTH_THREADS:
        fill(0, out.size)
    else:
        share(fill, out.size, piece)
    return out


# Keys ------------------------------------------------------------------------------------


def philox(counter: Sequence[int], key: Key) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10: four 32-bit words."""
    if native is not None:
        return native.philox(tuple(counter), key)
    x0, x1, x2, x3 = _rounds(counter, key)
    return x0, x1 & _MASK, x2, x3 & _MASK


def _rounds(counter: Sequence[Any], key: Key) -> tuple[Any, Any, Any, Any]:
    """Of Philox, for integers or arrays: of x1 and x3 only the low halves count."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0 = p1 >> 32
        x0 ^= x1
        x0 ^= k0
        x0 &= _MASK
        x2 = p0 >> 32
        x2 ^= x3
        x2 ^= k1
        x2 &= _MASK
        x1, x3 = p1, p0
        k0, k1 = k0 + _W0 & _MASK, k1 + _W1 & _MASK
    return x0, x1, x2, x3


def stream_key(
    form: Form, shape: tuple[int, ...], dtype: str, seed_words: Sequence[int]
) -> Key:
    """The key of a tensor, which every element's bits come from."""
    digits = [_digits(word) for word in seed_words]
    key = static_key(form, shape, dtype, tuple(map(len, digits)))
    return _absorb(key, sum(digits, ()))


@functools.lru_cache(1024)
def static_key(
    form: Form, shape: tuple[int, ...], dtype: str, digit_counts: tuple[int, ...] = (2, 2)
) -> Key:
    """The key before the seed: all that a traced program knows when it is traced."""
    bits = 64 if dtype == "float64" else 32
    extents = [half for size in shape for half in (size & _MASK, size >> 32)]
    counts = [len(digit_counts), *digit_counts]
    return _absorb((0, 0), (VERSION, FORMS[form], bits, len(shape), *extents, *counts))


def state_words(state: np.ndarray) -> tuple[int, ...]:
    """The seed words that the state of a `SeedGenerator` stands for."""
    if state.dtype == np.int32:
        state = state.view(np.uint32)  # as Keras means it: PyTorch has no unsigned ones
    return tuple(state.tolist())


def _digits(word: int) -> tuple[int, ...]:
    count = max(2, (word if word >= 0 else ~word).bit_length() // 32 + 1)
    return struct.unpack(f"<{count}I", word.to_bytes(4 * count, "little", signed=True))


def _absorb(key: Key, words: tuple[int, ...]) -> Key:
    words += (0,) * (-len(words) % 4)
    for i in range(0, len(words), 4):
        key = philox(words[i : i + 4], key)[:2]
    return key


# Regions and threads ---------------------------------------------------------------------


class _Runs:
    """A region of a tensor: runs of neighbouring elements, of one length.

    Args:
        shape: The tensor's shape.
        region: A start and a stop for each axis, or None for all of it.
    """

    def __init__(self, shape: tuple[int, ...], region: Sequence[tuple[int, int]] | None):
        self.shape = shape
        self.base = 0
        self.steps: list[tuple[int, int]] = []  # extents and strides, innermost first
        axis = 0
        if region is not None:
            self.shape = tuple(stop - start for start, stop in region)
            for size, (start, _) in zip(shape, region, strict=True):
                self.base = self.base * size + start
            axis = len(shape)
            while axis and self.shape[axis - 1] == shape[axis - 1]:
                axis -= 1  # the axes from here on are in the region whole
            axis = max(axis - 1, 0)  # and of this one a stretch
            strides = [math.prod(shape[i + 1 :]) for i in range(axis)]
            self.steps = list(zip(self.shape, strides, strict=False))[::-1]
        self.length = math.prod(self.shape[axis:])

    def starts(self, first: int, last: int) -> np.ndarray:
        """Where in the tensor each of the runs from first to last starts."""
        run = np.arange(first, last)
        start = np.full(run.shape, self.base)
        for extent, stride in self.steps:
            run, coordinate = np.divmod(run, extent)
            start += coordinate * stride
        return start

    def stretches(self, first: int, last: int) -> Iterator[tuple[np.ndarray, int]]:
        """The region's elements from first to last, in pieces: starts, and one length."""
        while first < last:
            run, inside = divmod(first, self.length)
            size = min(last - first, NUMPY_PIECE)
            length = min(size, self.length - inside)
            count = size // length if length == self.length else 1
            yield self.starts(run, run + count) + inside, length
            first += count * length


Fill = Callable[[int, int], None]


def share(fill: Fill, size: int, piece: int) -> None:
    """Calls `fill(start, stop)` for each piece, on threads."""
    todo = deque(range(0, size, piece))
    workers = min(len(todo), available_cores(), MOST_THREADS)

    def work() -> None:
        while True:
            try:
                start = todo.popleft()  # all threads take from it: a deque allows that
            except IndexError:
                return
            fill(start, min(start + piece, size))

    # Threads of this call alone: nothing to start at import or to lose in a fork.
    with ThreadPoolExecutor(workers) as pool:
        others = []
        with contextlib.suppress(RuntimeError):  # where no thread can be had, do without
            for _ in range(workers - 1):
                others.append(pool.submit(work))
        try:
            work()
        finally:
            todo.clear()  # after an error or an interrupt, the others stop too
        for other in others:
            other.result()


def empty(shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, memoryview]:
    """An uninitialized array and its bytes, on a boundary where backends can adopt it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8).data
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % 64
    return np.ndarray(shape, dtype, memory, start), memory[start : start + size]


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Elements by the native kernel -----------------------------------------------------------


def _native_filler(
    memory: memoryview, dtype: str, form: Form, key: Key, scale: float, runs: _Runs
) -> tuple[Fill, int]:
    steps = b"".join(struct.pack("=QQ", *step) for step in runs.steps)
    code = WEIGHT_DTYPES.index(dtype)
    factor = 2 * scale if form == "truncated_normal" and dtype != "float64" else scale

    def fill(start: int, stop: int) -> None:
        native.fill(
            -1, memory, code, FORMS[form], key, factor, knots(), _RATIONAL,
            start, stop, runs.base, runs.length, steps,
        )  # fmt: skip

    return fill, NATIVE_PIECE


# Elements by NumPy -----------------------------------------------------------------------


def _numpy_filler(
    out: np.ndarray, form: Form, key: Key, scale: float, runs: _Runs
) -> tuple[Fill, int]:
    flat = out.reshape(-1)
    work = np.float64 if out.dtype == np.float64 else np.float32
    per_block = 2 if work is np.float64 else 4

    def fill(start: int, stop: int) -> None:
        for starts, length in runs.stretches(start, stop):
            words = _words_of_runs(starts, length, per_block, key)
            end = start + starts.size * length
            _fill_values(flat[start:end], words.reshape(-1), form, scale)
            start = end

    # Of whole runs, where they are short: these are the fastest.
    return fill, NUMPY_PIECE // runs.length * runs.length or NUMPY_PIECE


def _words_of_runs(starts: np.ndarray, length: int, per_block: int, key: Key) -> np.ndarray:
    """The words of runs of one length, as uint32 or, two in one, as uint64."""
    firsts, skipped = np.divmod(starts, per_block)
    ends = skipped + length
    blocks = np.add.outer(firsts, np.arange(-(-int(ends.max()) // per_block)))
    words = words_of_blocks(blocks.reshape(-1).view(np.uint64), key)
    words = words.view("<u8" if per_block == 2 else "<u4").reshape(len(starts), -1)
    skip = int(skipped[0])
    if (skipped == skip).all():
        return np.ascontiguousarray(words[:, skip : skip + length])
    places = np.add.outer(skipped, np.arange(length))
    return np.take_along_axis(words, places, axis=1)


def words_of_blocks(blocks: np.ndarray, key: Key) -> np.ndarray:
    """Philox4x32-10 of ascending block numbers in uint64: four words each, in order."""
    high = blocks >> 32
    # A number that all blocks share stays one number, for two rounds.
    counter = blocks & _MASK, int(high[0]) if high[0] == high[-1] else high, *key
    words = np.empty((len(blocks), 4), "<u4")
    for i, x in enumerate(_rounds(counter, key)):
        np.copyto(words[:, i], x, casting="unsafe")
    return words


def _fill_values(out: np.ndarray, words: np.ndarray, form: Form, scale: float) -> None:
    """Writes one value for each word; the words are lost."""
    if out.dtype == np.float64:
        integers = words.astype(np.uint64, copy=False).view(np.int64)
        integers >>= 10
        integers |= 1
        x = integers * 2.0**-53
        if form == "truncated_normal":
            x = truncated_normal_quantile(x)
        np.multiply(x, scale, out=out)
        return
    words = words.astype(np.uint32, copy=False)
    if form == "truncated_normal":
        words = integer_quantile(words)
        scale *= 2
    integers = words.view(np.int32)
    integers |= 1
    x = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    np.copyto(x, integers, casting="unsafe")
    x *= np.float32(2**-31)
    x *= np.float32(scale)
    if x is not out:
        with np.errstate(under="ignore"):
            np.copyto(out, x, casting="unsafe")  # rounds to nearest even


def integer_quantile(words: np.ndarray) -> np.ndarray:
    """Uniform words to twice the quantile's integer; the sign is kept by complement."""
    sign = (words.view(np.int32) >> 31).view(np.uint32)
    position = words ^ sign
    segment = position >> 19
    position &= (1 << 19) - 1
    low = knots()[segment].view(np.uint32)
    rise = knots()[1:][segment].view(np.uint32) - low
    # rise * position // 2**19 without a product of more than 32 bits.
    value = rise * (position & 511)
    value >>= 9
    position >>= 9
    position *= rise
    value += position
    value >>= 10
    value += low
    value <<= 1
    value ^= sign
    return value


def truncated_normal_quantile(x: Any) -> Any:
    """Turns uniform values on (-1, 1) into normal ones truncated at ±2, in float64."""
    s = 1 - x * x
    numerator = s * _NUMERATOR[0]
    for coefficient in _NUMERATOR[1:-1]:
        numerator += coefficient
        numerator *= s
    numerator += _NUMERATOR[-1]
    denominator = s + _DENOMINATOR[0]
    for coefficient in _DENOMINATOR[1:]:
        denominator *= s
        denominator += coefficient
    return x * numerator / denominator


@functools.cache
def knots() -> np.ndarray:
    """The table of the integer quantile: 4097 int32, from 0 to 2**30."""
    q = truncated_normal_quantile(np.arange(4097) / 4096)
    table = q.copy()
    table[1:-1] -= (q[:-2] - 2 * q[1:-1] + q[2:]) / 16
    return np.rint(table * 2**29).astype(np.int32)
