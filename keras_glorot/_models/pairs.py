"""Units in pairs, z and -z, and where they stand after what is no kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._keras.graph import Graph, Step
from keras_glorot._keras.state import unmoved_generators
from keras_glorot._models.kernel_maps import channel_axis
from keras_glorot.layer_rules import is_normalization, layer_activation

__all__ = [
    "Effect",
    "Lost",
    "Pairs",
    "fitting_levels",
    "is_sum",
    "line",
    "measure_effect",
    "step_activation",
    "through",
]

tree: Any = keras.tree

# The stds of z that an activation can be given where f(z) - f(-z) is no multiple of z, as
# `benchmarks/evidence/depth.md` found them to train best. Far above its curve ELU is almost
# a ReLU; far below, tanh is almost a line.
LEVELS = 100.0, 0.3


class Lost(Exception):
    """Pairs can't be followed any further: says why."""


class Pairs(NamedTuple):
    """Which units of a tensor are pairs.

    Attributes:
        axis: The axis of the tensor on which the units stand.
        partner: Of each unit, the place of the one with the opposite weights; -1 for none.
        slope: Of each unit, the std of f(z) - f(-z), or of f(z) without a partner, for
            inputs of the kernel with a std of 1; 0 where it is not known.
    """

    axis: int
    partner: np.ndarray
    slope: np.ndarray

    @classmethod
    def neighbours(cls, axis: int, count: int, groups: int) -> Self:
        """Units 0 and 1, 2 and 3, ... of each group; the last of an odd number is alone."""
        size = count // groups
        partner = np.arange(count).reshape(groups, size)
        partner = partner + np.where(np.arange(size) % 2, -1, 1)
        if size % 2:
            partner[:, -1] = -1
        return cls(axis, partner.reshape(-1), np.ones(count))

    def merged(self, other: "Pairs") -> Self:
        """Both of them, where kernels have sent theirs to different units of a tensor."""
        new = other.slope != 0
        partner = np.where(new, other.partner, self.partner)
        return self._replace(partner=partner, slope=np.where(new, other.slope, self.slope))

    def repeated(self, copies: int) -> Self:
        """Where each unit becomes so many, one beside the other."""
        partner = np.repeat(self.partner, copies) * copies
        partner += np.tile(np.arange(copies), len(self.partner))
        partner[np.repeat(self.partner < 0, copies)] = -1
        return self._replace(partner=partner, slope=np.repeat(self.slope, copies))

    def separated(self) -> Self:
        """All units without a partner."""
        return self._replace(partner=np.full_like(self.partner, -1))

    def without_single(self) -> Self:
        """Not knowing those that have no partner."""
        return self._replace(slope=np.where(self.partner < 0, 0.0, self.slope))

    def times(self, factor: float | np.ndarray) -> Self:
        return self._replace(slope=self.slope * factor)

    def equals(self, other: "Pairs | None") -> bool:
        return other is not None and all(map(np.array_equal, self, other))


# Activations -----------------------------------------------------------------------------


class Effect(NamedTuple):
    """The effect of an activation f on a pair.

    Attributes:
        level: The std of z: 1 if f(z) - f(-z) = a z holds there, else the one of `LEVELS`
            where that is nearest.
        slope: The a, by the root mean square over normal z; half of it for an odd f.
        gain: The factor that makes up for f where a unit is alone: the root mean square of
            z over that of f(z), at the level or at 1, whichever is lower.
        is_odd: Whether f(-z) = -f(z), so that a pair is no more than one unit.
        is_idempotent: Whether f(f(z)) = f(z), as for ReLU.
    """

    level: float
    slope: float
    gain: float
    is_odd: bool
    is_idempotent: bool


def measure_effect(
    activation: Callable[[Any], Any], level: float | None = None
) -> Effect | None:
    """Measured, so that it holds for any activation; None if it mixes units or fails."""
    try:
        with unmoved_generators():
            return backends.outside_traces(_measure_effect, activation, level)
    except Exception:  # from a function of the user: anything
        return None


def fitting_levels(activations: Sequence[Any], stds: np.ndarray) -> np.ndarray:
    """The levels of the activations along a chain, if its stds jump where these do, as
    after the isometric start; else ones."""
    by_id = {id(each): each for each in activations}
    if len(by_id) < 2:  # most chains: nothing to measure
        return np.ones(len(activations))
    effects = {key: each and measure_effect(each) for key, each in by_id.items()}
    known = [effects[id(each)] for each in activations]
    levels = np.array([each.level if each else 1.0 for each in known])
    differ = (levels != levels[:1]).any() and ((stds > 0) & (stds < math.inf)).all()
    fits = differ and _unevenness(stds / levels) < _unevenness(stds)
    return levels if fits else np.ones(len(levels))


def _unevenness(stds: np.ndarray) -> float:
    """How much the steps of the logarithms differ."""
    return float(np.var(np.diff(np.log(stds))))


_POINTS = np.linspace(0.01, 4, 201)
_DENSITY = np.exp(-(_POINTS**2) / 2)


def _measure_effect(activation: Callable[[Any], Any], level: float | None) -> Effect | None:
    def f(values: np.ndarray) -> np.ndarray:
        tensor = activation(keras.ops.convert_to_tensor(values, "float32"))
        return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)

    points = _POINTS.astype(np.float32)
    up, down = f(points), f(-points)
    mixes = not np.allclose(f(points[::2]), up[::2], atol=1e-6)
    if mixes or not np.isfinite([up, down]).all() or not (up - down).any():
        return None
    if level is None:
        levels = [1.0] if _line(f, 1.0)[1] == 0 else LEVELS
        level = min(levels, key=lambda each: _line(f, each)[1])
    slope, _ = _line(f, level)
    is_odd = bool(np.allclose(up, -down, rtol=1e-4, atol=1e-6))
    return Effect(
        level,
        _rounded(slope / 2 if is_odd else slope),
        _rounded(_gain(f, min(level, 1.0))),
        is_odd,
        all(np.allclose(f(each), each, atol=1e-6) for each in (up, down)),
    )


def _rounded(number: float) -> float:
    # Backends compute tanh and the like to 1e-7 of each other; weights must be equal.
    return float(f"{number:.7g}")


def _line(f: Callable[[np.ndarray], np.ndarray], level: float) -> tuple[float, float]:
    """The a of f(z) - f(-z) = a z at a std of z, and the error of that as a share."""
    z = (level * _POINTS).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        y = f(z) - f(-z)
    slopes = y / z
    if np.allclose(slopes, slopes[-1], rtol=1e-3):
        return float(slopes[-1]), 0.0
    yy, yz, zz = (float(_DENSITY @ each) for each in (y * y, y * z, z * z))
    error = 1 - yz**2 / (yy * zz) if 0 < yy < math.inf else math.inf
    return math.sqrt(yy / zz), error


def _gain(f: Callable[[np.ndarray], np.ndarray], std: float) -> float:
    """The root mean square of z, of this std, over that of f(z)."""
    z = (std * _POINTS).astype(np.float32)
    return math.sqrt(2 * _DENSITY @ (z * z) / (_DENSITY @ (f(z) ** 2 + f(-z) ** 2)))


def step_activation(operation: Any) -> Callable[[Any], Any] | None:
    """The function of a step that acts on each value alone; None of any other step."""
    if isinstance(operation, keras.Layer):
        found: Any = layer_activation(operation)
        return None if found is keras.activations.linear else found
    name = type(operation).__name__
    spelled = "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
    is_known = hasattr(keras.activations, spelled) or name in _WAVES
    return operation.call if is_known else None


# Other steps between kernels -------------------------------------------------------------

# By the names of the classes: layers and operations of one name do the same.
_KEEP_ALL = {
    "ActivityRegularization",
    "AlphaDropout",
    "Cast",
    "ConvertToTensor",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "Identity",
    "Masking",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "StopGradient",
}
_KEEP_CHANNELS = (
    "AdaptiveAveragePooling",
    "AdaptiveMaxPooling",
    "AveragePooling",
    "Cropping",
    "GlobalAveragePooling",
    "GlobalMaxPooling",
    "MaxPooling",
    "UpSampling",
    "ZeroPadding",
)
_MOVE = {
    "ExpandDims",
    "Flatten",
    "GetItem",
    "Moveaxis",
    "Permute",
    "Ravel",
    "Reshape",
    "Squeeze",
    "Swapaxes",
    "Transpose",
}
_REDUCE = {"Max", "Mean", "Sum"}
_WAVES = {"Cos", "Sin"}
_SUMS = {"Add", "Average", "Subtract"}
_PRODUCTS = {"Divide", "Multiply", "TrueDivide"}
_LINES = {"Negative", "Rescaling", *_SUMS, *_PRODUCTS}


def through(step: Step, graph: Graph, number: int, pairs: Pairs) -> Pairs:
    """Where the pairs of a tensor stand after a step that is no kernel and no activation.

    Raises:
        Lost: If that is not known.
    """
    operation = step.operation
    name = type(operation).__name__
    if name in _KEEP_ALL or layer_activation(operation) is keras.activations.linear:
        return pairs
    if name.startswith(_KEEP_CHANNELS):
        return _through_channels(step, graph, pairs)
    if name in _MOVE:
        return _through_move(step, graph, pairs)
    if name in _REDUCE:
        return _through_reduction(step, graph, pairs)
    if name == "Concatenate":
        return _through_concatenation(step, graph, number, pairs)
    if isinstance(operation, keras.Layer) and is_normalization(operation):
        raise Lost("a normalization layer follows")
    if is_sum(step):
        raise Lost("its output is added to another one")
    if name in _PRODUCTS and _has_two_inputs(step):
        raise Lost("its output is multiplied by another one")
    if name in _LINES:
        return _through_line(step, graph, pairs)
    raise Lost(f"{operation.name} follows, which mixes units or is not known")


def _through_channels(step: Step, graph: Graph, pairs: Pairs) -> Pairs:
    source, target = (graph.tensors[ends[0]].shape for ends in (step.inputs, step.outputs))
    if pairs.axis != channel_axis(step.operation, len(source)):
        raise Lost(f"{step.operation.name} follows, which mixes units")
    is_last = pairs.axis == len(source) - 1
    return pairs._replace(axis=len(target) - 1 if is_last else pairs.axis)


def _through_reduction(step: Step, graph: Graph, pairs: Pairs) -> Pairs:
    """A mean, a sum or a maximum of positions, as pooling has it."""
    rank, axis = len(graph.tensors[step.inputs[0]].shape), step.operation.axis
    axes = range(rank) if axis is None else np.ravel(axis) % rank
    if pairs.axis in axes or 0 in axes:
        raise Lost(f"{step.operation.name} follows, which mixes units or examples")
    gone = 0 if step.operation.keepdims else sum(each < pairs.axis for each in axes)
    return pairs._replace(axis=pairs.axis - gone)


def is_sum(step: Step) -> bool:
    """Of two tensors that depend on the input, at least."""
    return type(step.operation).__name__ in _SUMS and _has_two_inputs(step)


def _has_two_inputs(step: Step) -> bool:
    return len(set(step.inputs)) > 1


def _through_line(step: Step, graph: Graph, pairs: Pairs) -> Pairs:
    name, found = step.operation.name, line(step, graph)
    if found is None:
        raise Lost(f"{name} follows, which is no multiple, or has a weight")
    size = len(pairs.partner)
    rows = [np.moveaxis(each, pairs.axis, -1).reshape(-1, size) for each in found]
    for row in rows:
        other = np.where(pairs.partner < 0, row[0], row[0][pairs.partner])
        if (row != row[0]).any() or (row[0] != other).any():
            raise Lost(f"{name} follows, with other numbers for other units or positions")
    return pairs.times(rows[0][0])


def line(step: Step, graph: Graph) -> tuple[np.ndarray, np.ndarray] | None:
    """The factor and the constant by which a step makes a x + b of each value x.

    None if it does anything else.
    """
    arguments = tree.flatten(step.arguments)
    has_weight = any(isinstance(each, keras.Variable) for each in arguments)
    if type(step.operation).__name__ not in _LINES or _has_two_inputs(step) or has_weight:
        return None
    shape = graph.tensors[step.inputs[0]].shape
    shape = (1, *(size or 1 for size in shape[1:]))

    def at(value: float) -> np.ndarray:
        def fill(each: Any) -> Any:
            is_input = isinstance(each, keras.KerasTensor)
            return keras.ops.full(shape, value, each.dtype) if is_input else each

        args, kwargs = tree.map_structure(fill, step.arguments)
        filled = step.operation.call(*args, **kwargs)
        return np.asarray(keras.ops.convert_to_numpy(filled), np.float64)

    try:
        none, one, two = (backends.outside_traces(at, value) for value in (0, 1, 2))
    except Exception:  # a division of integers, say
        return None
    factor = one - none
    is_line = np.allclose(two - one, factor) and np.isfinite(factor).all() and factor.all()
    return (factor, none) if is_line and factor.shape == shape else None


def _through_concatenation(step: Step, graph: Graph, number: int, pairs: Pairs) -> Pairs:
    shapes = [graph.tensors[each].shape for each in step.inputs]
    if step.operation.axis % len(shapes[0]) != pairs.axis:
        raise Lost(f"{step.operation.name} puts other positions beside its output")
    size = sum(shape[pairs.axis] for shape in shapes)
    partner, slope, start = np.full(size, -1), np.zeros(size), 0
    for each, shape in zip(step.inputs, shapes, strict=True):
        part = slice(start, start + shape[pairs.axis])
        if each == number:
            partner[part] = np.where(pairs.partner < 0, -1, pairs.partner + start)
            slope[part] = pairs.slope
        start = part.stop
    return Pairs(pairs.axis, partner, slope)


def _through_move(step: Step, graph: Graph, pairs: Pairs) -> Pairs:
    """By doing it with the places of the units in place of their values."""
    name, (args, kwargs) = step.operation.name, step.arguments
    source, target = (graph.tensors[ends[0]].shape for ends in (step.inputs, step.outputs))
    sizes = source[1:]
    if None in (*sizes, *target[1:]):
        raise Lost(f"{name} follows, and not all sizes are known")
    places = np.arange(math.prod(sizes)).reshape(sizes)

    def move() -> np.ndarray:
        batch = keras.ops.convert_to_tensor(np.broadcast_to(places, source), "int32")
        moved = step.operation.call(batch, *args[1:], **kwargs)
        return np.asarray(keras.ops.convert_to_numpy(moved))

    try:
        came_from = backends.outside_traces(move)[0].reshape(target[1:])
    except Exception:  # it moves examples as well
        raise Lost(f"{name} follows, which mixes examples") from None
    goes_to = np.full(places.size, -1)
    goes_to[came_from] = np.arange(came_from.size).reshape(came_from.shape)
    if np.count_nonzero(goes_to >= 0) < came_from.size:
        raise Lost(f"{name} follows, which repeats units or mixes examples")
    axis = pairs.axis - 1
    steps = np.where(pairs.partner < 0, 0, pairs.partner - np.arange(sizes[axis]))
    ahead = _along(steps * math.prod(sizes[axis + 1 :]), axis, sizes)
    partner = goes_to[came_from + ahead[came_from]]
    if (partner < 0).any():
        raise Lost(f"{name} follows, which leaves out one unit of a pair")
    partner[ahead[came_from] == 0] = -1
    return _on_one_axis(partner, _along(pairs.slope, axis, sizes)[came_from], name)


def _along(values: np.ndarray, axis: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Values along one axis, for each place of a tensor in row-major order."""
    wide = [-1 if each == axis else 1 for each in range(len(sizes))]
    return np.broadcast_to(values.reshape(wide), sizes).reshape(-1)


def _on_one_axis(partner: np.ndarray, slope: np.ndarray, name: str) -> Pairs:
    """The axis on which units and partners stand, alike at all positions."""
    sizes = partner.shape
    here = np.indices(sizes)
    there = np.array(np.unravel_index(np.maximum(partner, 0), sizes))
    there = np.where(partner < 0, here, there)
    for axis in reversed(range(len(sizes))):
        others = [each for each in range(len(sizes)) if each != axis]
        local = np.where(partner < 0, -1, there[axis])
        rows, slopes = (
            np.moveaxis(each, axis, -1).reshape(-1, sizes[axis]) for each in (local, slope)
        )
        stays = np.array_equal(there[others], here[others])
        if stays and (rows == rows[0]).all() and (slopes == slopes[0]).all():
            return Pairs(axis + 1, rows[0], slopes[0])
    raise Lost(f"{name} follows, which puts partners apart, or units that differ together")
