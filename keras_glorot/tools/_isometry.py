"""Whether a kernel is as the isometric start draws it, and what is wrong if it is not."""

import math
from itertools import product

import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.mirrored import Mirror, Side
from keras_glorot._models.survey import Weight
from keras_glorot.tools._fitting import ONE_IN

__all__ = ["find_fault", "is_marked", "is_part", "is_start"]

# Float32 keeps orthogonality to 1e-6, half precision to its own rounding.
_TOLERANCE = 1e-2


def is_start(weight: Weight, start: Distribution) -> bool:
    """Whether the values come from this start, perhaps with a fault, and not by chance."""
    values = _values(weight)
    if start.form == "tap":
        return _is_tapped(values, _tapped(values, start))
    mirror = start.mirror
    if mirror is None or not values.any() or not np.isfinite(values).all():
        return False
    folded = mirror.fold(values)
    least = sum(each.size for each in folded) / values.size  # of any values
    # Zeros are opposite to zeros, and mean something beside a tap only.
    drawn = (values != 0) | bool(mirror.matrices.window)
    if np.mean(_is_mirrored(values, mirror)[drawn]) < (1 + least) / 2:
        return False
    # What has pairs has them on purpose. Else the matrix alone can tell.
    scale = start.scale * _ratio(folded, start.scale)
    return least < 1 or _disorder(folded, scale) < 0.5


def is_part(weight: Weight, start: Distribution) -> bool:
    """Whether the values come from this start, perhaps without the pairs of a neighbour."""
    mirror = start.mirror
    if mirror is None:
        return is_start(weight, start)
    sides = [
        (side, Side.of(np.full(len(side.places), -1), mirror.matrices.parts))
        for side in (mirror.inputs, mirror.outputs)
    ]
    return any(
        is_start(weight, start._replace(mirror=mirror._replace(inputs=one, outputs=other)))
        for one, other in product(*sides)
    )


def is_marked(start: Distribution) -> bool:
    """Whether more than an orthogonal matrix tells it: pairs, or zeros beside a tap."""
    mirror = start.mirror
    if mirror is None:
        return start.form == "tap"
    has_pairs = _has_pairs(mirror.inputs) or _has_pairs(mirror.outputs)
    taps = math.prod(tap.stop - tap.start for tap in mirror.taps)
    return has_pairs or taps < mirror.matrices.window_size


def _has_pairs(side: Side) -> bool:
    return bool((side.factors < 0).any())


def find_fault(weight: Weight, start: Distribution) -> tuple[str, str] | None:
    """The code of what is wrong, and a sentence; None if nothing is."""
    values = _values(weight)
    if start.form == "tap":
        is_right = np.allclose(values, _tapped(values, start), rtol=_TOLERANCE, atol=0)
        message = "Its filters are not one value at the tap, and zeros beside it."
        return None if is_right else ("form", message)
    mirror = start.mirror
    assert mirror is not None
    is_right = _is_mirrored(values, mirror)
    if not is_right.all():
        return "form", _where(np.argwhere(~is_right), mirror, values)
    folded = mirror.fold(values)
    ratio = _ratio(folded, start.scale)
    if _disorder(folded, ratio * start.scale) > _TOLERANCE:
        return "form", "The matrix between its pairs is not orthogonal."
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


def _is_mirrored(values: np.ndarray, mirror: Mirror) -> np.ndarray:
    """Of each value, whether it is as the first unit of its pair tells."""
    exact = values.astype(np.float64)
    slack = 1e-3 * np.abs(exact).max()
    return np.abs(exact - mirror.unfold(mirror.fold(values))) <= slack


def _ratio(matrices: list[np.ndarray], scale: float) -> float:
    """How many times as large as the start they are."""
    sizes = [min(each.shape) * scale**2 for each in matrices]
    return math.sqrt(sum((each * each).sum() for each in matrices) / sum(sizes))


def _disorder(matrices: list[np.ndarray], scale: float) -> float:
    """How far MᵀM / scale² moves a random vector, as a share of its length; the worst."""
    rng = np.random.Generator(np.random.PCG64(0))
    worst = 0.0
    for matrix in matrices:
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        vector = rng.standard_normal(tall.shape[1])
        moved = tall.T @ (tall @ vector) / scale**2 - vector
        worst = max(worst, float(np.linalg.norm(moved) / np.linalg.norm(vector)))
    return worst


def _where(wrong: np.ndarray, mirror: Mirror, values: np.ndarray) -> str:
    """The input, output or tap that fewest others share."""
    m = mirror.matrices
    for axis, tap in zip(m.window, mirror.taps, strict=True):
        outside = [at for at in wrong[:, axis] if not tap.start <= at < tap.stop]
        if outside:
            return f"Beside the tap it is not zero: at {int(outside[0])} of the window."
    names = [(axis, "output") for axis in m.outputs if _has_pairs(mirror.outputs)]
    names += [(axis, "input") for axis in m.inputs if _has_pairs(mirror.inputs)]
    axis, name = min(names, key=lambda each: len(np.unique(wrong[:, each[0]])))
    place = int(wrong[0, axis])
    return f"Not all pairs are opposite: {name} {place} is not the negative of its partner."
