"""Whether a kernel is as the isometric start draws it, and what is wrong if it is not."""

import math

import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.mirrored import Mirror, Side
from keras_glorot._models.survey import Weight
from keras_glorot.tools._fitting import disorder
from keras_glorot.tools._slices import ONE_IN

__all__ = ["find_fault", "find_start", "is_marked"]

# Float32 keeps orthogonality to 1e-6, half precision to its own rounding.
_TOLERANCE = 1e-2


def find_start(weight: Weight, start: Distribution) -> Distribution | None:
    """The start that the values come from, perhaps with a fault, and not by chance.

    That is this one, or one whose pairs have no partners in a neighbour, which was drawn
    otherwise, and whose scale follows from that; None if it is neither.
    """
    values, mirror = _values(weight), start.mirror
    if mirror is None:
        is_tapped = start.form == "tap" and _is_tapped(values, _tapped(values, start))
        return start if is_tapped else None
    if _is_drawn(values, mirror):
        return start
    alone = [
        Side.of(np.full(len(side.places), -1), mirror.matrices.parts)
        for side in (mirror.inputs, mirror.outputs)
    ]
    for other in (mirror._replace(inputs=alone[0]), mirror._replace(outputs=alone[1])):
        if _has_pairs(other) and _is_drawn(values, other):
            return Distribution.mirrored(_disorder(other.fold(values))[1], other)
    return None


def _is_drawn(values: np.ndarray, mirror: Mirror) -> bool:
    if not values.any() or not np.isfinite(values).all():
        return False
    folded = mirror.fold(values)
    least = sum(each.size for each in folded) / values.size  # of any values
    # Zeros are opposite to zeros, and mean something beside a tap only.
    drawn = (values != 0) | bool(mirror.matrices.window)
    if np.mean(_is_mirrored(values, mirror.unfold(folded))[drawn]) < (1 + least) / 2:
        return False
    # Pairs are there on purpose. Without them the matrix alone can tell.
    return least < 1 or _disorder(folded)[0] < 0.5


def is_marked(start: Distribution) -> bool:
    """Whether more than an orthogonal matrix tells it: pairs, or zeros beside a tap."""
    mirror = start.mirror
    if mirror is None:
        return start.form == "tap"
    taps = math.prod(tap.stop - tap.start for tap in mirror.taps)
    return _has_pairs(mirror) or taps < mirror.matrices.window_size


def _has_pairs(mirror: Mirror) -> bool:
    return any(bool((side.factors < 0).any()) for side in (mirror.inputs, mirror.outputs))


def find_fault(weight: Weight, start: Distribution) -> tuple[str, str] | None:
    """The code of what is wrong, and a sentence; None if nothing is."""
    values, mirror = _values(weight), start.mirror
    if mirror is None:
        is_right = np.allclose(values, _tapped(values, start), rtol=_TOLERANCE, atol=0)
        message = "Its filters are not one value at the tap, and zeros beside it."
        return None if is_right else ("form", message)
    folded = mirror.fold(values)
    mirrored = mirror.unfold(folded)
    is_right = _is_mirrored(values, mirrored)
    if not is_right[mirrored == 0].all():
        return "form", "Beside the tap it is not zero."
    if not is_right.all():
        return "form", "Not all pairs are opposite."
    worst, factor = _disorder(folded)
    if worst > _TOLERANCE:
        return "form", "The matrix between its pairs is not orthogonal."
    ratio = factor / start.scale
    if abs(ratio - 1) > 0.05:
        return "std", f"The values are {ratio:.3g} times as large as those of this start."
    return None


def _values(weight: Weight) -> np.ndarray:
    return backends.values(weight.variable)[(slice(None),) * len(weight.shape)]


def _tapped(values: np.ndarray, start: Distribution) -> np.ndarray:
    return start.draw(values.shape, "float32", (0,)).astype(values.dtype)


def _is_tapped(values: np.ndarray, tapped: np.ndarray) -> bool:
    taps = tapped != 0
    right = np.isclose(values[taps], tapped[taps], rtol=_TOLERANCE, atol=0)
    if not np.allclose(np.abs(values), tapped, rtol=_TOLERANCE, atol=0):
        ordered = (np.sort(each, axis=None) for each in (np.abs(values), tapped))
        is_moved = np.allclose(*ordered, rtol=_TOLERANCE, atol=0)
        return is_moved or bool(np.mean(right) > 3 / 4)
    # Orthogonal matrices of one row and one column are 1 or -1 by chance.
    count, wrong = right.size, int(np.count_nonzero(~right))
    if not wrong or 4 * wrong > count:
        return not wrong
    fewer = sum(math.comb(count, number) for number in range(wrong + 1))
    return fewer / 2**count < ONE_IN


def _is_mirrored(values: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Of each value, whether it is as the first unit of its pair tells."""
    exact = values.astype(np.float64)
    return np.abs(exact - mirrored) <= 1e-3 * np.abs(exact).max()


def _disorder(matrices: list[np.ndarray]) -> tuple[float, float]:
    found, factor = disorder(each[None] for each in matrices)
    return float(found.max()), factor
