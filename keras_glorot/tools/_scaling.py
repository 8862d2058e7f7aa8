"""Passes over a model in which each kernel is scaled as its layer is called.

The layers are called one after the other, so in one pass each kernel can be given the
factor that its output needs, whatever came before it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._keras.graph import replaced_attribute
from keras_glorot._models.kernels import Flow
from keras_glorot._models.passes import (
    Batch,
    Tap,
    Tensor,
    differentiator,
    intercepted_call,
    is_float,
    moments,
)
from keras_glorot._models.survey import Survey, Weight

__all__ = ["ScaledLayer", "ScalingPass", "ScalingPasses", "find_scaled_layers", "scaled"]

ops: Any = keras.ops
tree: Any = keras.tree

# No hidden kernel is scaled beyond this gain, the std of its output over the root mean
# square of its input. Behind GELU and SiLU a low level needs 2; a kernel that would need
# more makes up for something else, such as an embedding with small values. Behind a mean
# over positions none is needed: that makes less of what differs between them, as is meant.
_LARGEST_GAIN, _GAIN_OF_MEANS = 2.5, 1.0
# What all branches together add to a residual sum. Behind it the sum has 1.12 times the
# std that it starts with, and the gradient grows as little.
_SHARE_OF_BRANCHES = 0.5
# An output follows its kernels if it changes as they do, to this share.
_FOLLOWS = 0.02


class ScaledLayer(NamedTuple):
    """A layer whose kernels are scaled: its output, before the activation, is measured.

    Attributes:
        path: The path of its kernels' owner.
        layer: The layer that is called.
        owner: The one that has the kernels: the same, or the one inside a TimeDistributed.
        kernels: Its kernels.
        share: The std that its output is to have, in units of the level. None where its
            kernels keep their own scale, as far as its root mean square is at most 1.
        largest_gain: Beyond which they are not scaled.
        is_affine: Whether its output is known to be `activation(kernel * x + bias)`.
        has_bias: Whether it has a bias that is not zero.
    """

    path: str
    layer: Any
    owner: Any
    kernels: tuple[Weight, ...]
    share: float | None
    largest_gain: float
    is_affine: bool
    has_bias: bool


def find_scaled_layers(
    survey: Survey, selected: set[int], flow: Flow
) -> tuple[list[ScaledLayer], list[tuple[Weight, str]]]:
    """The layers that may be scaled, and the weights that may not, with the reason."""
    by_owner: dict[int, list[Weight]] = {}
    left = []
    for weight in survey.weights:
        is_float = keras.backend.is_float_dtype(weight.variable.dtype)
        if weight.fans is None or not is_float or id(weight.owner) not in selected:
            continue
        reason = _reason_to_leave(weight, survey, flow)
        if reason:
            left.append((weight, reason))
        else:
            by_owner.setdefault(id(weight.owner), []).append(weight)
    ends = {id(layer) for layer in flow.ends()}
    found = [_scaled_layer(each, survey, flow, ends) for each in by_owner.values()]
    return found, left


def _scaled_layer(
    kernels: list[Weight], survey: Survey, flow: Flow, ends: set[int]
) -> ScaledLayer:
    owner: Any = kernels[0].owner
    layer = survey.loops.get(id(owner), owner)
    is_end = id(layer) in ends
    share = _SHARE_OF_BRANCHES / math.sqrt(len(ends)) if is_end else 1.0
    is_bounded = isinstance(layer, keras.layers.RNN) or flow.feeds_gate(layer)
    if is_bounded or (flow.is_head(layer) and not is_end):
        share = None
    bias = getattr(owner, "bias", None)
    return ScaledLayer(
        kernels[0].path.rpartition("/")[0],
        layer,
        owner,
        tuple(kernels),
        share,
        (share or 1.0) * (_GAIN_OF_MEANS if flow.takes_means(layer) else _LARGEST_GAIN),
        layer is owner and _is_affine(owner),
        bias is not None and bool(backends.values(bias).any()),
    )


def _reason_to_leave(weight: Weight, survey: Survey, flow: Flow) -> str:
    """Why a weight with fans is not scaled; "" if it is."""
    owner, constraint = weight.owner, weight.variable.constraint
    loop = survey.loops.get(id(owner))
    if weight.reason:
        return weight.reason
    if "recurrent" in weight.variable.name:
        return "a recurrent kernel: repeated multiplication decides over its scale"
    if "embedding" in weight.variable.name:
        return "an embedding: it has no sum to keep"
    if weight.distribution is not None and weight.distribution.form == "constant":
        return "it was made constant on purpose"
    if not weight.is_kernel:
        return "its layer does not say that it is a kernel"
    if not weight.variable.trainable:
        return "it is frozen"
    if not backends.values(weight.variable).any():
        return "all its values are zero"
    if constraint is not None and not isinstance(constraint, keras.constraints.NonNeg):
        return "its constraint sets its scale after each step of training"
    if owner is flow.stem:
        return "a learned table, such as of positions, is added to its output"
    if flow.feeds_wave(loop or owner) and weight.is_scale_chosen:
        return "its author chose its scale for the periodic activation that follows"
    if isinstance(loop, keras.layers.RNN) and _input_kernel(loop) is not weight.variable:
        return "it is used inside a loop, which can't be looked into"
    return ""


_CELLS = (keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)


def _input_kernel(layer: Any) -> keras.Variable | None:
    """The kernel that a recurrent layer multiplies its input with."""
    return layer.cell.kernel if isinstance(layer, _CELLS) else None


class ScalingPass(NamedTuple):
    """What one pass saw: arrays over the layers; of several calls, the mean.

    Attributes:
        signal: Log std of the output; nan where not called.
        gradient: Log of the length of the gradient there; -inf where none comes.
        likeness: The mean cosine between examples; nan where it can't be told.
        share: The part of the gradient that it gets of what passes by.
        factors: What its kernels were multiplied with.
        follows: Whether its output changes with its kernels.
        order: The layers in order of their first call.
        is_finite: Whether all of it is, and the objective.
    """

    signal: np.ndarray
    gradient: np.ndarray
    likeness: np.ndarray
    share: np.ndarray
    factors: np.ndarray
    follows: np.ndarray
    order: list[int]
    is_finite: bool


class ScalingPasses:
    """Passes over a model, all by one program: on a batch, at a level or with factors."""

    def __init__(self, survey: Survey, layers: list[ScaledLayer], training: bool):
        self.survey, self.layers, self.training = survey, layers, training
        self.differentiate = differentiator(self._run)
        self.unseen: list[keras.Layer] = []
        self.passes = 0

    def __call__(
        self,
        batch: Batch,
        level: float = 1.0,
        aims: np.ndarray | None = None,
        factors: np.ndarray | None = None,
    ) -> ScalingPass:
        """One pass: scaled to these stds of the outputs, or with factors, or as it is.

        The level is that of the hidden kernels, which heads need not make up for.
        """
        self.passes += 1
        self.batch = batch
        wanted = np.zeros(len(self.layers)) if aims is None else aims
        held = [wanted.astype(np.float32), np.float32(level)]
        return self._collect(
            *self.differentiate(
                self._values(factors), batch.x, batch.y, *map(ops.convert_to_tensor, held)
            )
        )

    def _values(self, factors: np.ndarray | None) -> list[Tensor]:
        changed: dict[int, Tensor] = {}
        factors = np.ones(len(self.layers)) if factors is None else factors
        for layer, factor in zip(self.layers, factors, strict=True):
            for weight in layer.kernels if factor != 1 else ():
                value: Any = weight.variable.value
                power = float(factor) ** (1 / len(layer.kernels))
                changed[id(weight.variable)] = value * ops.cast(power, value.dtype)
        variables = self.survey.root.variables
        return [changed.get(id(each), each.value) for each in variables]

    @contextlib.contextmanager
    def _run(
        self, tap: Tap, values: list[Tensor], x: Any, y: Any, aims: Tensor, level: Tensor
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        scope = keras.StatelessScope(zip(self.survey.root.variables, values, strict=True))
        batch = self.batch._replace(x=x, y=y)
        self.latest = _OnePass(scope, tap, aims, level, batch.size)
        wrappers = self.latest.wrappers(self.layers)
        call = intercepted_call(batch, self.survey, x, wrappers, self.training)
        with scope, call as (outputs, self.unseen):
            objective = batch.objective(outputs)
            yield objective, self.latest.extras(objective, len(self.layers))

    def _collect(self, signals: list[Any], extras: list[np.ndarray]) -> ScalingPass:
        """From calls to layers."""
        stds, likenesses, factors, follows, objective = extras
        calls = self.latest.calls
        stds = stds.astype(np.float64)
        lengths = np.array(
            [
                math.nan if c.position is None else signals[c.position].gradient * c.root
                for c in calls
            ]
        )
        # By Euler's theorem this is the same all along a chain, whatever the factors.
        passing = np.nan_to_num(stds * lengths)
        before = np.maximum.accumulate(passing)
        behind = np.maximum.accumulate(passing[::-1])[::-1]
        shares = passing / np.maximum(np.minimum(before, behind), 1e-300)
        count = len(self.layers)
        signal, likeness = np.full(count, math.nan), np.full(count, math.nan)
        gradient, share = np.full(count, -math.inf), np.zeros(count)
        order = list(dict.fromkeys(call.layer for call in calls))
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in order:
                mine = [k for k, call in enumerate(calls) if call.layer == i]
                signal[i] = np.log(stds[mine]).mean()
                gradient[i] = np.log(np.nan_to_num(lengths[mine])).mean()
                likeness[i] = likenesses[mine].mean()
                share[i] = shares[mine].max()
        return ScalingPass(
            signal,
            gradient,
            likeness,
            share,
            factors.astype(np.float64),
            follows > 0,
            order,
            bool(np.isfinite(objective) and np.isfinite(stds).all()),
        )


class _LayerCall(NamedTuple):
    layer: int
    std: Tensor  # of the output
    likeness: Tensor
    position: int | None  # where its gradient is
    root: float  # of the number of its values


class _OnePass:
    """The calls of one pass."""

    def __init__(self, scope: Any, tap: Tap, aims: Tensor, level: Tensor, examples: int):
        self.scope, self.tap, self.examples = scope, tap, examples
        self.aims, self.level = aims, level
        self.calls: list[_LayerCall] = []
        self.factors: dict[int, Tensor] = {}
        self.follows: dict[int, Tensor] = {}

    def extras(self, objective: Tensor, count: int) -> list[Tensor]:
        """The numbers of the pass: of the calls, of the layers, and the objective."""
        one, calls = ops.ones(()), self.calls
        return [
            ops.stack([call.std for call in calls] or [one])[: len(calls)],
            ops.stack([call.likeness for call in calls] or [one])[: len(calls)],
            ops.stack([self.factors.get(i, one) for i in range(count)]),
            ops.stack([self.follows.get(i, one) for i in range(count)]),
            ops.cast(objective, "float32"),
        ]

    def wrappers(self, layers: list[ScaledLayer]) -> dict[int, Callable]:
        """What stands for `call` of each layer."""
        wrappers: dict[int, Callable] = {}
        for i, each in enumerate(layers):
            is_loop = isinstance(each.layer, keras.layers.RNN)
            call = self._call_recurrent if is_loop else self._call_layer
            wrappers[id(each.layer)] = functools.partial(call, i, each)
        return wrappers

    def _call_recurrent(self, i, layer, call, *args: Any, **kwargs: Any) -> Any:
        """Nothing inside the loop is seen, but what it multiplies its input with is."""
        inputs = _first_float((args, kwargs))
        value: Any = self.scope.get_current_value(layer.kernels[0].variable)
        z = ops.matmul(ops.cast(inputs, value.dtype), value)
        is_first = i not in self.factors
        factor = self._factor(i, layer, inputs, z)
        z = z * ops.cast(factor, z.dtype) if is_first else z
        self._note(i, z, None)
        return call(*args, **kwargs)

    def _call_layer(self, i, layer, call, *args: Any, **kwargs: Any) -> Any:
        activation = getattr(layer.owner, "activation", None)
        activation = activation if callable(activation) else keras.activations.linear
        is_first = i not in self.factors
        with self._bare(layer.owner):
            z = _first_float(call(*args, **kwargs))
            if z is not None and is_first:
                factor = self._factor(i, layer, _first_float((args, kwargs)), z)
                if layer.is_affine:
                    z = z * ops.cast(factor, z.dtype)
                else:
                    z = self._follow(i, layer, z, _first_float(call(*args, **kwargs)))
        if z is None:
            return call(*args, **kwargs)
        if layer.is_affine and not layer.has_bias:
            return activation(self._tap(i, z, z))  # no need to call the layer again
        return self._call_again(i, layer, activation, z, call, *args, **kwargs)

    def _call_again(self, i, layer, activation, bare, call, *args: Any, **kwargs: Any):
        """With the scaled kernels, tapping what goes into the activation.

        `bare` is the output without bias and activation.
        """
        tapped: list[Tensor] = []

        def tapping(z: Tensor, *rest: Any, **options: Any) -> Tensor:
            if not tapped:
                tapped.append(z)
                z = self._tap(i, z, bare)
            return activation(z, *rest, **options)

        with self._activation(layer.owner, tapping):
            outputs = call(*args, **kwargs)
        if tapped:
            return outputs
        tensors = tree.flatten(outputs)
        position = next(k for k, tensor in enumerate(tensors) if is_float(tensor))
        tensors[position] = self._tap(i, tensors[position], bare)
        return tree.pack_sequence_as(outputs, tensors)

    def _tap(self, i: int, z: Tensor, bare: Tensor) -> Tensor:
        def size(gradient: np.ndarray) -> float:
            return math.hypot(*moments(gradient))

        tapped, position = self.tap(z, None, size)
        self._note(i, bare, position)
        return tapped

    def _note(self, i: int, z: Tensor, position: int | None) -> None:
        root = math.sqrt(math.prod(z.shape))
        likeness = _likeness(z, self.examples)
        self.calls.append(_LayerCall(i, _std(z), likeness, position, root))

    def _factor(self, i: int, layer: ScaledLayer, inputs: Any, z: Tensor) -> Tensor:
        """The factor that the output of the layer's first call needs."""
        if i in self.factors:
            return self.factors[i]
        std = _std(z)
        safe = ops.where(std > 0, std, 1.0)
        if layer.share is None:
            # It makes up for a low level, and for nothing else.
            size = _size(z)
            wanted = ops.minimum(1 / self.level, 1 / ops.where(size > 0, size, 1.0))
        else:
            wanted = self.aims[i] / safe
            if inputs is not None:
                most = ops.maximum(1.0, layer.largest_gain * _size(inputs) / safe)
                wanted = ops.minimum(wanted, most)
        is_scaled = ops.logical_and(std > 0, self.aims[i] > 0)
        self._scale(i, layer, ops.where(is_scaled, wanted, 1.0))
        return self.factors[i]

    def _follow(self, i: int, layer: ScaledLayer, bare: Tensor, again: Any) -> Tensor:
        """The output, with the factor taken back if the output did not follow it."""
        factor = self.factors[i]
        std, expected = _std(again), _std(bare) * factor
        follows = ops.abs(std - expected) <= _FOLLOWS * expected
        self._scale(i, layer, ops.where(follows, 1.0, 1 / factor))
        self.factors[i] = ops.where(follows, factor, 1.0)
        self.follows[i] = ops.cast(follows, "float32")
        return ops.where(follows, again, bare)

    def _scale(self, i: int, layer: ScaledLayer, factor: Tensor) -> None:
        self.factors[i] = factor
        for weight in layer.kernels:
            value: Any = self.scope.get_current_value(weight.variable)
            power = ops.cast(factor ** (1 / len(layer.kernels)), value.dtype)
            self.scope.add_update((weight.variable, value * power))

    @contextlib.contextmanager
    def _bare(self, owner: Any) -> Iterator[None]:
        """The layer without bias and activation."""
        biases = [weight for weight in owner.weights if weight.name == "bias"]
        held = [(bias, self.scope.get_current_value(bias)) for bias in biases]
        for bias, value in held:
            self.scope.add_update((bias, ops.zeros_like(value)))
        try:
            with self._activation(owner, keras.activations.linear):
                yield
        finally:
            for update in held:
                self.scope.add_update(update)

    def _activation(self, owner: Any, function: Callable) -> Any:
        if callable(getattr(owner, "activation", None)):
            return replaced_attribute(owner, "activation", function)
        return contextlib.nullcontext()


_AFFINE = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def _is_affine(layer: Any) -> bool:
    """Whether its output is known to be `activation(kernel * x + bias)`.

    A subclass can do anything with its kernel, and LoRA adds another one.
    """
    has_lora = getattr(layer, "lora_enabled", False)
    return type(layer) in _AFFINE and not has_lora and layer.quantization_mode is None


def _first_float(structure: Any) -> Tensor | None:
    tensors = tree.flatten(structure)
    return next((t for t in tensors if is_float(t) and math.prod(t.shape)), None)


def _std(tensor: Tensor) -> Tensor:
    """In float32, and scaled so that squares neither vanish nor overflow."""
    values, scale = _scaled_to_one(tensor)
    return ops.std(values) * scale


def _size(tensor: Tensor) -> Tensor:
    """The root mean square."""
    values, scale = _scaled_to_one(tensor)
    return ops.sqrt(ops.mean(values * values)) * scale


def _likeness(tensor: Tensor, examples: int) -> Tensor:
    """The mean cosine between two examples, as `passes.likeness` has it; nan if unknown."""
    if tensor.shape[0] != examples:
        return ops.ones(()) * math.nan
    rows = ops.reshape(_scaled_to_one(tensor)[0], (examples, -1))
    lengths = ops.sqrt(ops.sum(rows * rows, axis=1, keepdims=True))
    total = ops.sum(rows / ops.where(lengths > 0, lengths, 1.0), axis=0)
    count = ops.sum(ops.cast(lengths > 0, "float32"))
    return (ops.sum(total * total) - count) / (count * (count - 1))


def _scaled_to_one(tensor: Tensor) -> tuple[Tensor, Tensor]:
    values = ops.cast(ops.stop_gradient(tensor), "float32")
    scale = ops.max(ops.abs(values))
    scale = ops.where(scale > 0, scale, 1.0)
    return values / scale, scale


def scaled(layer: ScaledLayer, factor: float, values: np.ndarray) -> np.ndarray:
    """A part of a kernel times its share of the layer's factor."""
    share = float(factor) ** (1 / len(layer.kernels))
    wide = values.astype(np.promote_types(values.dtype, np.float32)) * share
    return wide.astype(values.dtype)
