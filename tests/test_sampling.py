"""The stream: frozen bits, the right distribution, independent of who draws it."""

import hashlib
import math
import statistics
import subprocess
import sys
import threading
import time

import ml_dtypes
import mpmath
import numpy as np
import pytest
from scipy import stats

from keras_glorot import sampling
from keras_glorot.sampling import TRUNCATED_STD, draw

DISTRIBUTIONS = ("uniform", "truncated_normal")
EXACT = {
    "uniform": stats.uniform(-1, 2),
    "truncated_normal": stats.truncnorm(-2, 2),
}
SIZE = 1_000_000

# SHA-256 (first 16 digits) of the little-endian bytes. These may never change: raising
# `sampling.VERSION` is the one way, and every user's weights change with it.
GOLDEN = {
    ("uniform", "float16", (3, 3, 5, 7)): "06137a7475b7d429",
    ("uniform", "bfloat16", (3, 3, 5, 7)): "98ca38838baa4e6e",
    ("uniform", "float32", (3, 3, 5, 7)): "c3eb7f123a87f4f5",
    ("uniform", "float64", (3, 3, 5, 7)): "f1bd5b1973183e5d",
    ("uniform", "float32", (1500, 1501)): "e0b555fc0b8ea78e",
    ("truncated_normal", "float16", (3, 3, 5, 7)): "fade805683c0dcfc",
    ("truncated_normal", "bfloat16", (3, 3, 5, 7)): "1281712a6bb7d2c4",
    ("truncated_normal", "float32", (3, 3, 5, 7)): "cbcfc44b7be3f223",
    ("truncated_normal", "float64", (3, 3, 5, 7)): "1b6257624cdd17a6",
    ("truncated_normal", "float64", (64, 33)): "eb9a93480806cf53",
}


def sha(array):
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("distribution", "dtype", "shape"), GOLDEN)
def test_golden_bits(distribution, dtype, shape):
    array = draw(distribution, shape, 0.5, dtype, (2010, 9))
    frozen = "these bits are frozen: users' weights change unless they come back"
    assert sha(array) == GOLDEN[distribution, dtype, shape], frozen


def test_raw_words_are_numpys():
    # The contract in plain NumPy: key, generator, halves of words in order.
    key = sampling._key("uniform", np.float32, (7,), (2, 5))
    assert key == [2, 0, 4, 1, 2, 7, 2, 2, 2, 2, 5]
    words = np.random.SFC64(np.random.SeedSequence([*key, 0])).random_raw(5)
    halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    signed = [half - 2**32 if half >= 2**31 else half for half in halves]
    expected = np.float32([odd | 1 for odd in signed]) * np.float32(0.5 / 2**31)
    assert draw("uniform", (2, 5), 0.5, "float32", (7,)).ravel().tolist() == list(expected)


def test_chunks_far_out_and_long_seeds_have_streams_of_their_own():
    # Chunk 2**17 - 1 of a tensor too large to draw, and a seed of three words.
    shape, seed = (1 << 36,), (7 + (5 << 70),)
    start = (1 << 36) - 6
    key = sampling._key("uniform", np.float32, seed, shape)
    assert key[3:8] == [1, 6, 7, 0, 5 << 6]
    stream = np.random.SFC64(np.random.SeedSequence([*key, (1 << 17) - 1]))
    words = stream.random_raw(sampling.CHUNK // 2)[-3:]
    wanted = np.float32(words.view(np.int32) | 1) / np.float32(2**31)
    drawn = draw("uniform", shape, 1.0, "float32", seed, ((start, 1 << 36),))
    np.testing.assert_array_equal(drawn, wanted)


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5.6e-6), ("float64", 5e-15)])
def test_quantile_function(dtype, tolerance):
    # Against erfinv in 30 digits, in relative error, with both ends and next to zero.
    x = np.concatenate([np.linspace(-1, 1, 200), 1 - np.logspace(-7, -1, 60), [1e-9]])
    x = x.astype(dtype)
    with mpmath.workdps(30):
        root = mpmath.sqrt(2)
        wanted = [root * mpmath.erfinv(float(v) * mpmath.erf(root)) for v in x]
    result = x.copy()
    sampling._truncated_normal_quantile(result, np.empty_like(x), np.empty_like(x))
    relative = [abs(float(r) / w - 1) for r, w in zip(result, wanted, strict=True)]
    assert max(relative) < tolerance


def test_bounds_hold_for_every_float32():
    # Every float32 from 1/2 to 1 goes through the quantile: none comes out above 2.
    for start in range(0x3F000000, 0x3F800001, 1 << 20):
        stop = min(start + (1 << 20), 0x3F800001)
        x = np.arange(start, stop, dtype=np.uint32).view(np.float32)
        sampling._truncated_normal_quantile(x, np.empty_like(x), np.empty_like(x))
        assert x.max() <= 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_symmetric_and_never_zero(distribution):
    values = draw(distribution, (SIZE,), 1.0, "float32", (3,))
    assert np.count_nonzero(values) == SIZE
    positive = np.count_nonzero(values > 0)
    assert abs(positive - SIZE / 2) < 5 * math.sqrt(SIZE) / 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_tiny_scales(distribution):
    # Down to where float32 itself grows coarse, nothing is lost: 0.3 has all digits.
    values = draw(distribution, (1000,), 0.3, "float32", (3,))
    for power in (-10, -64, -66, -80, -95, -110):
        small = draw(distribution, (1000,), 0.3 * 2.0**power, "float32", (3,))
        np.testing.assert_allclose(np.ldexp(small, -power), values, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_half_precision_is_float32_rounded(distribution, dtype):
    shape = (301, 1001)
    full = draw(distribution, shape, 0.01, "float32", (4,))
    half = draw(distribution, shape, 0.01, dtype, (4,))
    assert half.tobytes() == full.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_same_bytes_on_any_number_of_threads(distribution, dtype, monkeypatch):
    # Small chunks and pieces, so that many boundaries and many hand-overs are met.
    monkeypatch.setattr(sampling, "CHUNK", 512)
    draws = set()
    for cores in (1, 2, 7, 8):
        monkeypatch.setattr(sampling, "available_cores", lambda cores=cores: cores)
        for piece in (256, 300, 1 << 19):
            monkeypatch.setattr(sampling, "PIECE", piece)
            draws.add(draw(distribution, (37, 1013), 1.0, dtype, (5,)).tobytes())
    assert len(draws) == 1, "the bits depend on the number of threads or on the pieces"


@pytest.mark.parametrize(("cores", "most", "expected"), [(1, 16, 1), (3, 16, 3), (8, 2, 2)])
def test_as_many_threads_as_cores_but_not_too_many(cores, most, expected, monkeypatch):
    fill, everyone, threads = sampling._fill, threading.Barrier(expected), set()

    def meeting(*arguments):
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            everyone.wait(timeout=10)
        time.sleep(0.02)  # one thread too many would find a chunk left
        fill(*arguments)

    monkeypatch.setattr(sampling, "_fill", meeting)
    monkeypatch.setattr(sampling, "CHUNK", 512)
    monkeypatch.setattr(sampling, "MOST_THREADS", most)
    monkeypatch.setattr(sampling, "available_cores", lambda: cores)
    draw("uniform", (512 * 6,), 1.0, "float32", (5,))
    assert len(threads) == expected


@pytest.mark.parametrize("in_caller", [False, True])
def test_an_error_in_a_thread_is_raised(in_caller, monkeypatch):
    fill, both, threads, filled = sampling._fill, threading.Barrier(2), set(), []

    def failing(*arguments):
        thread = threading.current_thread()
        if thread not in threads:
            threads.add(thread)
            both.wait(timeout=10)
        if (thread is threading.main_thread()) == in_caller:
            raise MemoryError
        time.sleep(0.01)
        fill(*arguments)
        filled.append(arguments)

    monkeypatch.setattr(sampling, "_fill", failing)
    monkeypatch.setattr(sampling, "CHUNK", 512)
    monkeypatch.setattr(sampling, "available_cores", lambda: 2)
    with pytest.raises(MemoryError):
        draw("uniform", (512 * 100,), 1.0, "float32", (5,))
    # The caller's error stops the other thread, the other's is known at the end.
    assert len(filled) < 50 if in_caller else len(filled) == 99


def test_where_no_thread_can_be_had(monkeypatch):
    arguments = ("uniform", (2 * sampling.CHUNK,), 1.0, "float32", (5,))
    wanted = draw(*arguments)

    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    monkeypatch.setattr(sampling, "available_cores", lambda: 2)
    np.testing.assert_array_equal(draw(*arguments), wanted)


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_every_chunk_has_a_stream_of_its_own(size):
    # Around the true boundary, in plain NumPy.
    size += 2 * sampling.CHUNK
    key = sampling._key("uniform", np.float64, (7,), (size,))
    words = [
        np.random.SFC64(np.random.SeedSequence([*key, chunk])).random_raw(count)
        for chunk, count in [
            (0, sampling.CHUNK),
            (1, min(sampling.CHUNK, size - sampling.CHUNK)),
            (2, max(0, size - 2 * sampling.CHUNK)),
        ]
    ]
    wanted = np.ldexp((np.concatenate(words).view(np.int64) >> 10) | 1, -53)
    drawn = draw("uniform", (size,), 1.0, "float64", (7,))
    np.testing.assert_array_equal(drawn, wanted)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_longer_tensor_of_one_key_continues_a_shorter_one(distribution, monkeypatch):
    # Sizes around the piece and chunk boundaries: the same elements, whoever draws them.
    monkeypatch.setattr(sampling, "CHUNK", 128)
    monkeypatch.setattr(sampling, "PIECE", 64)
    key = sampling._key(distribution, np.float32, (1,), (1000,))
    monkeypatch.setattr(sampling, "_key", lambda *_: key)
    whole = draw(distribution, (1000,), 1.0, "float32", (1,))
    for size in [0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 999]:
        part = draw(distribution, (size,), 1.0, "float32", (1,))
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
    ("chunk", "piece", "width"),
    [(8, 6, 1), (128, 64, 1), (1 << 19, 1 << 18, 1), (1024, 256, 300), (4096, 3000, 300)],
)
def test_a_region_is_cut_from_the_whole(region, dtype, chunk, piece, width, monkeypatch):
    # Rows, columns, blocks and single elements, with runs that start at odd places,
    # longer and shorter than chunks, and chunks that hold nothing of the region.
    monkeypatch.setattr(sampling, "CHUNK", chunk)
    monkeypatch.setattr(sampling, "PIECE", piece)
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


def test_many_threads_at_once(monkeypatch):
    # 32 callers, each of which starts threads of its own.
    monkeypatch.setattr(sampling, "CHUNK", 1 << 12)
    monkeypatch.setattr(sampling, "available_cores", lambda: 3)
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
        tuple(sampling._key(distribution, dtype, seed, shape))
        for distribution in DISTRIBUTIONS
        for dtype in (np.float32, np.float64)
        for shape, seed in [
            ((5, 3), (1,)),
            ((3, 5), (1,)),
            ((15,), (1,)),
            ((3,), (1, 5)),
            ((3,), (1 + (5 << 32),)),
            ((3,), (1 + (5 << 96),)),
            ((3, 5), (-1,)),
            ((3, 5), (0,)),
            ((3, 5), (1, 0)),
        ]
    }
    assert len(keys) == 36
    # No key is the start of another: a chunk's number can't make up for what differs.
    assert not any(a != b and a == b[: len(a)] for a in keys for b in keys)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((0, 4), 4), ((3, 4), 1), ((1, 3), 2)],
)
def test_only_chunks_that_are_touched_are_drawn(bounds, expected, monkeypatch):
    # Eight chunks in four rows; the region has the first half of each row.
    monkeypatch.setattr(sampling, "CHUNK", 64)
    generator, made = np.random.SFC64, []
    monkeypatch.setattr(np.random, "SFC64", lambda s: made.append(s) or generator(s))
    draw("uniform", (4, 128), 1.0, "float32", (1,), (bounds, (0, 64)))
    assert len(made) == expected


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


def test_neighbouring_seeds_shapes_and_chunks_are_independent():
    # Correlations of values and of squares within 5 standard errors, 5e-3.
    base = uniform_ranks("uniform", (1,)) - 0.5
    others = {
        "the next seed": uniform_ranks("uniform", (2,)),
        "a longer shape": uniform_ranks("uniform", (1,), (SIZE + 1,))[:SIZE],
        "another rank": uniform_ranks("uniform", (1,), (1000, 1000)),
        "the other distribution": uniform_ranks("truncated_normal", (1,)),
        "a generator's next state": uniform_ranks("uniform", (1, 1)),
        "the next chunk": uniform_ranks("uniform", (1,), (1, SIZE + sampling.CHUNK))[
            sampling.CHUNK :
        ],
    }
    first = uniform_ranks("uniform", (1,), (1, SIZE + sampling.CHUNK))[:SIZE] - 0.5
    for name, other in others.items():
        reference = first if name == "the next chunk" else base
        for power in (1, 2):
            r = np.corrcoef(reference**power, (other - 0.5) ** power)[0, 1]
            assert abs(r) < 5 / math.sqrt(SIZE), name


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2,), (3,)])
def test_small_shapes(shape):
    array = draw("truncated_normal", shape, 1.0, "float32", (1,))
    assert array.shape == shape
    assert array.flags.c_contiguous
    assert array.size == 0 or array.ctypes.data % 64 == 0


def test_knows_nothing_of_keras():
    source = (
        f"import runpy, sys; runpy.run_path({sampling.__file__!r}); "
        "print('keras' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
