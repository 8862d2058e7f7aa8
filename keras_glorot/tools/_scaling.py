"""Passes over a model in which each kernel is scaled as its layer is called.

The layers are called one after the other, so in one pass each kernel can be given the
factor that its output needs, whatever came before it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._backends.signals import Outcome, Signal, Tap, Tensor, is_float
from keras_glorot._keras.graph import replaced_attribute
from keras_glorot._models.kernels import Flow
from keras_glorot._models.passes import Batch, Recorder, likeness, moments
from keras_glorot._models.survey import Survey, Weight

__all__ = ["ScaledLayer", "ScalingPass", "ScalingPasses", "find_scaled_layers", "scaled"]

ops: Any = keras.ops
tree: Any = keras.tree
numpy: Any = backends.numpy
_linear = keras.activations.linear

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
        is_told: Whether signal and gradient are told from it. Not where its output is what
            branches are added to: its gradient is that of all of them.
        leads_on: Whether other kernels take its output, which the model returns, too.
        is_affine: Whether its output is known to be `activation(kernel * x + bias)`.
        own_level: What the level is multiplied by: after the isometric start, the level
            that it has for the activation.
    """

    path: str
    layer: Any
    owner: Any
    kernels: tuple[Weight, ...]
    share: float | None
    largest_gain: float
    is_told: bool
    leads_on: bool
    is_affine: bool
    own_level: float = 1.0


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
    return ScaledLayer(
        kernels[0].path.rpartition("/")[0],
        layer,
        owner,
        tuple(kernels),
        share,
        (share or 1.0) * (_GAIN_OF_MEANS if flow.takes_means(layer) else _LARGEST_GAIN),
        share is not None and (is_end or not flow.is_added(layer)),
        flow.is_head(layer) and flow.leads_on(layer),
        layer is owner and _is_affine(owner),
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
        self.survey, self.layers = survey, layers
        self.recorder = Recorder(survey, training, self._start, self._finish)
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
        # Apart, not as one array: XLA then sees that layers of a kind need the same code.
        wanted = [0.0] * len(self.layers) if aims is None else aims
        numbers = [np.float32(each) for each in (level, *wanted)]
        values = None if factors is None else self._values(factors)
        return self._collect(*self.recorder(batch, *numbers, values=values))

    def _values(self, factors: np.ndarray) -> list[Tensor]:
        values: dict[int, Any] = {id(each): each.value for each in self.recorder.variables}
        for layer, factor in zip(self.layers, factors, strict=True):
            for weight in layer.kernels if factor != 1 else ():
                key = id(weight.variable)
                values[key] = _product(values[key], factor ** (1 / len(layer.kernels)))
        return list(values.values())

    def _start(
        self, tap: Tap, scope: Any, x: Any, level: Any, *aims: Any
    ) -> tuple[Any, dict[int, Callable]]:
        describe = functools.partial(_std_and_likeness, self.recorder.batch.size)
        tapped = functools.partial(tap, of_value=describe, of_gradient=_length)
        self.latest = _Scaler(self.layers, tapped, scope, aims, level)
        return x, self.latest.wrappers()

    def _finish(self, batch: Batch, outputs: Any) -> Outcome:
        objective = batch.objective(outputs)
        factors = [self.latest.factors.get(i, 1) for i in range(len(self.layers))]
        both = numpy.stack(list(map(numpy.float32, factors)))
        return objective, [both, ops.cast(objective, "float32")]

    def _collect(self, factors: np.ndarray, objective: np.ndarray) -> ScalingPass:
        """From calls to layers."""
        calls = np.array([layer for layer, _ in self.latest.calls], int)
        seen = [signal for _, signal in self.latest.calls]
        stds = np.array([each.value[0] for each in seen])
        likenesses = np.array([each.value[1] for each in seen], float)
        lengths = np.nan_to_num([each.gradient for each in seen])
        # By Euler's theorem this is the same all along a chain, whatever the factors.
        passing = np.nan_to_num(stds * lengths)
        before = np.maximum.accumulate(passing)
        behind = np.maximum.accumulate(passing[::-1])[::-1]
        shares = passing / np.maximum(np.minimum(before, behind), 1e-300)
        count = len(self.layers)
        signal, likeness = np.full(count, math.nan), np.full(count, math.nan)
        gradient, share = np.full(count, -math.inf), np.zeros(count)
        order = list(dict.fromkeys(calls.tolist()))
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in order:
                mine = calls == i
                signal[i] = np.log(stds[mine]).mean()
                gradient[i] = np.log(lengths[mine]).mean()
                likeness[i] = likenesses[mine].mean()
                share[i] = shares[mine].max()
        return ScalingPass(
            signal,
            gradient,
            likeness,
            share,
            np.nan_to_num(factors.astype(np.float64), nan=1.0),
            ~np.isnan(factors),
            order,
            bool(np.isfinite(objective) and np.isfinite(stds).all()),
        )


class _Scaler:
    """Scales the kernels of one pass as their layers are called, and taps the outputs.

    Numbers are NumPy's, or those of the program that JAX traces.
    """

    def __init__(
        self,
        layers: list[ScaledLayer],
        tap: Callable,
        scope: Any,
        aims: Sequence[Any],
        level: Any,
    ):
        self.layers, self.tap, self.scope = layers, tap, scope
        self.aims, self.level = aims, level
        self.calls: list[tuple[int, Signal]] = []  # of which layer
        self.factors: dict[int, Any] = {}  # nan where the output does not follow

    def wrappers(self) -> dict[int, Callable]:
        """What stands for `call` of each layer."""
        wrappers: dict[int, Callable] = {}
        for i, each in enumerate(self.layers):
            is_loop = isinstance(each.layer, keras.layers.RNN)
            call = self._call_recurrent if is_loop else self._call_layer
            wrappers[id(each.layer)] = functools.partial(call, i, each)
        return wrappers

    def _call_recurrent(self, i, layer, call, *args: Any, **kwargs: Any) -> Any:
        """Nothing inside the loop is seen, but what it multiplies its input with is."""
        inputs = _first_float((args, kwargs))
        kernel: Any = self.scope.get_current_value(layer.kernels[0].variable)
        z = ops.matmul(ops.cast(inputs, kernel.dtype), kernel)
        self._tap(i, self._scale(i, layer, (args, kwargs), z))
        return call(*args, **kwargs)

    def _call_layer(self, i, layer, call, *args: Any, **kwargs: Any) -> Any:
        with self._without_bias(layer.owner), _activation(layer.owner, _linear):
            bare = z = _first_float(call(*args, **kwargs))
            if z is not None and i not in self.factors:
                z = self._scale(i, layer, (args, kwargs), z)
                if not layer.is_affine and i in self.factors:
                    self._check_follows(i, layer, bare, _first_float(call(*args, **kwargs)))
        if z is None:
            return call(*args, **kwargs)
        if layer.is_affine:  # no need to call it again
            return _activated(layer.owner, self._tap(i, z))
        return self._call_tapped(i, layer, call, *args, **kwargs)

    def _call_tapped(self, i, layer, call, *args: Any, **kwargs: Any) -> Any:
        """Taps what goes into the activation or, where that is not seen, the output."""
        activation: Any = getattr(layer.owner, "activation", None)
        is_in_loop = layer.layer is not layer.owner
        count = len(self.calls)

        def tapping(z: Tensor, *rest: Any, **options: Any) -> Tensor:
            z = z if is_in_loop or len(self.calls) > count else self._tap(i, z)
            return activation(z, *rest, **options)

        with _activation(layer.owner, tapping):
            outputs = call(*args, **kwargs)
        if len(self.calls) > count:
            return outputs
        tensors = tree.flatten(outputs)
        position = next(k for k, tensor in enumerate(tensors) if is_float(tensor))
        tensors[position] = self._tap(i, tensors[position])
        return tree.pack_sequence_as(outputs, tensors)

    def _tap(self, i: int, z: Tensor) -> Tensor:
        tapped, signal = self.tap(z)
        self.calls.append((i, signal))
        return tapped

    def _scale(self, i: int, layer: ScaledLayer, arguments: Any, z: Tensor) -> Tensor:
        """The output of the layer's first call, times the factor that it needs."""
        if i in self.factors or (isinstance(self.aims[i], np.generic) and not self.aims[i]):
            return z
        with np.errstate(all="ignore"):
            self.factors[i] = self._factor(self.aims[i], layer, arguments, z)
        self._multiply(layer, self.factors[i])
        return _product(z, self.factors[i])

    def _factor(self, aim: Any, layer: ScaledLayer, arguments: Any, z: Tensor) -> Any:
        if layer.share is None:
            # It makes up for a low level, and for nothing else.
            size = _size(z)
            factor = numpy.minimum(1 / self.level, aim / size)
        else:
            size, goal, inputs = _std(z), aim, _first_float(arguments)
            if inputs is not None:
                most = layer.largest_gain * _size(inputs) * numpy.maximum(1, aim)
                goal = numpy.minimum(aim, numpy.maximum(size, most))
            factor = goal / size
        return numpy.where((size > 0) & (aim > 0), factor, 1)

    def _check_follows(self, i: int, layer: ScaledLayer, bare: Tensor, again: Any) -> None:
        """Takes the factor back if the output did not follow it."""
        factor = self.factors[i]
        expected = _std(bare) * factor
        follows = abs(_std(again) - expected) <= _FOLLOWS * expected
        self._multiply(layer, numpy.where(follows, 1, 1 / factor))
        self.factors[i] = numpy.where(follows, factor, math.nan)

    def _multiply(self, layer: ScaledLayer, factor: Any) -> None:
        for weight in layer.kernels:
            value: Any = self.scope.get_current_value(weight.variable)
            value = _product(value, factor ** (1 / len(layer.kernels)))
            self.scope.add_update((weight.variable, value))

    @contextlib.contextmanager
    def _without_bias(self, owner: Any) -> Iterator[None]:
        biases = [weight for weight in owner.weights if weight.name == "bias"]
        held = [(bias, self.scope.get_current_value(bias)) for bias in biases]
        for bias, value in held:
            self.scope.add_update((bias, ops.zeros_like(value)))
        try:
            yield
        finally:
            for update in held:
                self.scope.add_update(update)


def _activation(owner: Any, function: Callable) -> Any:
    """Where the layer has another activation, if it has any."""
    if callable(getattr(owner, "activation", None)):
        return replaced_attribute(owner, "activation", function)
    return contextlib.nullcontext()


def _activated(owner: Any, z: Tensor) -> Tensor:
    """An affine layer's output, from that without bias and activation."""
    bias, activation = owner.bias, owner.activation
    if bias is not None:
        bias = ops.cast(bias, z.dtype)
        if getattr(owner, "data_format", None) == "channels_first":
            bias = ops.reshape(bias, (-1, *[1] * (len(z.shape) - 2)))
        z = z + bias
    return z if activation is None else activation(z)


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


def _product(tensor: Tensor, factor: Any) -> Tensor:
    return tensor * ops.cast(factor, tensor.dtype)


def _std(tensor: Tensor) -> Any:
    values, scale = _of_size_1(tensor)
    return values.std() * scale


def _size(tensor: Tensor) -> Any:
    """The root mean square."""
    values, scale = _of_size_1(tensor)
    return numpy.sqrt((values * values).mean()) * scale


def _of_size_1(tensor: Tensor) -> tuple[Any, Any]:
    """Values whose squares neither vanish nor overflow, and what they are divided by."""
    values = backends.readable(tensor)
    scale = numpy.maximum(abs(values).max(), np.finfo(np.float32).tiny)
    return values / scale, scale


def _std_and_likeness(examples: int, values: np.ndarray) -> tuple[float, float | None]:
    return moments(values).std, likeness(values, examples)


def _length(gradient: np.ndarray) -> float:
    return math.hypot(*moments(gradient)) * math.sqrt(gradient.size)


def scaled(layer: ScaledLayer, factor: float, kernel: keras.Variable) -> Tensor:
    """A kernel times its share of the layer's factor."""
    share = float(factor) ** (1 / len(layer.kernels))
    wide = keras.backend.result_type(kernel.dtype, "float32")
    return ops.cast(ops.cast(kernel, wide) * share, kernel.dtype)
