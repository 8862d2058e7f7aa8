"""Passes over a model in which each kernel is scaled as its layer is called.

The layers are called one after the other, so in one pass each kernel can be given the
factor that its output needs, whatever came before it.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._keras.graph import replaced_attribute
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
from keras_glorot.layer_rules import is_normalization

__all__ = ["Measured", "Measurement", "Site", "find_sites", "scaled"]

ops: Any = keras.ops
tree: Any = keras.tree


class Site(NamedTuple):
    """A layer whose kernels are scaled: its output, before the activation, is measured."""

    path: str
    layer: Any  # that is called
    owner: Any  # that has the kernels: the same, or the one inside a TimeDistributed
    kernels: tuple[Weight, ...]
    is_unit: bool  # its std is to be 1, whatever the gradient


def find_sites(
    survey: Survey, selected: set[int]
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
    sites = []
    for kernels in by_owner.values():
        owner: Any = kernels[0].owner
        path = kernels[0].path.rpartition("/")[0]
        layer = loops.get(id(owner), owner)
        is_unit = isinstance(layer, keras.layers.RNN) or _has_unit_output(owner)
        sites.append(Site(path, layer, owner, tuple(kernels), is_unit))
    return sites, left


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


def _is_batch(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def _is_table(weight: Weight) -> bool:
    """Whether it is a learned table, such as of positions: its scale is left as it is."""
    variable = weight.variable
    is_learned = variable.trainable and keras.backend.is_float_dtype(variable.dtype)
    is_kernel = weight.is_kernel and "embedding" not in variable.name
    return is_learned and not is_kernel and sum(size > 1 for size in variable.shape) > 1


def _has_unit_output(owner: Any) -> bool:
    """Whether a softmax or sigmoid follows, which have a scale of their own.

    Queries and keys are known by the names that Keras, KerasHub and others give them.
    """
    activation = getattr(getattr(owner, "activation", None), "__name__", "")
    if activation in ("sigmoid", "hard_sigmoid"):
        return True
    return bool(re.search(r"(^|_)(q|k|qk|qkv|quer(y|ies)|keys?)(_|\d|$)", owner.name))


class Measured(NamedTuple):
    """What one pass saw: arrays over the sites; log std and log gradient std are means."""

    signal: np.ndarray  # log std of the output, over the calls; nan where not called
    gradient: np.ndarray  # log std of the gradient; -inf where none comes
    share: np.ndarray  # of the gradient that passes by
    factors: np.ndarray
    order: list[int]  # sites in order of their first call
    stem: int | None  # the first site, if learned values are added to its output
    ends: list[int]  # sites whose output is added to what passes by
    start: float  # std of the first such sum, without the output
    stream: float  # largest std of such a sum


class _Sum(NamedTuple):
    """What the output of a site is added to."""

    total: Tensor
    std: Tensor
    site: int | None
    added: Tensor  # the std of what the site put out; 0 if it is surely a sum


class Measurement:
    """Passes over the model in which each kernel is scaled as its layer is called."""

    def __init__(
        self,
        survey: Survey,
        batch: Batch,
        sites: list[Site],
        training: bool,
    ):
        self.survey, self.batch, self.sites, self.training = survey, batch, sites, training
        self.differentiate = differentiator(self._run)
        owners = [weight.owner for weight in survey.weights if _is_table(weight)]
        self.tables = [owner for owner in owners if id(owner) not in survey.loops]
        self.unseen: list[keras.Layer] = []
        self.unbiased = {i for i, site in enumerate(sites) if _is_unbiased(site)}
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

    def _collect(
        self,
        gradients: list[float],
        stds: np.ndarray,
        factors: np.ndarray,
        sums: np.ndarray,
        added: np.ndarray,
    ) -> Measured:
        """From calls to sites."""
        calls = self.calls
        stds = stds.astype(np.float64)
        at_calls = np.array(
            [math.nan if p is None else gradients[p] for p in self.positions]
        )
        passing = np.nan_to_num(stds * at_calls * np.sqrt(self.sizes))
        # By Euler's theorem this is the same all along a chain, whatever the factors.
        before = np.maximum.accumulate(passing)
        behind = np.maximum.accumulate(passing[::-1])[::-1]
        shares = passing / np.maximum(np.minimum(before, behind), 1e-300)
        count = len(self.sites)
        signal, gradient = np.full(count, math.nan), np.full(count, -math.inf)
        share = np.zeros(count)
        with np.errstate(divide="ignore"):
            for i in set(calls):
                mine = [k for k, site in enumerate(calls) if site == i]
                signal[i] = np.log(stds[mine]).mean()
                gradient[i] = np.log(np.nan_to_num(at_calls[mine])).mean()
                share[i] = shares[mine].max()
        order = list(dict.fromkeys(calls))
        # Of equal std: the output was added to nothing, only brought into another shape.
        is_sum = np.abs(sums - added) > 1e-5 * sums
        added_sites = {i for i, is_one in zip(self.added, is_sum, strict=True) if is_one}
        ends = [i for i in order if i in added_sites - self.normalized]
        factors = factors.astype(np.float64)
        start, stream = float(sums[0]), float(sums.max())
        return Measured(
            signal, gradient, share, factors, order, self.stem, ends, start, stream
        )

    @contextlib.contextmanager
    def _run(
        self,
        tap: Tap,
        values: list[Tensor],
        x: Any,
        targets: Tensor,
        free: Tensor,
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        self.tap, self.targets, self.free = tap, targets, free
        # Of each call: the site, where its gradient is, how many values it has.
        self.calls: list[int] = []
        self.positions: list[int | None] = []
        self.sizes: list[int] = []
        self.stds: list[Tensor] = []
        self.factors: dict[int, Tensor] = {}
        # By `id`, with the tensor, so that no other gets it: what sites put out, and sums.
        self.outputs: dict[int, tuple[Tensor, int]] = {}
        self.sums: dict[int, _Sum] = {}
        # Other tensors that are no sums: what single layers make of one that is none.
        self.others: dict[int, Tensor] = {}
        self.stem: int | None = None
        self.normalized: set[int] = set()
        variables = self.survey.root.variables
        self.scope = keras.StatelessScope(zip(variables, values, strict=True))
        wrappers = self._wrappers()
        call = intercepted_call(self.batch, self.survey, x, wrappers, self.training)
        with self.scope, call as (outputs, self.unseen):
            one = ops.ones(())
            factors = [self.factors.get(i, one) for i in range(len(self.sites))]
            sums = list(self.sums.values()) or [_Sum(one, ops.zeros(()), None, one)]
            self.added = [each.site for each in sums]
            extras = [
                ops.stack(self.stds or [one]),
                ops.stack(factors),
                ops.stack([each.std for each in sums]),
                ops.stack([each.added for each in sums]),
            ]
            yield self.batch.objective(outputs), extras

    def _wrappers(self) -> dict[int, Callable]:
        wrappers: dict[int, Callable] = {}
        for layer in self.survey.layers:
            if is_normalization(layer):
                observe = functools.partial(self._observe_normalization, layer)
                wrappers[id(layer)] = observe
            elif not (self.survey.additions or self.survey.children(layer)):
                wrappers[id(layer)] = functools.partial(self._observe_single, layer)
        for layer in self.tables:
            wrappers[id(layer)] = self._observe_table
        for addition in self.survey.additions:
            wrappers[id(addition)] = self._observe_addition
        for i, site in enumerate(self.sites):
            call = functools.partial(self._call_site, i, site)
            if isinstance(site.layer, keras.layers.RNN):
                call = functools.partial(self._call_recurrent, i, site)
            wrappers[id(site.layer)] = call
        return wrappers

    def _observe_table(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        if len(self.calls) == 1:
            self.stem = self.calls[0]
            self._note_others(outputs)
        return outputs

    def _observe_single(self, layer, call, *args: Any, **kwargs: Any) -> Any:
        """An activation, a pooling or the like makes no sum of what is none."""
        outputs = call(*args, **kwargs)
        inputs = [tensor for tensor in tree.flatten((args, kwargs)) if is_float(tensor)]
        is_single = len(inputs) == 1 or isinstance(layer, _JOINS)
        if is_single and not any(self._may_be_sum(tensor) for tensor in inputs):
            self._note_others(outputs)
        return outputs

    def _note_others(self, outputs: Any) -> None:
        self.others |= {id(tensor): tensor for tensor in tree.flatten(outputs)}

    def _may_be_sum(self, tensor: Tensor | None) -> bool:
        known = id(tensor) in self.outputs or id(tensor) in self.others
        return tensor is not None and not known

    def _observe_addition(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        terms = [tensor for tensor in tree.flatten((args, kwargs)) if is_float(tensor)]
        if len(terms) > 1:
            start = ops.max(ops.stack([_std(tensor) for tensor in terms]))
            self._note_sum(outputs, ops.zeros(()), start)
        return outputs

    def _observe_normalization(self, layer, call, *args: Any, **kwargs: Any) -> Any:
        """What goes in is a sum, unless a site put it out; in DenseNet, it is not."""
        first = _first_float((args, kwargs))
        if id(first) in self.outputs:
            self.normalized.add(self.outputs[id(first)][1])
        elif self._may_be_sum(first) and not (self.survey.additions or _is_batch(layer)):
            last, _ = next(reversed(self.outputs.values()), (first, None))
            self._note_sum(first, _std(last))
        outputs = call(*args, **kwargs)
        self._note_others(outputs)
        return outputs

    def _note_sum(self, total: Tensor, added: Tensor, start: Tensor | None = None) -> None:
        """The output of the site that was called last is taken for what is added."""
        if id(total) in self.sums:
            return
        if not self.sums and start is not None:
            self.sums[id(start)] = _Sum(start, start, None, start)
        site = self.calls[-1] if self.calls else None
        self.sums[id(total)] = _Sum(total, _std(total), site, added)

    def _call_recurrent(self, i, site, call, *args: Any, **kwargs: Any) -> Any:
        """Nothing inside the loop is seen, but what it multiplies its input with is."""
        kernel = site.kernels[0].variable
        inputs = _first_float((args, kwargs))
        value: Any = self.scope.get_current_value(kernel)
        z = ops.matmul(ops.cast(inputs, value.dtype), value)
        std = _std(z)
        is_first = i not in self.factors
        factor = self._factor(i, site, std)
        std = std * factor if is_first else std
        self._note_call(i, std, None, math.prod(z.shape))
        return call(*args, **kwargs)

    def _call_site(self, i, site, call, *args: Any, **kwargs: Any) -> Any:
        activation = getattr(site.owner, "activation", None)
        activation = activation if callable(activation) else keras.activations.linear
        with self._bare(site.owner):
            z = call(*args, **kwargs)
        tensor = _first_float(z)
        if tensor is None:
            return call(*args, **kwargs)
        is_first = i not in self.factors
        std = _std(tensor)
        factor = self._factor(i, site, std)
        if i in self.unbiased:
            # The factor reaches the output alone: no need to call the layer again.
            if is_first:
                tensor, std = tensor * ops.cast(factor, tensor.dtype), std * factor
            outputs = activation(self._tap(i, tensor, std))
        else:
            known = std * factor if is_first and _is_affine(site) else None
            outputs = self._call_again(i, site, activation, known, call, *args, **kwargs)
        for tensor in tree.flatten(outputs):
            self.outputs[id(tensor)] = tensor, i
        return outputs

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
        self._note_call(i, std, position, math.prod(z.shape))
        return tapped

    def _note_call(self, i: int, std: Tensor, position: int | None, size: int) -> None:
        self.calls.append(i)
        self.stds.append(std)
        self.positions.append(position)
        self.sizes.append(size)

    def _factor(self, i: int, site: Site, std: Tensor) -> Tensor:
        """The factor that gives the output of the site's first call its std."""
        if i not in self.factors:
            log_std: Any = ops.log(ops.where(std > 0, std, 1.0))
            factor = ops.exp(self.free * (self.targets[i] - log_std))
            self.factors[i] = ops.where(std > 0, factor, 1.0)
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


_JOINS = (keras.layers.Concatenate, keras.layers.Multiply)
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


def _is_affine(site: Site) -> bool:
    """Whether the output is `activation(kernel * x + bias)`."""
    if site.layer is not site.owner or not isinstance(site.owner, _AFFINE):
        return False
    of_keras = type(site.owner).call in {layer.call for layer in _AFFINE}
    return of_keras and site.owner.quantization_mode is None


def _is_unbiased(site: Site) -> bool:
    """Whether it is so without a bias, or with one that is zero."""
    bias = getattr(site.owner, "bias", None)
    return _is_affine(site) and (bias is None or not backends.values(bias).any())


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
