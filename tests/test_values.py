"""What is read in parts, also by several processes, is what is read of the whole."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from keras_glorot._backends.values import CHUNK, Values, blocks
from keras_glorot.tools._fitting import measure
from keras_glorot.tools._slices import find_repeats

# How many parts each axis is divided into, and how many processes have them.
DIVISIONS = [((1, 1), 1), ((2, 1), 2), ((2, 3), 1), ((2, 3), 3), ((4, 2), 2)]


def cut(shape, counts):
    """The bounds of equal parts."""
    edges = [
        [(i * size // count, (i + 1) * size // count) for i in range(count)]
        for size, count in zip(shape, counts, strict=True)
    ]
    return list(itertools.product(*edges))


def in_processes(array, counts, processes, function):
    """What a function of the values returns in each of several processes: threads here."""
    parts = cut(array.shape, counts)
    barrier, sent = threading.Barrier(processes), {}

    def run(rank):
        def stack(mine):
            sent[rank] = mine
            barrier.wait(10)
            stacked = np.stack([sent[each] for each in range(processes)])
            barrier.wait(10)
            return stacked

        own = [
            (bounds, np.ascontiguousarray(array[tuple(slice(*each) for each in bounds)]))
            for bounds in parts[rank::processes]
        ]
        return function(Values(array.shape, array.dtype, lambda: own, stack))

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16, np.float64])
def array(request):
    values = np.random.default_rng(0).standard_normal((24, 36)).astype(request.param)
    values[3, 5], values[20, 35] = -0.0, np.nan
    return values


@pytest.mark.parametrize(("counts", "processes"), DIVISIONS)
def test_slices_have_the_same_bits(array, counts, processes):
    for index in [np.s_[3, :], np.s_[:, 35], np.s_[2:23, 5:30], np.s_[20, 35]]:
        for part in in_processes(array, counts, processes, lambda v, i=index: v[i]):
            assert part.dtype == array.dtype
            assert part.shape == array[index].shape
            assert part.tobytes() == array[index].tobytes()


@pytest.mark.parametrize(("counts", "processes"), DIVISIONS)
def test_any(counts, processes):
    array = np.zeros((24, 36))
    assert not any(in_processes(array, counts, processes, Values.any))
    array[-1, -1] = 1
    assert all(in_processes(array, counts, processes, Values.any))


@pytest.mark.parametrize(("counts", "processes"), DIVISIONS)
@pytest.mark.parametrize("first", [(), (4,), (3000,)])
def test_projections_are_sums_over_the_parts(counts, processes, first):
    rng = np.random.default_rng(0)
    array = rng.standard_normal((*first, 4, 12))
    weights = [rng.standard_normal(size) for size in array.shape]
    counts = (2,) * len(first) + counts
    axes = range(array.ndim)
    for fixed in itertools.chain.from_iterable(
        itertools.combinations(axes, size) for size in axes
    ):
        free = [axis for axis in axes if axis not in fixed]
        wanted = np.einsum(
            array, axes, *itertools.chain(*((weights[a], [a]) for a in free)), fixed
        )
        found = in_processes(
            array, counts, processes, lambda v, axes=fixed: v.project(axes, weights)
        )
        for projected in found:
            np.testing.assert_allclose(projected, wanted, rtol=1e-9, atol=1e-9)
            np.testing.assert_array_equal(projected, found[0])


@pytest.mark.parametrize(("counts", "processes"), DIVISIONS)
def test_repeats(counts, processes):
    array = np.random.default_rng(0).standard_normal((24, 36)).astype("float32")
    array[:, 2] = 0
    array[:, 30] = -array[:, 1]
    array[23] = array[0]
    wanted = list(find_repeats(Values.of(array), 0, 1e-6))
    assert len(wanted) == 2

    def find(values):
        return list(find_repeats(values, 0, 1e-6))

    assert in_processes(array, counts, processes, find) == processes * [wanted]


@pytest.mark.parametrize(("counts", "processes"), DIVISIONS)
def test_moments_do_not_depend_on_the_order(counts, processes):
    """In twelve digits: so `audit` tells that two weights have the same values."""
    one = np.random.default_rng(0).standard_normal((360, 480))
    wanted = measure(Values.of(one), 0.0)
    for array in (one, -one, one.T, one.reshape(480, 360), one[::-1]):
        found = in_processes(array, counts, processes, lambda values: measure(values, 0.0))
        for each in found:
            assert max(-each.low, each.high) == max(-wanted.low, wanted.high)
            moments = (each.std, each.kurtosis), (wanted.std, wanted.kurtosis)
            np.testing.assert_allclose(*moments, rtol=1e-13)


@pytest.mark.parametrize("shape", [(), (3, 4), (5, CHUNK + 1), (2 * CHUNK,), (2, 300, 300)])
def test_blocks_cover_a_tensor_once(shape):
    seen = np.zeros(shape, int)
    for index in blocks(shape):
        assert seen[index].size <= CHUNK
        seen[index] += 1
    assert (seen == 1).all()
