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
from keras_glorot._backends.signals import Outcome, Signal, Tap, Tensor
from keras_glorot._keras.graph import replaced_attribute
from keras_glorot._models.kernels import Flow
from keras_glorot._models.passes import (
    Batch,
    Recorder,
    first_float,
    likeness,
    moments,
    replaced,
)
from keras_glorot._models.survey import Survey, Weight

__all__ = ["ScaledLayer", "ScalingPass", "ScalingPasses", "find_scaled_layers", "scaled"]

ops: Any = keras.ops
numpy: Any = backends.numpy

# No hidden kernel is scaled beyond this gain, the std of its output over the root mean
# square of its input. Behind GELU and SiLU a low level needs 2; a kernel that would need
# more makes up for something else, such as an embedding with small values. Behind a mean
# over positions none is needed: that makes less of what differs between them, as is meant.
_LARGEST_GAIN, _GAIN_OF_MEANS = 2.5, 1.0
# All branches together add this part to a residual sum. Behind it the sum has 1.12 times
# the std that it starts with, and the gradient grows as little.
_SHARE_OF_BRANCHES = 0.5
# A kernel that gets less than this part of the gradient that passes by stands in a branch
# that is switched off on purpose, by LayerScale or zeros.
_SMALLEST_SHARE = 0.01
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
        own_level: The factor on the level: after the isometric start, the level
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

    def part(self, factor: Any) -> Any:
        """The factor on each of its kernels."""
        return factor ** (1 / len(self.kernels))


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
    """The figures of one pass: arrays over the layers; of several calls, the mean.

    Attributes:
        layers: The layers.
        signal: Log std of the output; nan where not called, as the next two.
        gradient: Log of the length of the gradient there; -inf where none comes.
        likeness: The mean cosine between examples; nan where it can't be told.
        share: The part of the gradient that it gets of what passes by.
        factors: Those by which its kernels were multiplied.
        follows: Whether its output changes with its kernels.
        order: The layers in order of their first call.
        is_finite: Whether all of it is, and the objective.
    """

    layers: list[ScaledLayer]
    signal: np.ndarray
    gradient: np.ndarray
    likeness: np.ndarray
    share: np.ndarray
    factors: np.ndarray
    follows: np.ndarray
    order: list[int]
    is_finite: bool

    @property
    def hidden(self) -> list[int]:
        """Those with a std to have, in order of their calls."""
        return [i for i in self.order if self.layers[i].share is not None]

    @property
    def path(self) -> list[int]:
        """Those that signal and gradient come by and are told from."""
        return [
            i
            for i in self.hidden
            if self.layers[i].is_told
            and self.share[i] > _SMALLEST_SHARE
            and math.isfinite(self.signal[i] + self.gradient[i])
        ]


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
        like: ScalingPass | None = None,
    ) -> ScalingPass:
        """One pass: scaled to these stds of the outputs, or like another pass, or as it is.

        The level is that of the hidden kernels, which heads need not make up for.
        """
        self.passes += 1
        # Apart, not as one array: XLA then sees that layers of a kind need the same code.
        wanted = [0.0] * len(self.layers) if aims is None else aims
        numbers = [np.float32(each) for each in (level, *wanted)]
        values = None if like is None else self._values(like.factors)
        seen = self._collect(*self.recorder(batch, *numbers, values=values))
        if like is None:
            return seen
        return seen._replace(factors=like.factors, follows=like.follows)

    def _values(self, factors: np.ndarray) -> list[Tensor]:
        values: dict[int, Any] = {id(each): each.value for each in self.recorder.variables}
        for layer, factor in zip(self.layers, factors, strict=True):
            for weight in layer.kernels if factor != 1 else ():
                key = id(weight.variable)
                values[key] = _product(values[key], layer.part(factor))
        return list(values.values())

    def _start(
        self, tap: Tap, scope: Any, x: Any, level: Any, *aims: Any
    ) -> tuple[Any, dict[int, Callable]]:
        self.calls: list[tuple[int, Signal]] = []  # of which layer
        describe = functools.partial(_std_and_likeness, self.recorder.batch.size)

        def noting_tap(i: int, z: Tensor) -> Tensor:
            tapped, signal = tap(z, describe, _length)
            self.calls.append((i, signal))
            return tapped

        self.scalers = [
            _Scaler(layer, aim, level, functools.partial(noting_tap, i), scope)
            for i, (layer, aim) in enumerate(zip(self.layers, aims, strict=True))
        ]
        return x, {id(each.layer.layer): each.call for each in self.scalers}

    def _finish(self, batch: Batch, outputs: Any) -> Outcome:
        objective = batch.objective(outputs)
        factors = [1 if each.factor is None else each.factor for each in self.scalers]
        both = numpy.stack(list(map(numpy.float32, factors)))
        return objective, [both, ops.cast(objective, "float32")]

    def _collect(self, factors: np.ndarray, objective: np.ndarray) -> ScalingPass:
        """From calls to layers."""
        calls = np.array([layer for layer, _ in self.calls], int)
        values = np.array([signal.value for _, signal in self.calls], float).reshape(-1, 2)
        stds, likenesses = values.T
        lengths = np.nan_to_num([signal.gradient for _, signal in self.calls])
        # By Euler's theorem this is the same all along a chain, whatever the factors.
        passing = np.nan_to_num(stds * lengths)
        before = np.maximum.accumulate(passing)
        behind = np.maximum.accumulate(passing[::-1])[::-1]
        share = np.zeros(len(self.layers))
        shares = passing / np.maximum(np.minimum(before, behind), 1e-300)
        np.maximum.at(share, calls, shares)
        with np.errstate(divide="ignore", invalid="ignore"):
            counts = np.bincount(calls, minlength=len(share))
            signal, gradient, likeness = (
                np.bincount(calls, each, len(share)) / counts
                for each in (np.log(stds), np.log(lengths), likenesses)
            )
        return ScalingPass(
            self.layers,
            signal,
            gradient,
            likeness,
            share,
            np.nan_to_num(factors.astype(np.float64), nan=1.0),
            ~np.isnan(factors),
            list(dict.fromkeys(calls.tolist())),
            bool(np.isfinite(objective) and np.isfinite(stds).all()),
        )


class _Scaler:
    """Scales the kernels of a layer as it is called, and taps its output.

    Numbers are NumPy's, or those of the program that JAX traces.

    Attributes:
        layer: The layer.
        aim: As in `ScalingPasses`: the std of its output; 0 to leave its kernels.
        level: That of the pass.
        tap: Hands the output on, tapped.
        scope: Holds the variables.
        factor: None before the first call, nan if the output does not follow the kernels.
    """

    def __init__(self, layer: ScaledLayer, aim: Any, level: Any, tap: Callable, scope: Any):
        self.layer, self.aim, self.level = layer, aim, level
        self.tap, self.scope = tap, scope
        self.factor: Any = None

    def call(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Stands for `call` of the layer."""
        if isinstance(self.layer.layer, keras.layers.RNN):
            self._tap_input_kernel((args, kwargs))
            return call(*args, **kwargs)
        with self._without_bias(), self._activation(keras.activations.linear):
            bare = z = first_float(call(*args, **kwargs))
            if z is not None and self.factor is None:
                z = self._scale((args, kwargs), bare)
                if not self.layer.is_affine and self.factor is not None:
                    self._check_follows(bare, first_float(call(*args, **kwargs)))
        if z is None:
            return call(*args, **kwargs)
        if self.layer.is_affine:  # no need to call it again
            return _activated(self.layer.owner, self.tap(z))
        return self._call_tapped(call, *args, **kwargs)

    def _tap_input_kernel(self, arguments: Any) -> None:
        """Nothing inside the loop is seen, but what it multiplies its input with is."""
        kernel: Any = self.scope.get_current_value(self.layer.kernels[0].variable)
        inputs = ops.cast(first_float(arguments), kernel.dtype)
        self.tap(self._scale(arguments, ops.matmul(inputs, kernel)))

    def _call_tapped(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """Taps what goes into the activation or, where that is not seen, the output."""
        activation: Any = getattr(self.layer.owner, "activation", None)
        is_tapped = is_in_loop = self.layer.layer is not self.layer.owner

        def tapping(z: Tensor, *rest: Any, **options: Any) -> Tensor:
            nonlocal is_tapped
            z = z if is_tapped else self.tap(z)
            is_tapped = True
            return activation(z, *rest, **options)

        with self._activation(tapping):
            outputs = call(*args, **kwargs)
        if is_tapped and not is_in_loop:
            return outputs
        z = first_float(outputs)
        return replaced(outputs, z, self.tap(z))

    def _scale(self, arguments: Any, z: Tensor) -> Tensor:
        """The output of the layer's first call, times the factor that it needs."""
        if self.factor is not None or (isinstance(self.aim, np.generic) and not self.aim):
            return z
        with np.errstate(all="ignore"):
            self.factor = self._needed_factor(arguments, z)
        self._multiply(self.factor)
        return _product(z, self.factor)

    def _needed_factor(self, arguments: Any, z: Tensor) -> Any:
        if self.layer.share is None:
            # It makes up for a low level, and for nothing else.
            size = _size(z)
            factor = numpy.minimum(1 / self.level, self.aim / size)
        else:
            size, goal, inputs = _std(z), self.aim, first_float(arguments)
            if inputs is not None:
                most = self.layer.largest_gain * _size(inputs) * numpy.maximum(1, self.aim)
                goal = numpy.minimum(self.aim, numpy.maximum(size, most))
            factor = goal / size
        return numpy.where((size > 0) & (self.aim > 0), factor, 1)

    def _check_follows(self, bare: Tensor, again: Any) -> None:
        """Takes the factor back if the output did not follow it."""
        expected = _std(bare) * self.factor
        follows = abs(_std(again) - expected) <= _FOLLOWS * expected
        self._multiply(numpy.where(follows, 1, 1 / self.factor))
        self.factor = numpy.where(follows, self.factor, math.nan)

    def _multiply(self, factor: Any) -> None:
        for weight in self.layer.kernels:
            value: Any = self.scope.get_current_value(weight.variable)
            value = _product(value, self.layer.part(factor))
            self.scope.add_update((weight.variable, value))

    @contextlib.contextmanager
    def _without_bias(self) -> Iterator[None]:
        biases = [weight for weight in self.layer.owner.weights if weight.name == "bias"]
        held = [(bias, self.scope.get_current_value(bias)) for bias in biases]
        for bias, value in held:
            self.scope.add_update((bias, ops.zeros_like(value)))
        try:
            yield
        finally:
            for update in held:
                self.scope.add_update(update)

    def _activation(self, function: Callable) -> Any:
        """Where the layer has another activation, if it has any."""
        if callable(getattr(self.layer.owner, "activation", None)):
            return replaced_attribute(self.layer.owner, "activation", function)
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


def scaled(kernel: keras.Variable, factor: float) -> Tensor:
    """A kernel times a factor, rounded once."""
    wide = keras.backend.result_type(kernel.dtype, "float32")
    return ops.cast(ops.cast(kernel, wide) * float(factor), kernel.dtype)
