"""Shapeset-3×2 is what the paper describes: classes, greys, geometry, cover rule.

Frequencies and means may stray by 5 standard errors: with the 15 numbers compared here
a right generator fails for one seed in 100,000, and the seeds are fixed.
"""

import itertools

import numpy as np
import pytest
import shapeset

SIZE = 20_000
SIGMAS = 5


@pytest.fixture(scope="module")
def examples():
    return shapeset.draw(np.random.default_rng(1), SIZE)


def test_classes_have_the_paper_s_frequencies(examples):
    """One or two shapes, equally likely; kinds equally likely; pairs unordered."""
    wanted = shapeset.CLASS_PROBABILITIES
    found = np.bincount(examples[1], minlength=len(shapeset.CLASSES)) / SIZE
    assert np.sum(wanted) == pytest.approx(1)
    assert np.all(np.abs(found - wanted) < SIGMAS * np.sqrt(wanted / SIZE))
    assert abs(found[:3].sum() - 0.5) < SIGMAS * 0.5 / np.sqrt(SIZE)


def test_greys(examples):
    """Light on dark or dark on light, half and half, with a gap between the ranges."""
    images, labels = examples
    assert images.shape == (SIZE, 1024)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    assert np.abs(images).min() >= 0.1 - 1e-6  # 2 * 0.55 - 1 and 2 * 0.45 - 1
    ground = images[:, 0]
    assert abs(np.mean(ground > 0) - 0.5) < SIGMAS * 0.5 / np.sqrt(SIZE)
    # The ground, and one grey for each shape on the other side of zero.
    shapes = np.where(labels < len(shapeset.KINDS), 1, 2)
    for image, base, count in zip(images, ground, shapes, strict=True):
        greys = np.unique(image)
        assert len(greys) == 1 + count
        assert np.sum(greys * base < 0) == count


def test_shapes_keep_off_the_border(examples):
    images = examples[0].reshape(-1, 32, 32)
    border = np.ones((32, 32), dtype=bool)
    border[1:-1, 1:-1] = False
    assert np.all(images[:, border] == images[:, :1, 0])


def test_the_second_shape_covers_at_most_half_of_the_first():
    kinds = np.random.default_rng(2).integers(3, size=(SIZE, 2))
    paired = np.arange(SIZE) % 2 == 0
    first, second = shapeset._masks(np.random.default_rng(3), kinds, paired)
    covered = shapeset.cover(first, second)
    assert covered.max() <= 0.5
    assert covered.max() > 0.45  # no stricter than it should be
    assert np.all(second[paired].any(axis=(1, 2)))
    assert not second[~paired].any()


@pytest.mark.parametrize(
    ("kind", "share"),  # share of the circle that the inscribed regular figure takes
    [
        (shapeset.TRIANGLE, 3**1.5 / 4 / np.pi),
        (shapeset.PARALLELOGRAM, 2 / np.pi),
        (shapeset.ELLIPSE, 1),
    ],
)
def test_mean_area(kind, share):
    """Semi-axes of 3.2 to 12.8 pixels: an ellipse measures π·8² on average."""
    kinds = np.full(SIZE, kind)
    masks = shapeset._rasterize(np.random.default_rng(4), kinds)
    areas = np.count_nonzero(masks, axis=(1, 2))
    error = SIGMAS * areas.std() / np.sqrt(SIZE)
    assert areas.mean() == pytest.approx(np.pi * 8**2 * share, abs=error)


def test_stream_is_a_function_of_its_seed():
    def batches(seed, start=0, count=3):
        return list(itertools.islice(shapeset.stream(seed, 50, start), count))

    first = batches(7)
    for (images, labels), (same_images, same_labels) in zip(first, batches(7), strict=True):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(labels, same_labels)
    assert not np.array_equal(first[0][0], first[1][0])
    assert not np.array_equal(first[0][0], batches(8)[0][0])
    np.testing.assert_array_equal(batches(7, start=2, count=1)[0][0], first[2][0])
