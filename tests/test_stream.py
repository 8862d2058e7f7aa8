"""The stream: frozen bits, the right distribution, independent of who draws it."""

import hashlib
import importlib
import math
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

import ml_dtypes
import mpmath
import numpy as np
import pytest
from kernels import KERNELS, NATIVE, use_kernel
from scipy import stats

from keras_glorot._drawing import stream
from keras_glorot._drawing.stream import TRUNCATED_STD, draw


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    use_kernel(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["NumPy", "native"])
def either(request, monkeypatch):
    if request.param == "native" and NATIVE is None:
        pytest.skip("built without the native kernel")
    if request.param == "NumPy":
        monkeypatch.setattr(stream, "native", None)
    return request.param


DISTRIBUTIONS = ("uniform", "truncated_normal")
EXACT = {
    "uniform": stats.uniform(-1, 2),
    "truncated_normal": stats.truncnorm(-2, 2),
}
SIZE = 1_000_000

# SHA-256 (first 16 digits) of the little-endian bytes. These may never change: raising
# `stream.VERSION` is the one way, and every user's weights change with it.
GOLDEN = {
    ("uniform", "float16", (3, 3, 5, 7)): "9fb5312ebf4b4fb0",
    ("uniform", "bfloat16", (3, 3, 5, 7)): "fd226271500d1c44",
    ("uniform", "float32", (3, 3, 5, 7)): "cb6681a2e8236086",
    ("uniform", "float64", (3, 3, 5, 7)): "603cf0290efe1227",
    ("uniform", "float32", (1500, 1501)): "f01b2234b9622daa",
    ("truncated_normal", "float16", (3, 3, 5, 7)): "4bf1e60bf27ee441",
    ("truncated_normal", "bfloat16", (3, 3, 5, 7)): "348b67e03e55a5d2",
    ("truncated_normal", "float32", (3, 3, 5, 7)): "cf5356003e40b1d6",
    ("truncated_normal", "float64", (3, 3, 5, 7)): "32ef7c19aa3ce03c",
    ("truncated_normal", "float64", (64, 33)): "78ac7f53fdee00e1",
}


def sha(array):
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("distribution", "dtype", "shape"), GOLDEN)
def test_golden_bits(distribution, dtype, shape, kernel):
    array = draw(distribution, shape, 0.5, dtype, (2010, 9))
    frozen = "these bits are frozen: users' weights change unless they come back"
    assert sha(array) == GOLDEN[distribution, dtype, shape], frozen


def test_golden_knots():
    knots = stream.knots()
    assert knots.dtype == np.int32
    assert sha(knots) == "d171cfe9fe1a8bd4"


# Random123's own known answers, examples/kat_vectors: counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer, either):
    words = stream.philox(counter, tuple(key))
    assert " ".join(f"{word:08x}" for word in words) == answer


def reference(form, shape, scale, bits, seed, index):
    """The contract of `stream`'s docstring for one element, in plain Python."""

    def split(number, count):
        return [number >> 32 * i & 0xFFFFFFFF for i in range(count)]

    digits = []
    for word in seed:
        count = 2
        while not -(2 ** (32 * count - 1)) <= word < 2 ** (32 * count - 1):
            count += 1
        digits.append(split(word, count))
    head = [3, {"uniform": 0, "truncated_normal": 1}[form], bits, len(shape)]
    head += [half for extent in shape for half in split(extent, 2)]
    head += [len(seed), *(len(each) for each in digits)]
    tail = [digit for each in digits for digit in each]
    key = (0, 0)
    for words in (head, tail):
        words += [0] * (-len(words) % 4)
        for i in range(0, len(words), 4):
            key = stream.philox(words[i : i + 4], key)[:2]
    if bits == 64:
        block, place = divmod(index, 2)
        words = stream.philox([*split(block, 2), *key], key)
        word = words[2 * place] + (words[2 * place + 1] << 32)
        signed = word - 2**64 if word >= 2**63 else word
        x = ((signed >> 10) | 1) / 2**53
        if form == "truncated_normal":
            s = 1 - x * x
            numerator = denominator = 0.0
            for coefficient in stream._NUMERATOR:
                numerator = numerator * s + coefficient
            for coefficient in (1.0, *stream._DENOMINATOR):
                denominator = denominator * s + coefficient
            x = x * numerator / denominator
        return x * scale
    block, place = divmod(index, 4)
    word = stream.philox([*split(block, 2), *key], key)[place]
    if form == "uniform":
        odd = (word - 2**32 if word >= 2**31 else word) | 1
    else:
        scale *= 2
        j, t = divmod(min(word, 2**32 - 1 - word), 2**19)
        low, high = (int(knot) for knot in stream.knots()[j : j + 2])
        odd = 2 * (low + (high - low) * t // 2**19) + 1
        odd = odd if word < 2**31 else -odd
    return np.float32(odd) / np.float32(2**31) * np.float32(scale)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("shape", "seed"),
    [
        ((2, 5), (7,)),
        ((3, 3, 3), (2**63, -(2**63), -1)),
        ((11,), (7 + (5 << 70), 0, -(2**64))),
        ((1, 1, 1, 2), (2**63 - 1, 2**200)),
        ((), (0, 0)),
    ],
)
def test_every_element_follows_the_contract(distribution, dtype, shape, seed, either):
    drawn = draw(distribution, shape, 0.3, dtype, seed).reshape(-1)
    expected = [
        reference(distribution, shape, 0.3, np.dtype(dtype).itemsize * 8, seed, i)
        for i in range(drawn.size)
    ]
    assert drawn.tolist() == [float(value) for value in expected]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elements_far_out(dtype, kernel):
    # Where the block number outgrows 32 bits, in tensors too large to draw; also across.
    for start in (2**34 - 6, 2**35 - 9, 2**60 + 1):
        shape = (2**61,)
        drawn = draw("uniform", shape, 1.0, dtype, (7,), ((start, start + 13),))
        expected = [
            reference("uniform", shape, 1.0, np.dtype(dtype).itemsize * 8, (7,), i)
            for i in range(start, start + 13)
        ]
        assert drawn.tolist() == [float(value) for value in expected]


def test_more_than_2_to_the_31_elements_in_a_row(either):
    # A region whose rows lie far apart, each of them one element too long for a block.
    shape, region = (3, 1 << 32), ((0, 3), (4, 9))
    drawn = draw("truncated_normal", shape, 1.0, "float32", (7,), region)
    for row in range(3):
        for column in range(4, 9):
            index = (row << 32) + column
            wanted = reference("truncated_normal", shape, 1.0, 32, (7,), index)
            assert drawn[row, column - 4] == wanted


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_kolmogorov_smirnov(distribution, dtype):
    # Significance 1e-3 in each of four tests, at one fixed seed.
    values = draw(distribution, (SIZE,), 1.0, dtype, (1,))
    assert stats.kstest(values, EXACT[distribution].cdf).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_kolmogorov_smirnov_on_1e9(distribution):
    # On a grid of 2**20 cells, which can hide a distance of 2e-6. Significance 1e-3.
    cells, bound = 1 << 20, EXACT[distribution].support()[1]
    counts, tensors, size = np.zeros(cells, np.int64), 100, 10_000_000
    for seed in range(tensors):
        values = draw(distribution, (size,), 1.0, "float32", (seed,))
        values = (values.astype(np.float64) + bound) * (cells / (2 * bound))
        counts += np.bincount(np.minimum(values.astype(np.int32), cells - 1), None, cells)
    ends = np.linspace(-bound, bound, cells + 1)[1:]
    total = tensors * size
    distance = abs(np.cumsum(counts) / total - EXACT[distribution].cdf(ends)).max()
    assert stats.kstwobign.sf((distance - 2e-6) * math.sqrt(total)) > 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moments(distribution, dtype):
    # Mean, variance, skewness and kurtosis within 5 standard errors of the exact ones.
    values = draw(distribution, (SIZE,), 1.0, dtype, (2,)).astype(np.float64)
    for power in (1, 2, 3, 4):
        wanted, square = (EXACT[distribution].moment(p) for p in (power, 2 * power))
        error = math.sqrt((square - wanted**2) / SIZE)
        # Rounding to half precision adds variance, eps²/3 of a value's square at most.
        rounding = float(ml_dtypes.finfo(dtype).eps) ** 2
        assert abs((values**power).mean() - wanted) < 5 * error + rounding * square


def test_truncated_std_is_the_integral():
    normal = statistics.NormalDist()
    mass = normal.cdf(2) - normal.cdf(-2)
    variance = 1 - 4 * normal.pdf(2) / mass
    assert math.sqrt(variance) == pytest.approx(TRUNCATED_STD, rel=1e-14)


def test_quantile_function():
    # Against erfinv in 30 digits, in relative error, with both ends and next to zero.
    x = np.concatenate([np.linspace(-1, 1, 200), 1 - np.logspace(-7, -1, 60), [1e-9]])
    with mpmath.workdps(30):
        root = mpmath.sqrt(2)
        wanted = [root * mpmath.erfinv(float(v) * mpmath.erf(root)) for v in x]
    result = stream.truncated_normal_quantile(x)
    relative = [abs(float(r) / w - 1) for r, w in zip(result, wanted, strict=True)]
    assert max(relative) < 5e-15


def integer_quantile(words):
    """The odd integers of float32's truncated normal, for words."""
    words = np.asarray(words, np.uint32)
    return stream.integer_quantile(words.copy()).view(np.int32) | 1


def test_integer_quantile_is_within_its_stated_distance():
    # In terms of the distribution function, at some of each segment, and all of the last.
    words = np.concatenate([np.arange(0, 2**31, 4099), np.arange(2**31 - 2**19, 2**31)])
    values = integer_quantile(words) / 2**30
    distance = abs(EXACT["truncated_normal"].cdf(values) - 0.5 - (words + 0.5) / 2**32)
    assert distance.max() < 5.1e-8


def test_integer_quantile_is_monotone_and_symmetric():
    knots = stream.knots().astype(np.int64)
    assert (np.diff(knots) > 0).all()
    # In a segment, every step of it goes up; from one to the next as well.
    for j in [0, 1, 2, 2047, 4094]:
        values = integer_quantile(np.arange(j << 19, (j + 2) << 19))
        assert (np.diff(values) >= 0).all()
    ends = integer_quantile([0, 2**31 - 1, 2**31, 2**32 - 1])
    assert ends.tolist() == [1, 2**31 - 5, -(2**31) + 5, -1]
    words = np.arange(0, 2**31, 65537, dtype=np.uint32)
    assert (integer_quantile(~words) == -integer_quantile(words)).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_symmetric_and_never_zero(distribution):
    values = draw(distribution, (SIZE,), 1.0, "float32", (3,))
    assert np.count_nonzero(values) == SIZE
    positive = np.count_nonzero(values > 0)
    assert abs(positive - SIZE / 2) < 5 * math.sqrt(SIZE) / 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tiny_scales(distribution, kernel):
    # Down to where float32 itself grows coarse, nothing is lost: 0.3 has all digits.
    values = draw(distribution, (1000,), 0.3, "float32", (3,))
    for power in (-10, -64, -66, -80, -95, -110):
        small = draw(distribution, (1000,), 0.3 * 2.0**power, "float32", (3,))
        np.testing.assert_allclose(np.ldexp(small, -power), values, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 3e4, 65504.0, 1e5, 6e-5, 1e-6, 6e-8, 1e-40])
def test_half_precision_is_float32_rounded(distribution, dtype, scale, kernel):
    # From subnormal numbers to beyond float16's range, as NumPy and ml_dtypes round.
    shape = (101, 1001)
    with np.errstate(over="ignore", under="ignore"):
        full = draw(distribution, shape, scale, "float32", (4,))
        half = draw(distribution, shape, scale, dtype, (4,))
        assert half.tobytes() == full.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_bytes_on_any_number_of_threads(distribution, dtype, kernel, monkeypatch):
    # Small pieces at odd places, so that many boundaries and many hand-overs are met.
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    draws = set()
    for cores in (1, 2, 7, 32):
        monkeypatch.setattr(stream, "available_cores", lambda cores=cores: cores)
        for piece in (251, 300, 1 << 19):
            monkeypatch.setattr(stream, "NUMPY_PIECE", piece)
            monkeypatch.setattr(stream, "NATIVE_PIECE", piece)
            draws.add(draw(distribution, (37, 1013), 1.0, dtype, (5,)).tobytes())
    assert len(draws) == 1, "the bits depend on the number of threads or on the pieces"


def filler(fill):
    """In place of `_native_filler` and `_numpy_filler`: pieces of 512 elements."""
    return lambda *_: (fill, 512)


@pytest.mark.parametrize(("cores", "most", "expected"), [(1, 16, 1), (3, 16, 3), (8, 2, 2)])
def test_as_many_threads_as_cores_but_not_too_many(
    cores, most, expected, either, monkeypatch
):
    everyone, threads = threading.Barrier(expected), set()

    def meeting(start, stop):
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            everyone.wait(timeout=10)
        time.sleep(0.02)  # one thread too many would find a piece left

    monkeypatch.setattr(stream, f"_{either.lower()}_filler", filler(meeting))
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    monkeypatch.setattr(stream, "MOST_THREADS", most)
    monkeypatch.setattr(stream, "available_cores", lambda: cores)
    draw("uniform", (512 * 6,), 1.0, "float32", (5,))
    assert len(threads) == expected


def test_one_core_draws_in_pieces_too(either, monkeypatch):
    # Python sees Ctrl-C between two of them.
    def interrupted(start, stop):
        if start:
            raise KeyboardInterrupt

    monkeypatch.setattr(stream, f"_{either.lower()}_filler", filler(interrupted))
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    monkeypatch.setattr(stream, "available_cores", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        draw("uniform", (512 * 6,), 1.0, "float32", (5,))


@pytest.mark.parametrize("in_caller", [False, True])
def test_an_error_in_a_thread_is_raised(in_caller, either, monkeypatch):
    both, threads, filled = threading.Barrier(2), set(), []

    def failing(start, stop):
        thread = threading.current_thread()
        if thread not in threads:
            threads.add(thread)
            both.wait(timeout=10)
        if (thread is threading.main_thread()) == in_caller:
            raise MemoryError
        time.sleep(0.01)
        filled.append(start)

    monkeypatch.setattr(stream, f"_{either.lower()}_filler", filler(failing))
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    monkeypatch.setattr(stream, "available_cores", lambda: 2)
    with pytest.raises(MemoryError):
        draw("uniform", (512 * 100,), 1.0, "float32", (5,))
    # The caller's error stops the other thread, the other's is known at the end.
    assert len(filled) < 50 if in_caller else len(filled) == 99


def test_where_no_thread_can_be_had(either, monkeypatch):
    arguments = ("uniform", (3 << 20,), 1.0, "float32", (5,))
    wanted = draw(*arguments)

    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    monkeypatch.setattr(stream, "available_cores", lambda: 2)
    np.testing.assert_array_equal(draw(*arguments), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_longer_tensor_of_one_key_continues_a_shorter_one(
    distribution, dtype, kernel, monkeypatch
):
    # Sizes around the boundaries of blocks, vectors and batches: the same elements.
    monkeypatch.setattr(stream, "stream_key", lambda *_: (1, 2))
    whole = draw(distribution, (3000,), 1.0, dtype, (1,))
    for size in [*range(18), 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 511, 512, 513,
                 1023, 1024, 1025, 2047, 2049]:  # fmt: skip
        part = draw(distribution, (size,), 1.0, dtype, (1,))
        assert part.tobytes() == whole[:size].tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "region",
    [
        ((0, 37), (0, 5), (0, 7)),
        ((3, 4), (0, 5), (0, 7)),
        ((3, 30), (0, 5), (0, 7)),
        ((0, 37), (1, 3), (0, 7)),
        ((0, 37), (0, 5), (6, 7)),
        ((1, 36), (1, 4), (1, 6)),
        ((2, 35), (2, 3), (3, 4)),
        ((5, 5), (0, 5), (0, 7)),
    ],
)
@pytest.mark.parametrize(
    ("piece", "width"), [(7, 1), (64, 1), (1 << 18, 1), (251, 300), (3000, 300)]
)
def test_a_region_is_cut_from_the_whole(region, dtype, piece, width, kernel, monkeypatch):
    # Rows, columns, blocks and single elements, with runs that start at odd places,
    # longer and shorter than pieces and than the kernel's batches.
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    monkeypatch.setattr(stream, "NATIVE_PIECE", piece)
    monkeypatch.setattr(stream, "NUMPY_PIECE", piece)
    monkeypatch.setattr(stream, "available_cores", lambda: 2)
    *rows, (start, stop) = region
    shape, region = (37, 5, 7 * width), (*rows, (start * width, stop * width))
    whole = draw("truncated_normal", shape, 1.0, dtype, (8,))
    part = draw("truncated_normal", shape, 1.0, dtype, (8,), region)
    wanted = whole[tuple(slice(*bounds) for bounds in region)]
    assert part.shape == wanted.shape
    assert part.tobytes() == wanted.tobytes()


def test_a_region_of_a_scalar():
    whole = draw("uniform", (), 1.0, "float32", (8,))
    assert draw("uniform", (), 1.0, "float32", (8,), ()).tobytes() == whole.tobytes()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_no_value_out_of_bounds_in_1e8(distribution):
    bound = np.float32(0.3 if distribution == "uniform" else 0.6)
    for seed in range(10):
        values = draw(distribution, (10_000_000,), 0.3, "float32", (seed,))
        assert max(values.max(), -values.min()) <= bound


def test_many_threads_at_once(either, monkeypatch):
    # 32 callers, each of which starts threads of its own.
    monkeypatch.setattr(stream, "WORTH_THREADS", 0)
    monkeypatch.setattr(stream, "NATIVE_PIECE", 1 << 12)
    monkeypatch.setattr(stream, "NUMPY_PIECE", 1 << 12)
    monkeypatch.setattr(stream, "available_cores", lambda: 3)
    wanted = draw("truncated_normal", (300, 100), 1.0, "float32", (6,)).tobytes()
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                draw("truncated_normal", (300, 100), 1.0, "float32", (6,)).tobytes()
            )
        )
        for _ in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wanted] * 32


def test_keys_do_not_run_into_each_other():
    # Words of seed and shape that would be the same sequence without their lengths.
    keys = {
        stream.stream_key(distribution, shape, dtype, seed)
        for distribution in DISTRIBUTIONS
        for dtype in ("float32", "float64")
        for shape, seed in [
            ((5, 3), (1,)),
            ((3, 5), (1,)),
            ((15,), (1,)),
            ((3,), (1, 5)),
            ((3,), (1, 0)),
            ((3,), (1,)),
            ((3,), (1 + (5 << 32),)),
            ((3,), (1 + (5 << 64),)),
            ((3,), (1 + (5 << 96),)),
            ((3 + (1 << 32),), (1,)),
            ((3, 5), (-1,)),
            ((3, 5), (2**32 - 1,)),
            ((3, 5), (2**64 - 1,)),
            ((3, 5), (0,)),
            ((3, 5), (1, 0)),
        ]
    }
    assert len(keys) == 60
    half = stream.stream_key("uniform", (5, 3), "bfloat16", (1,))
    assert half == stream.stream_key("uniform", (5, 3), "float32", (1,))


def uniform_ranks(distribution, seed, shape=(SIZE,)):
    """A draw, mapped by its exact distribution to U(0, 1)."""
    return EXACT[distribution].cdf(draw(distribution, shape, 1.0, "float32", seed).ravel())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_neighbours_fill_the_square_evenly(distribution):
    # Chi-square on 64 x 64 cells of pairs (x[i], x[i + lag]), significance 1e-3 each.
    u = uniform_ranks(distribution, (9,))
    for lag in (1, 2, 3, 64):
        pairs = len(u) // (2 * lag) * 2 * lag
        x, y = u[:pairs].reshape(-1, 2, lag).swapaxes(0, 1).reshape(2, -1)
        counts, _, _ = np.histogram2d(x, y, bins=64, range=[[0, 1], [0, 1]])
        assert stats.chisquare(counts.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_serial_correlation(distribution):
    # Lags 1 to 50, of values and of squares: 100 numbers within 4.5 standard errors.
    u = uniform_ranks(distribution, (10,)) - 0.5
    for values in (u, u * u):
        values = values - values.mean()
        for lag in range(1, 51):
            r = (values[lag:] * values[:-lag]).mean() / values.var()
            assert abs(r) < 4.5 / math.sqrt(SIZE)


def test_neighbouring_seeds_and_shapes_are_independent():
    # Correlations of values and of squares within 5 standard errors, 5e-3.
    base = uniform_ranks("uniform", (1,)) - 0.5
    others = {
        "the next seed": uniform_ranks("uniform", (2,)),
        "a longer shape": uniform_ranks("uniform", (1,), (SIZE + 1,))[:SIZE],
        "another rank": uniform_ranks("uniform", (1,), (1000, 1000)),
        "the other distribution": uniform_ranks("truncated_normal", (1,)),
        "a generator's first state": uniform_ranks("uniform", (1, 0)),
        "a generator's next state": uniform_ranks("uniform", (1, 1)),
    }
    for name, other in others.items():
        for power in (1, 2):
            r = np.corrcoef(base**power, (other - 0.5) ** power)[0, 1]
            assert abs(r) < 5 / math.sqrt(SIZE), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2,), (3,)])
def test_small_shapes(shape):
    array = draw("truncated_normal", shape, 1.0, "float32", (1,))
    assert array.shape == shape
    assert array.flags.c_contiguous
    assert array.size == 0 or array.ctypes.data % 64 == 0


def run_python(source, **environment):
    """The output of a new process that imports `stream` without the package around it."""
    folder = str(pathlib.Path(stream.__file__).parent.parent)
    bare = (
        "import sys, types; package = types.ModuleType('keras_glorot'); "
        f"package.__path__ = [{folder!r}]; sys.modules['keras_glorot'] = package; "
        "from keras_glorot._drawing import stream; "
    )
    result = subprocess.run(
        [sys.executable, "-c", bare + source],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return result.stdout.strip()


def test_knows_nothing_of_keras():
    assert run_python("print('keras' in sys.modules)") == "False"


def test_the_native_kernel_can_be_switched_off():
    source = "print(stream.native_name())"
    off = "NumPy (the native kernel is switched off by KERAS_GLOROT_NATIVE=0)"
    assert run_python(source, KERAS_GLOROT_NATIVE="0") == off
    if NATIVE is not None:
        best = f"native kernel, {NATIVE.CLONES[-1]}"
        assert run_python(source, KERAS_GLOROT_NATIVE="1") == best


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (ModuleNotFoundError(), "was not built for this Python"),
        (ImportError("wrong ELF class"), "can't be loaded: wrong ELF class"),
    ],
)
def test_it_is_said_why_numpy_draws(missing, reason, monkeypatch):
    def import_module(name):
        raise missing

    monkeypatch.delenv("KERAS_GLOROT_NATIVE", raising=False)
    monkeypatch.setattr(importlib, "import_module", import_module)
    native, said = stream._load_native()
    assert native is None
    assert said == f"the native kernel {reason}"


@pytest.mark.skipif(NATIVE is None, reason="about the native kernel")
def test_the_native_kernel_refuses_what_would_write_elsewhere():
    out, steps = np.zeros(100, np.uint8), b""
    right = [-1, out, 2, 0, (1, 2), 1.0, stream.knots(), stream._RATIONAL,
             0, 25, 0, 25, steps]  # fmt: skip
    NATIVE.fill(*right)
    wrong = [(0, 9), (2, 4), (3, 2), (6, b"short"), (7, b"short"), (9, 26), (11, 0),
             (12, b"short"), (12, bytes(16)), (12, b"1" * 16 * 65)]  # fmt: skip
    for place, value in wrong:
        arguments = [*right]
        arguments[place] = value
        with pytest.raises(ValueError, match="would not give"):
            NATIVE.fill(*arguments)
