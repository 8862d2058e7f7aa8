"""Shapeset-3×2: the endless stream of images of Glorot & Bengio (2010), section 2.1.

Each image is 32×32 and shows one or two shapes, each a triangle, a parallelogram or
an ellipse; the task is to name what is there, in one of nine classes. The ranges below
are those of the authors' generator (github.com/glorotxa/Shapeset); the code is ours
and needs NumPy only.
"""

import itertools
from collections.abc import Iterator

import numpy as np

SIDE = 32
MARGIN = 1  # pixels that a shape keeps from the border
SCALE = (0.2, 0.8)  # diameters of the shape's bounding ellipse, in image sides
FOREGROUND, BACKGROUND = (0.55, 1.0), (0.0, 0.45)  # greys
INVERSION = 0.5  # chance that foreground and background change places
MAX_COVER = 0.5  # of the first shape's area, hidden by the second

KINDS = ("triangle", "parallelogram", "ellipse")
TRIANGLE, PARALLELOGRAM, ELLIPSE = range(3)
CORNERS = {TRIANGLE: 3, PARALLELOGRAM: 4}
# One shape: its kind. Two: their unordered pair, since which one lies on top is not
# part of the task.
PAIR_CLASS = np.array([[3, 4, 5], [4, 6, 7], [5, 7, 8]])
CLASSES = (
    *KINDS,
    *(f"{a} + {b}" for i, a in enumerate(KINDS) for b in KINDS[i:]),
)
# What follows from one or two shapes, equally likely, of equally likely kinds. Always
# guessing a single shape therefore errs on 5/6 = 83.3 % of the images.
CLASS_PROBABILITIES = np.array([3, 3, 3, 1, 2, 2, 1, 2, 1]) / 18


def stream(seed: int, size: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield `(images, labels)` of `size` fresh examples for ever; see `draw`.

    Every batch has its own generator, so that an interrupted training can go on at
    batch `start` without drawing what came before.
    """
    for batch in itertools.count(start):
        yield draw(np.random.default_rng([seed, batch]), size)


def draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` examples.

    Returns:
        The images, float32 in [-1, 1], of shape `(size, 1024)`, and the labels, int64
        in 0..8, in the order of `CLASSES`.
    """
    kinds = rng.integers(len(KINDS), size=(size, 2))
    paired = rng.random(size) < 0.5
    first, second = _masks(rng, kinds, paired)

    inverted = rng.random(size) < INVERSION
    background = np.where(inverted, _grey(rng, size, FOREGROUND), _grey(rng, size))
    colours = np.where(inverted, _grey(rng, (2, size)), _grey(rng, (2, size), FOREGROUND))
    images = np.where(first, colours[0, :, None, None], background[:, None, None])
    images = np.where(second, colours[1, :, None, None], images)

    labels = np.where(paired, PAIR_CLASS[kinds[:, 0], kinds[:, 1]], kinds[:, 0])
    return images.reshape(size, SIDE * SIDE), labels


def _grey(rng, shape, bounds=BACKGROUND):
    return (2 * rng.uniform(*bounds, shape) - 1).astype("float32")


def _masks(rng, kinds, paired):
    """The pixels of the first and of the second shape, (size, 32, 32) booleans."""
    first = _rasterize(rng, kinds[:, 0])
    second = np.zeros_like(first)
    todo = np.flatnonzero(paired)
    while todo.size:
        # Only the geometry is drawn again, not the kind: rejection must not make
        # some classes rarer than others.
        second[todo] = _rasterize(rng, kinds[todo, 1])
        todo = todo[cover(first[todo], second[todo]) > MAX_COVER]
    return first, second


def cover(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share of each first mask that the second one hides."""
    hidden = np.count_nonzero(first & second, axis=(1, 2))
    return hidden / np.count_nonzero(first, axis=(1, 2))


def _rasterize(rng, kinds):
    """One shape of each kind asked for, of free form, rotation and place."""
    masks = np.empty((len(kinds), SIDE, SIDE), dtype=bool)
    for kind in range(len(KINDS)):
        members = np.flatnonzero(kinds == kind)
        masks[members] = _rasterize_kind(rng, kind, members.size)
    return masks


def _rasterize_kind(rng, kind, size):
    """`size` affine images, kept whole within the borders, of a regular figure.

    Turning the regular triangle, the square or the disc, stretching it along the axes
    and turning it again gives every triangle, parallelogram and ellipse.
    """
    stretch = SIDE / 2 * rng.uniform(*SCALE, (size, 2, 1))
    matrix = _rotations(rng, size) @ (stretch * _rotations(rng, size))
    if kind == ELLIPSE:
        reach = np.linalg.norm(matrix, axis=2)
        low, high = -reach, reach
    else:
        corners = matrix @ _circle(CORNERS[kind], 0.0).T
        low, high = corners.min(axis=2), corners.max(axis=2)
    centre = rng.uniform(MARGIN - low, SIDE - MARGIN - high)

    # `figure @ (pixel - centre) <= limit` tells the inside, where the rows of `figure`
    # are the normals of the edges, or the two coordinates in which the ellipse is round
    figure = np.linalg.inv(matrix)
    if kind != ELLIPSE:
        figure = _circle(CORNERS[kind], 0.5) @ figure
    pixels = np.arange(SIDE) + 0.5
    x = figure[:, :, :1] * (pixels - centre[:, None, :1])
    y = figure[:, :, 1:] * (pixels - centre[:, None, 1:])
    x, y = x.astype("float32")[:, :, None, :], y.astype("float32")[:, :, :, None]
    if kind == ELLIPSE:
        return (x[:, 0] + y[:, 0]) ** 2 + (x[:, 1] + y[:, 1]) ** 2 <= 1
    inradius = np.float32(np.cos(np.pi / CORNERS[kind]))
    return np.all(x <= inradius - y, axis=1)


def _circle(n, phase):
    """`n` evenly spaced points of the unit circle."""
    angles = 2 * np.pi * (np.arange(n) + phase) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rotations(rng, size):
    angles = rng.uniform(0, 2 * np.pi, size)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([cos, -sin, sin, cos], axis=1).reshape(size, 2, 2)
