"""Passes over a model in which each kernel is scaled as its layer is called.

The layers are called one after the other, so in one pass each kernel can be given the
factor that its output needs, whatever came before it.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._keras.graph import replaced_attribute
from keras_glorot._models.kernels import Flow, Place
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

__all__ = ["Measured", "Measurement", "Site", "find_sites", "scaled"]

ops: Any = keras.ops
tree: Any = keras.tree


class Site(NamedTuple):
    """A layer whose kernels are scaled: its output, before the activation, is measured.

    Attributes:
        path: The path of its kernels' owner.
        layer: The layer that is called.
        owner: The one that has the kernels: the same, or the one inside a TimeDistributed.
        kernels: Its kernels.
        goal: The log std that its output is to have, whatever the gradient, or None.
        is_end: Whether its output is added to what passes by.
        is_affine: Whether its output is `activation(kernel * x + bias)`.
        has_bias: Whether it has a bias that is not zero.
    """

    path: str
    layer: Any
    owner: Any
    kernels: tuple[Weight, ...]
    goal: float | None
    is_end: bool
    is_affine: bool
    has_bias: bool


def find_sites(
    survey: Survey, selected: set[int], flow: Flow
) -> tuple[list[Site], list[tuple[Weight, str]]]:
    """What may be scaled, and what may not, with the reason."""
    loops = survey.loops
    by_owner: dict[int, list[Weight]] = {}
    left = []
    for weight in survey.weights:
        is_float = keras.backend.is_float_dtype(weight.variable.dtype)
        if weight.fans is None or not is_float or id(weight.owner) not in selected:
            continue
        reason = _reason_to_leave(weight, loops)
        if reason:
            left.append((weight, reason))
        else:
            by_owner.setdefault(id(weight.owner), []).append(weight)
    return [_site(kernels, loops, flow) for kernels in by_owner.values()], left


def _site(kernels: list[Weight], loops: dict[int, keras.Layer], flow: Flow) -> Site:
    owner: Any = kernels[0].owner
    path = kernels[0].path.rpartition("/")[0]
    layer = loops.get(id(owner), owner)
    is_end = any(end is layer for end in flow.ends())
    goal = None
    if isinstance(layer, keras.layers.RNN) or flow.feeds_gate(layer):
        goal = 0.0
    elif flow.is_head(layer) and not is_end:
        goal = min(map(_small_gain, kernels))
    bias = getattr(owner, "bias", None)
    has_bias = bias is not None and bool(backends.values(bias).any())
    is_affine = layer is owner and _is_affine(owner)
    return Site(path, layer, owner, tuple(kernels), goal, is_end, is_affine, has_bias)


def _small_gain(weight: Weight) -> float:
    """Log std on a unit input of a kernel that its author made small; 0 of others.

    Small is what is below half of Glorot's std, or of LeCun's with a std that was chosen.
    """
    fan_in, fan_out = weight.fans or (1, 1)
    gain = math.sqrt(backends.values(weight.variable).mean_square() * fan_in)
    is_chosen = isinstance(weight.initializer, _CHOSEN)
    usual = 1.0 if is_chosen else math.sqrt(2 * fan_in / (fan_in + fan_out))
    return math.log(gain) if gain < 0.5 * usual else 0.0


# Their std is a number that the author gave, whatever the fans.
_CHOSEN = (
    keras.initializers.RandomNormal,
    keras.initializers.TruncatedNormal,
    keras.initializers.RandomUniform,
)


def _reason_to_leave(weight: Weight, loops: dict[int, keras.Layer]) -> str:
    """Why a weight with fans is not scaled; "" if it is."""
    owner = weight.owner
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
    loop = loops.get(id(owner))
    if isinstance(loop, keras.layers.RNN) and _input_kernel(loop) is not weight.variable:
        return "it is used inside a loop, which can't be looked into"
    return ""


_CELLS = (keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)


def _input_kernel(layer: Any) -> keras.Variable | None:
    """The kernel that a recurrent layer multiplies its input with."""
    return layer.cell.kernel if isinstance(layer, _CELLS) else None


class Measured(NamedTuple):
    """What one pass saw: arrays over the sites; log std and log gradient std are means."""

    signal: np.ndarray  # log std of the output, over the calls; nan where not called
    gradient: np.ndarray  # log std of the gradient; -inf where none comes
    share: np.ndarray  # of the gradient that passes by
    factors: np.ndarray
    order: list[int]  # sites in order of their first call
    stem: int | None  # the first site, if learned values are added to its output
    ends: list[int]  # sites whose output is added to what passes by
    start: float  # largest std of what is added at the first sum that is seen
    stream: float  # largest std of such a sum
    is_finite: bool  # whether the objective is


class Measurement:
    """Passes over the model in which each kernel is scaled as its layer is called."""

    def __init__(
        self,
        survey: Survey,
        batch: Batch,
        flow: Flow,
        sites: list[Site],
        training: bool,
    ):
        self.survey, self.batch, self.flow, self.sites = survey, batch, flow, sites
        self.training = training
        self.differentiate = differentiator(self._run)
        self.watched = _watched(flow)
        self.unseen: list[keras.Layer] = []
        self.passes = 0

    def __call__(self, targets: np.ndarray | None) -> Measured:
        """One pass: with targets, the log std of each site's output, or as it is."""
        self.passes += 1
        free = np.float32(targets is not None)
        targets = np.zeros(len(self.sites)) if targets is None else targets
        signals, extras = self.differentiate(
            [variable.value for variable in self.survey.root.variables],
            self.batch.x,
            ops.convert_to_tensor(targets.astype(np.float32)),
            ops.convert_to_tensor(free),
        )
        return self._collect([signal.gradient for signal in signals], *extras)

    @contextlib.contextmanager
    def _run(
        self, tap: Tap, values: list[Tensor], x: Any, targets: Tensor, free: Tensor
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        def rescale(i: int, std: Tensor) -> Tensor:
            log_std: Any = ops.log(ops.where(std > 0, std, 1.0))
            return ops.where(std > 0, ops.exp(free * (targets[i] - log_std)), 1.0)

        scope = keras.StatelessScope(zip(self.survey.root.variables, values, strict=True))
        self.latest = _Pass(scope, tap, rescale)
        wrappers = self.latest.wrappers(self.sites, self.watched)
        call = intercepted_call(self.batch, self.survey, x, wrappers, self.training)
        with scope, call as (outputs, self.unseen):
            objective = self.batch.objective(outputs)
            yield objective, self.latest.extras(objective, len(self.sites))

    def _collect(
        self,
        gradients: list[float],
        stds: np.ndarray,
        factors: np.ndarray,
        seen: np.ndarray,
        objective: np.ndarray,
    ) -> Measured:
        """From calls to sites."""
        calls, stds = self.latest.calls, stds.astype(np.float64)
        at_calls = np.array(
            [math.nan if c.position is None else gradients[c.position] for c in calls]
        )
        passing = np.nan_to_num(stds * at_calls * np.sqrt([call.size for call in calls]))
        # By Euler's theorem this is the same all along a chain, whatever the factors.
        before = np.maximum.accumulate(passing)
        behind = np.maximum.accumulate(passing[::-1])[::-1]
        shares = passing / np.maximum(np.minimum(before, behind), 1e-300)
        count = len(self.sites)
        signal, gradient = np.full(count, math.nan), np.full(count, -math.inf)
        share = np.zeros(count)
        order = list(dict.fromkeys(call.site for call in calls))
        with np.errstate(divide="ignore"):
            for i in order:
                mine = [k for k, call in enumerate(calls) if call.site == i]
                signal[i] = np.log(stds[mine]).mean()
                gradient[i] = np.log(np.nan_to_num(at_calls[mine])).mean()
                share[i] = shares[mine].max()
        known = dict(zip(self.latest.seen, seen.tolist(), strict=False))
        return Measured(
            signal,
            gradient,
            share,
            factors.astype(np.float64),
            order,
            next((i for i in order if self.sites[i].layer is self.flow.stem), None),
            [i for i in order if self.sites[i].is_end],
            *_sums(self.flow, known),
            bool(np.isfinite(objective) and np.isfinite(stds).all()),
        )


def _watched(flow: Flow) -> dict[int, list[tuple[int, Place]]]:
    """By `id` of layers and additions: the sums, and terms of the first, that they see."""
    seen = [each for each in flow.sums if each.total in flow.places]
    numbers = [each.total for each in seen] + [n for each in seen[:1] for n in each.terms]
    watched: dict[int, list[tuple[int, Place]]] = {}
    for number in numbers:
        place = flow.places.get(number)
        if place is not None:
            watched.setdefault(id(place.operation), []).append((number, place))
    return watched


def _sums(flow: Flow, stds: dict[int, float]) -> tuple[float, float]:
    """What the first sum starts with, and the largest sum; zeros if none is seen."""
    sums = [each for each in flow.sums if each.total in stds]
    if not sums:
        return 0.0, 0.0
    totals = [stds[each.total] for each in sums]
    start = max((stds[n] for n in sums[0].terms if n in stds), default=totals[0])
    return start, max(start, *totals)


class _SiteCall(NamedTuple):
    site: int
    std: Tensor  # of the output
    position: int | None  # where its gradient is
    size: int  # how many values it has


class _Pass:
    """One pass: `rescale(site, std)` gives the factor for the kernels of each site."""

    def __init__(
        self,
        scope: keras.StatelessScope,
        tap: Tap,
        rescale: Callable[[int, Tensor], Tensor],
    ):
        self.scope, self.tap, self.rescale = scope, tap, rescale
        self.calls: list[_SiteCall] = []
        self.factors: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}  # by number of the tensor: its std

    def extras(self, objective: Tensor, count: int) -> list[Tensor]:
        """The numbers of the pass: stds of the calls, factors, stds of sums, objective."""
        one = ops.ones(())
        return [
            ops.stack([call.std for call in self.calls] or [one])[: len(self.calls)],
            ops.stack([self.factors.get(i, one) for i in range(count)]),
            ops.stack(list(self.seen.values()) or [one]),
            ops.cast(objective, "float32"),
        ]

    def wrappers(
        self, sites: list[Site], watched: dict[int, list[tuple[int, Place]]]
    ) -> dict[int, Callable]:
        """What stands for `call` of each layer and addition."""
        wrappers: dict[int, Callable] = {}
        for i, site in enumerate(sites):
            is_loop = isinstance(site.layer, keras.layers.RNN)
            call = self._call_recurrent if is_loop else self._call_site
            wrappers[id(site.layer)] = functools.partial(call, i, site)
        for key, places in watched.items():
            inner = wrappers.get(key, _call)
            counter = itertools.count()
            wrappers[key] = functools.partial(self._watch, places, counter, inner)
        return wrappers

    def _watch(self, places, counter, inner, call, *args: Any, **kwargs: Any) -> Any:
        """Notes the std of the tensors that this call of the layer sees."""
        outputs = inner(call, *args, **kwargs)
        number_of_call = next(counter)
        for number, place in places:
            if place.call == number_of_call:
                tensor = _first_float((args, kwargs) if place.is_input else outputs)
                if tensor is not None:
                    self.seen[number] = _std(tensor)
        return outputs

    def _call_recurrent(self, i, site, call, *args: Any, **kwargs: Any) -> Any:
        """Nothing inside the loop is seen, but what it multiplies its input with is."""
        kernel = site.kernels[0].variable
        inputs = _first_float((args, kwargs))
        value: Any = self.scope.get_current_value(kernel)
        z = ops.matmul(ops.cast(inputs, value.dtype), value)
        is_first, std = i not in self.factors, _std(z)
        factor = self._factor(i, site, std)
        std = std * factor if is_first else std
        self.calls.append(_SiteCall(i, std, None, math.prod(z.shape)))
        return call(*args, **kwargs)

    def _call_site(self, i, site, call, *args: Any, **kwargs: Any) -> Any:
        activation = getattr(site.owner, "activation", None)
        activation = activation if callable(activation) else keras.activations.linear
        with self._bare(site.owner):
            tensor = _first_float(call(*args, **kwargs))
        if tensor is None:
            return call(*args, **kwargs)
        is_first, std = i not in self.factors, _std(tensor)
        factor = self._factor(i, site, std)
        if site.is_affine and not site.has_bias:
            # The factor reaches the output alone: no need to call the layer again.
            if is_first:
                tensor, std = tensor * ops.cast(factor, tensor.dtype), std * factor
            return activation(self._tap(i, tensor, std))
        known = std * factor if is_first and site.is_affine else None
        return self._call_again(i, site, activation, known, call, *args, **kwargs)

    def _call_again(self, i, site, activation, std, call, *args: Any, **kwargs: Any) -> Any:
        """With the scaled kernels, tapping what goes into the activation.

        `std` is that of the output without the bias, if it is known.
        """
        tapped: list[Tensor] = []

        def tapping(z: Tensor, *rest: Any, **options: Any) -> Tensor:
            if not tapped:
                tapped.append(z)
                z = self._tap(i, z, _std(z) if std is None else std)
            return activation(z, *rest, **options)

        with self._activation(site.owner, tapping):
            outputs = call(*args, **kwargs)
        if tapped:
            return outputs
        tensors = tree.flatten(outputs)
        position = next(k for k, tensor in enumerate(tensors) if is_float(tensor))
        z = tensors[position]
        tensors[position] = self._tap(i, z, _std(z) if std is None else std)
        return tree.pack_sequence_as(outputs, tensors)

    def _tap(self, i: int, z: Tensor, std: Tensor) -> Tensor:
        tapped, position = self.tap(z, None, lambda gradient: moments(gradient).std)
        self.calls.append(_SiteCall(i, std, position, math.prod(z.shape)))
        return tapped

    def _factor(self, i: int, site: Site, std: Tensor) -> Tensor:
        """The factor that gives the output of the site's first call its std."""
        if i not in self.factors:
            self.factors[i] = self.rescale(i, std)
            for weight in site.kernels:
                value: Any = self.scope.get_current_value(weight.variable)
                power = self.factors[i] ** (1 / len(site.kernels))
                scaled = value * ops.cast(power, value.dtype)
                self.scope.add_update((weight.variable, scaled))
        return self.factors[i]

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
    """Whether its output is `activation(kernel * x + bias)`."""
    of_keras = type(layer).call in {each.call for each in _AFFINE}
    return isinstance(layer, _AFFINE) and of_keras and layer.quantization_mode is None


def _call(call: Callable, *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def _first_float(structure: Any) -> Tensor | None:
    tensors = tree.flatten(structure)
    return next((t for t in tensors if is_float(t) and math.prod(t.shape)), None)


def _std(tensor: Tensor) -> Tensor:
    """In float32, and scaled so that squares neither vanish nor overflow."""
    values = ops.cast(ops.stop_gradient(tensor), "float32")
    scale = ops.max(ops.abs(values))
    scale = ops.where(scale > 0, scale, 1.0)
    return ops.std(values / scale) * scale


def scaled(site: Site, factor: float, values: np.ndarray) -> np.ndarray:
    """A part of a kernel times its share of the site's factor."""
    share = float(factor) ** (1 / len(site.kernels))
    wide = values.astype(np.promote_types(values.dtype, np.float32)) * share
    return wide.astype(values.dtype)
