"""`calibrate`: both of Glorot's constraints, held on the whole network by measurement."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from keras_glorot import backends
from keras_glorot.gains import activation_growth
from keras_glorot.initialization import select_layers
from keras_glorot.keras_bridge import additions, sublayers
from keras_glorot.layers import is_normalization
from keras_glorot.progress import progress
from keras_glorot.recording import (
    Batch,
    Tap,
    Tensor,
    differentiator,
    intercept,
    is_float,
    loops_around,
    moments,
    replaced_attribute,
)
from keras_glorot.tables import Finding, Row, Table
from keras_glorot.variables import Weight, describe

__all__ = ["calibrate", "measure_ends"]

ops: Any = keras.ops
tree: Any = keras.tree

Mode = Literal["balanced", "forward", "backward"]

# How much of the compromise goes to the gradient.
_GRADIENT_WEIGHT = {"forward": 0.0, "balanced": 0.5, "backward": 1.0}
# What a mode holds from end to end.
_HELD = {
    "forward": ("The signal's change", lambda forward, backward: forward),
    "balanced": ("Forward times backward", lambda forward, backward: forward * backward),
    "backward": ("The gradient's change", lambda forward, backward: backward),
}
# No kernel's output leaves the median by more, unless the whole network has to tilt.
_LARGEST_RATIO = 4.0
_LIMIT = 0.95 * math.log(_LARGEST_RATIO)  # what is aimed at
# A kernel that gets less than this part of the gradient that passes by stands in a branch
# that is switched off on purpose, by LayerScale or zeros.
_SMALLEST_SHARE = 0.01
# A sum that each block adds to may reach this many times the std that it starts with, as
# far as branches at a quarter of the level allow.
_STREAM_BOUND = 1.15
# By how much, in logarithms, signal and gradient may change from end to end, on average.
_END_BOUND = math.log(1.2)
# The levels of s that are tried where log g has more than a small variance at level 1, and
# to what part that has to fall.
_LEVELS = (0.25, 0.5, 2.0, 4.0, 8.0)
_SMALL_CHANGE = 0.1
_CLEAR_GAIN = 0.4
_MOST_PASSES = 12  # from there on
_TOLERANCE = 0.02  # of a logarithm


def calibrate(
    model: keras.Layer,
    x: Any,
    y: Any = None,
    loss: Any = None,
    *,
    mode: Mode = "balanced",
    layers: Sequence[keras.Layer | str] | None = None,
    seed: int = 0,
    training: bool = True,
    verbose: Literal["auto"] | bool = "auto",
) -> Table:
    """Scales each kernel by one factor, in place, so that signal and gradient hold.

    Glorot and Bengio ask that neither the variance of the signal nor that of the gradient
    changes from layer to layer. Their formula gives that for a chain of plain layers; here
    it is measured on the network as it is. With s the std of a kernel's output (before the
    activation) and g that of the gradient there, on this batch, the objective is

        sum over kernels of (1 - w) (log s - mean log s)² + w (log g - mean log g)²

    with w = 1/2 for `"balanced"`, 0 for `"forward"` and 1 for `"backward"`, as `fan_avg`,
    `fan_in` and `fan_out` are for the formula. A factor trades one for the other: along a
    path s times g is given by the structure, so at the least of the balanced objective
    s / g is the same everywhere, and forward times backward is 1.

    The geometric mean of s, the level, is 1, unless no sum passes by and the gradient
    changes much at level 1 and far less at another one from 1/4 to 8. It depends on the
    level how much an activation makes small differences grow: GELU and SiLU do it less at
    a high level, tanh at a low one. The last kernel, which makes the logits, has s = 1.

    Each pass sets the factors as the layers are called, one after the other, and then
    measures g. Start from the right fans: `initialize(model, "xavier_uniform")`.

    - Kernels of query and key get s = 1, so that the logits have unit variance; so do
      kernels before a sigmoid and the input kernels of recurrent layers.
    - Where blocks add to a sum, the last kernels of the branches are made smaller until
      the sum has at most 1.15 times the std that it starts with, but not below about 1/4:
      the sum of 48 branches then has twice that std. In the objective they count as if
      they were not smaller. Branches that end in a normalization layer have a scale of
      their own. A sum is known by an `Add` layer, by the `+` of a functional model, or by
      the normalization layer that reads it. A bare `+` in the `call` of a subclassed layer,
      with no normalization, is not seen: use `keras.layers.Add` there.
    - A first kernel stays as it is if a learned table, as of positions, is added to its
      output: in another proportion, the places could not be told apart.
    - Kernels in branches that are switched off on purpose (LayerScale, zeros) get s = 1.
    - Constants, frozen layers, embeddings and recurrent kernels stay as they are; a
      finding says so. A shared kernel has one factor, for the mean over its calls.
    - s stays within a factor of 4 of the median, unless the ends of the network differ
      more than that, by its structure.
    - Where these rules would leave a change from end to end of more than 1.2 (of forward,
      backward, or the root of their product, as the mode has it), the last kernel, then
      the first, makes up for it.

    All or nothing: after an error or an interrupt the kernels are as they were.

    Args:
        model: A built Keras model or layer.
        x: A batch like those it will be trained on: dozens of examples.
        y: Targets for `loss`.
        loss: What is differentiated, as in `propagate`. Without a loss,
            `sum(c * model(x))`, c random.
        mode: `"balanced"`, `"forward"` or `"backward"`.
        layers: Layers of the model, or their names, to which to limit the work.
        seed: Integer: which random c.
        training: Whether BatchNormalization uses the statistics of the batch, as training
            will. Dropout is off.
        verbose: Whether to show progress. `"auto"`: on a terminal, after a second.

    Returns:
        A `Table` with a row per kernel. Keys: `path`, `factor`; `std`, `gradient_std`:
        s and g, this relative to their geometric mean; `std_before`; `share`: the part of
        the gradient that it gets of what passes by; `target`: `"balanced"`, `"unit"`,
        `"off path"` or `""` (not scaled); `shape`, `layer`. The note has forward (s of the
        last kernel over the first) and backward (g of the first over the last).

    Raises:
        ValueError: If the model is not built, or the batch does not fit or can't tell: one
            example, or all alike, or not finite.
        TypeError: If an argument is of a wrong type.

    Example:

    >>> table = initialize(model, GlorotUniform(gain="auto"), seed=0)
    >>> table = calibrate(model, x)

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), equations
      8 and 9
    - [Mishkin & Matas, 2016](https://arxiv.org/abs/1511.06422), the forward pass alone
    """
    _check_mode(mode)
    batch = Batch.check(x, y, loss, seed)
    _check_tells(batch)
    weights = describe(model)
    selected = None if layers is None else select_layers(sublayers(model), layers)
    sites, left = _sites(model, weights, selected)
    if not sites:
        raise ValueError(
            "Argument `model` must have a kernel that may be scaled: one that is trainable "
            f"and was not made constant. Received: model={model}"
        )
    with progress("calibrate", verbose) as advance:
        measure = _Measurement(model, batch, sites, training)
        result = _solve(measure, mode, advance)
    _assign(sites, result.after.factors)
    return _table(result, left)


def measure_ends(
    model: keras.Layer, x: Any, training: bool = True, on_path: np.ndarray | None = None
) -> tuple[float, float, np.ndarray]:
    """Signal and gradient from end to end of the model as it is, and between which sites.

    `on_path` is what an earlier call returned, to measure between the same two kernels.
    """
    sites, _ = _sites(model, describe(model), None)
    seen = _Measurement(model, Batch.check(x), sites, training)(None)
    on_path = _on_path(sites, seen) if on_path is None else on_path
    return (*_ends(seen, on_path), on_path)


def _check_mode(mode: Any) -> None:
    if not isinstance(mode, str) or mode not in _GRADIENT_WEIGHT:
        raise ValueError(
            "Argument `mode` must be 'balanced', 'forward' or 'backward'. "
            f"Received: mode={mode!r}"
        )


def _check_tells(batch: Batch) -> None:
    arrays = [np.asarray(ops.convert_to_numpy(part)) for part in tree.flatten(batch.x)]
    varies = any((array != array[:1]).any() for array in arrays if array.size)
    if batch.size < 2 or not varies:
        raise ValueError(
            "Argument `x` must be a batch of several examples that differ, dozens of them: "
            f"nothing can be measured on one. Received: x of shape {arrays[0].shape}"
            + ("" if batch.size < 2 else ", with all examples alike")
        )


class _Site(NamedTuple):
    """A layer whose kernels are scaled: its output, before the activation, is measured."""

    path: str
    layer: Any  # that is called
    owner: Any  # that has the kernels: the same, or the one inside a TimeDistributed
    kernels: tuple[Weight, ...]
    is_unit: bool  # its std is to be 1, whatever the gradient


def _sites(
    model: keras.Layer, weights: list[Weight], selected: list[keras.Layer] | None
) -> tuple[list[_Site], list[tuple[Weight, str]]]:
    """What may be scaled, and what may not, with the reason."""
    loops = loops_around(model)
    selected_ids = None if selected is None else {id(layer) for layer in selected}
    by_owner: dict[int, list[Weight]] = {}
    left = []
    for weight in weights:
        variable = weight.variable
        is_float = keras.backend.is_float_dtype(variable.dtype)
        if weight.fans is None or not is_float or variable.name == "bias":
            continue
        if selected_ids is not None and id(weight.owner) not in selected_ids:
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
        sites.append(_Site(path, layer, owner, tuple(kernels), is_unit))
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
    if not np.any(backends.to_array(weight.variable)):
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


class _Measured(NamedTuple):
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
    added: Tensor  # the std of the output


class _Measurement:
    """Passes over the model in which each kernel is scaled as its layer is called."""

    def __init__(
        self, model: keras.Layer, batch: Batch, sites: list[_Site], training: bool
    ):
        self.model, self.batch, self.sites, self.training = model, batch, sites, training
        self.differentiate = differentiator(self._run)
        self.additions = additions(model)
        loops = loops_around(model)
        owners = [weight.owner for weight in describe(model) if _is_table(weight)]
        self.tables = [owner for owner in owners if id(owner) not in loops]
        self.unbiased = {i for i, site in enumerate(sites) if _is_unbiased(site)}
        self.passes = 0

    def __call__(self, targets: np.ndarray | None) -> _Measured:
        """One pass: with targets, the log std of each site's output, or as it is."""
        self.passes += 1
        free = np.float32(targets is not None)
        targets = np.zeros(len(self.sites)) if targets is None else targets
        signals, extras = self.differentiate(
            [variable.value for variable in self.model.variables],
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
    ) -> _Measured:
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
        return _Measured(
            signal, gradient, share, factors, order, self.stem, ends, start, stream
        )

    def _run(
        self,
        tap: Tap,
        values: list[Tensor],
        x: Any,
        targets: Tensor,
        free: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
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
        self.stem: int | None = None
        self.normalized: set[int] = set()
        variables = self.model.variables
        self.scope = keras.StatelessScope(zip(variables, values, strict=True))
        with self.scope, intercept(self.model, self._wrappers(), self.training):
            outputs = self.batch.call(self.model, x)
        one = ops.ones(())
        factors = [self.factors.get(i, one) for i in range(len(self.sites))]
        sums = list(self.sums.values()) or [_Sum(one, 0 * one, None, one)]
        self.added = [each.site for each in sums]
        return self.batch.objective(outputs), [
            ops.stack(self.stds),
            ops.stack(factors),
            ops.stack([each.std for each in sums]),
            ops.stack([each.added for each in sums]),
        ]

    def _wrappers(self) -> dict[int, Callable]:
        wrappers: dict[int, Callable] = {}
        normalizations = [
            layer for layer in sublayers(self.model) if is_normalization(layer)
        ]
        for layer in normalizations:
            wrappers[id(layer)] = functools.partial(self._observe_normalization, layer)
        for layer in self.tables:
            wrappers[id(layer)] = self._observe_table
        for addition in self.additions:
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
        return outputs

    def _observe_addition(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        terms = [tensor for tensor in tree.flatten((args, kwargs)) if is_float(tensor)]
        if len(terms) > 1:
            stds = ops.stack([_std(tensor) for tensor in terms])
            self._note_sum(outputs, ops.max(stds))
        return outputs

    def _observe_normalization(self, layer, call, *args: Any, **kwargs: Any) -> Any:
        """What goes in is a sum, unless a site put it out; in DenseNet, it is not."""
        first = _first_float((args, kwargs))
        if id(first) in self.outputs:
            self.normalized.add(self.outputs[id(first)][1])
        elif first is not None and not (self.additions or _is_batch(layer)):
            self._note_sum(first)
        return call(*args, **kwargs)

    def _note_sum(self, total: Tensor, start: Tensor | None = None) -> None:
        """The last site that was called is what is added."""
        if id(total) in self.sums or id(total) in self.outputs:
            return
        if not self.sums and start is not None:
            self.sums[id(start)] = _Sum(start, start, None, start)
        site = self.calls[-1] if self.calls else None
        last, _ = next(reversed(self.outputs.values()), (total, None))
        self.sums[id(total)] = _Sum(total, _std(total), site, _std(last))

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

    def _factor(self, i: int, site: _Site, std: Tensor) -> Tensor:
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


def _is_affine(site: _Site) -> bool:
    """Whether the output is `activation(kernel * x + bias)`."""
    if site.layer is not site.owner or not isinstance(site.owner, _AFFINE):
        return False
    of_keras = type(site.owner).call in {layer.call for layer in _AFFINE}
    return of_keras and site.owner.quantization_mode is None


def _is_unbiased(site: _Site) -> bool:
    """Whether it is so without a bias, or with one that is zero."""
    bias = getattr(site.owner, "bias", None)
    return _is_affine(site) and (bias is None or not np.any(backends.to_array(bias)))


def _first_float(structure: Any) -> Tensor | None:
    tensors = tree.flatten(structure)
    return next((t for t in tensors if is_float(t) and math.prod(t.shape)), None)


def _std(tensor: Tensor) -> Tensor:
    """In float32, and scaled so that squares neither vanish nor overflow."""
    values = ops.cast(ops.stop_gradient(tensor), "float32")
    scale = ops.max(ops.abs(values))
    scale = ops.where(scale > 0, scale, 1.0)
    return ops.std(values / scale) * scale


class _Result(NamedTuple):
    """The pass before, the best pass after, and what it aimed at."""

    mode: Mode
    sites: list[_Site]
    before: _Measured
    after: _Measured
    on_path: np.ndarray  # which sites take part in the compromise
    passes: int


def _solve(
    measure: _Measurement, mode: Mode, advance: Callable[[float, str], None]
) -> _Result:
    """The objective at its least, on the level where the gradient changes least."""
    advance(0.0, "as it is")
    before = measure(None)
    level = _level(measure, before, advance)
    seen, on_path = _converge(measure, before, _GRADIENT_WEIGHT[mode], level, advance)
    return _Result(mode, measure.sites, before, seen, on_path, measure.passes)


def _base(sites: list[_Site], seen: _Measured, level: float) -> np.ndarray:
    """Log targets: the level, but 1 for units and for the logits, the last kernel.

    The stem stays as it is, in proportion to what is added to it.
    """
    base = np.array([0.0 if site.is_unit else level for site in sites])
    if seen.order[-1] not in seen.ends:
        base[seen.order[-1]] = 0.0
    if seen.stem is not None:
        base[seen.stem] = seen.signal[seen.stem]
    return base


def _level(
    measure: _Measurement, before: _Measured, advance: Callable[[float, str], None]
) -> float:
    """The log std at which, with the signal level, the gradient changes least."""

    def change(level: float) -> float:
        advance(measure.passes / _MOST_PASSES, f"level {level:g}")
        seen = measure(_base(measure.sites, before, math.log(level)))
        on_path = _on_path(measure.sites, seen)
        return float(np.var(seen.gradient[on_path])) if on_path.any() else 0.0

    # A sum carries signal and gradient past the activations, at whatever level.
    at_one = 0.0 if before.ends else change(1.0)
    if at_one < _SMALL_CHANGE:
        return 0.0
    changes = {level: change(level) for level in _LEVELS}
    best = min(changes, key=changes.__getitem__)
    return math.log(best) if changes[best] < _CLEAR_GAIN * at_one else 0.0


def _converge(
    measure: _Measurement,
    before: _Measured,
    weight: float,
    level: float,
    advance: Callable[[float, str], None],
) -> tuple[_Measured, np.ndarray]:
    """Passes until s and g are in their proportion everywhere, or nothing improves."""
    sites = measure.sites
    base = wanted = aim = _base(sites, before, level)
    # A shared layer's first call, or an unusual layer, is set off from what is wanted.
    offset = np.zeros(len(sites))
    ends, small = None, 0.0
    best, best_fit, best_wanted, step = None, math.inf, wanted, 1.0
    for _ in range(_MOST_PASSES):
        seen = measure(wanted + offset)
        on_path = _on_path(sites, seen)
        ends = _small_ends(sites, seen) if ends is None else ends
        missed = np.where(np.isfinite(seen.signal), seen.signal - wanted, 0.0)
        offset = np.clip(offset - missed, -5, 5)
        misfit, compromise = _compromise(seen, on_path, weight, level, small * ends)
        change = _excess(seen, level, small) if ends.any() else 0.0
        end = _end_excess(seen, on_path, weight, seen.signal)
        fit = math.hypot(misfit, float(np.abs(missed).max()), change, end)
        advance(measure.passes / _MOST_PASSES, f"worst ratio {math.exp(fit):.3g}")
        if best is None or fit < best_fit:
            step = 1.0 if fit < 0.8 * best_fit else 0.5 * step
            best, best_fit, best_wanted = (seen, on_path), fit, wanted
            small += change
            aim = np.where(on_path, compromise, base) + small * ends
            aim = _hold_ends(aim, seen, on_path, weight)
        else:
            step *= 0.5
        if best_fit < _TOLERANCE or step < 0.25:
            break
        wanted = best_wanted + step * (aim - best_wanted)
    assert best is not None
    return best


def _small_ends(sites: list[_Site], seen: _Measured) -> np.ndarray:
    """1 for the ends of branches that are made smaller; 0 elsewhere."""
    is_small = [i for i in seen.ends if not sites[i].is_unit]
    ends = np.zeros(len(sites))
    ends[is_small] = seen.share[is_small] > _SMALLEST_SHARE
    return ends


def _excess(seen: _Measured, level: float, small: float) -> float:
    """By how much, in logarithms, the ends of branches have to change for the bound."""
    start = max(math.exp(level), seen.start)
    grown = seen.stream**2 - start**2
    if not 0 < grown < math.inf:
        return -small
    change = 0.5 * math.log((_STREAM_BOUND**2 - 1) * start**2 / grown)
    return float(np.clip(small + change, -_LIMIT, 0.0)) - small


def _hold_ends(
    aim: np.ndarray, seen: _Measured, on_path: np.ndarray, weight: float
) -> np.ndarray:
    """The same targets, but for the last kernel, else the first, that keep the ends level.

    Limits, and what is small on purpose, would leave a change from end to end.
    """
    aim = aim.copy()
    path = _path(seen, on_path)
    if path:
        middle = float(np.median(aim[path]))
        for i, sign in (path[-1], -1), (path[0], 1):
            change = _end_excess(seen, on_path, weight, aim)
            low, high = min(aim[i], middle - _LIMIT), max(aim[i], middle + _LIMIT)
            aim[i] = np.clip(aim[i] + sign * change, low, high)
    return aim


def _end_excess(
    seen: _Measured, on_path: np.ndarray, weight: float, signal: np.ndarray
) -> float:
    """How far beyond the bound signal and gradient change from end to end, on average."""
    forward, backward = _log_ends(seen, on_path, signal)
    change = (1 - weight) * forward + weight * backward
    return float(change - np.clip(change, -_END_BOUND, _END_BOUND))


def _log_ends(
    seen: _Measured, on_path: np.ndarray, signal: np.ndarray
) -> tuple[float, float]:
    """Log of what signal, and of what gradient, is at the end over what it started with.

    With a log signal as given: at a kernel, signal times gradient stays as it is.
    """
    path = _path(seen, on_path)
    if not path:
        return 0.0, 0.0
    first, last = path[0], path[-1]
    with np.errstate(invalid="ignore"):
        gradient = seen.signal + seen.gradient - signal
        return signal[last] - signal[first], gradient[first] - gradient[last]


def _path(seen: _Measured, on_path: np.ndarray) -> list[int]:
    """The sites that take part in the compromise, in order of their calls."""
    return [i for i in seen.order if on_path[i]]


def _on_path(sites: list[_Site], seen: _Measured) -> np.ndarray:
    """Where the gradient counts: not in branches that are switched off, nor at the end."""
    balanced = np.array([not site.is_unit for site in sites])
    on_path = balanced & (seen.share > _SMALLEST_SHARE) & np.isfinite(seen.gradient)
    on_path[seen.order[-1]] = False  # what follows it is the loss
    if seen.stem is not None:
        on_path[seen.stem] = False
    return on_path


def _compromise(
    seen: _Measured, on_path: np.ndarray, weight: float, level: float, small: np.ndarray
) -> tuple[float, np.ndarray]:
    """How far s and g are from the compromise, and log targets nearer to it.

    Where s is small on purpose, it counts as if it were not.
    """
    if on_path.sum() < 2:
        return 0.0, np.full(len(on_path), level)
    s = seen.signal - small
    g = seen.gradient - seen.gradient[on_path].mean()
    compromise = weight * (s + g)
    compromise += level - compromise[on_path].mean()
    path = _path(seen, on_path)
    tilt = weight * abs((s + g)[path[0]] - (s + g)[path[-1]])
    limit = max(_LIMIT, 0.6 * tilt)
    middle = float(np.median((compromise + small)[on_path]))
    compromise = np.clip(compromise + small, middle - limit, middle + limit) - small
    misfit = ((1 - weight) * s - weight * g)[on_path]
    return float(misfit.std()), compromise


def _assign(sites: list[_Site], factors: np.ndarray) -> None:
    """Writes the scaled kernels; puts the old ones back if that fails."""
    done: list[tuple[keras.Variable, np.ndarray]] = []
    try:
        for site, factor in zip(sites, factors, strict=True):
            for weight in site.kernels:
                old = backends.to_array(weight.variable)
                done.append((weight.variable, old))
                power = float(factor) ** (1 / len(site.kernels))
                new = old.astype(np.promote_types(old.dtype, np.float32)) * power
                backends.assign(weight.variable, new.astype(old.dtype))
    except BaseException:
        for variable, old in done:
            backends.assign(variable, old)
        raise


def _table(result: _Result, left: list[tuple[Weight, str]]) -> Table:
    rows = [
        _row(result, i, weight)
        for i, site in enumerate(result.sites)
        for weight in site.kernels
    ]
    findings = [
        Finding("info", "not-scaled", weight.path, f"Not scaled: {reason}.", "")
        for weight, reason in left
    ]
    columns = ("path", "factor", "std_before", "std", "gradient_std", "target", "shape",
               "share", "layer")  # fmt: skip
    forward, backward = _ends(result.after, result.on_path)
    old_forward, old_backward = _ends(result.before, result.on_path)
    note = (
        f"Signal {forward:.3g}, gradient {backward:.3g} from end to end, before "
        f"{old_forward:.2g} and {old_backward:.2g}. Structure's ratio "
        f"{forward / backward:.3g}; largest sum {result.after.stream:.3g}; "
        f"{result.passes} passes."
    )
    return Table("calibrate", rows, findings + _findings(result), columns, note)


def _row(result: _Result, i: int, weight: Weight) -> Row:
    site, after = result.sites[i], result.after
    called = not math.isnan(after.signal[i])
    reached = called and math.isfinite(after.gradient[i])
    middle = after.gradient[result.on_path].mean() if result.on_path.any() else 0.0
    target = "balanced" if result.on_path[i] else "off path"
    if site.is_unit or i == after.order[-1]:
        target = "unit"
    if i == after.stem or not called:
        target = ""
    return {
        "path": weight.path,
        "factor": float(after.factors[i] ** (1 / len(site.kernels))),
        "std_before": math.exp(result.before.signal[i]) if called else None,
        "std": math.exp(after.signal[i]) if called else None,
        "gradient_std": math.exp(after.gradient[i] - middle) if reached else None,
        "share": min(1.0, float(after.share[i])),
        "target": target,
        "shape": weight.shape,
        "layer": type(site.owner).__name__,
    }


def _ends(seen: _Measured, on_path: np.ndarray) -> tuple[float, float]:
    """Signal of the last kernel over the first; gradient of the first over the last."""
    forward, backward = _log_ends(seen, on_path, seen.signal)
    with np.errstate(over="ignore"):
        return float(np.exp(forward)), float(np.exp(backward))


def _findings(result: _Result) -> list[Finding]:
    found = []
    sites, after = result.sites, result.after
    forward, backward = _ends(after, result.on_path)
    path = _path(after, result.on_path)
    name, held = _HELD[result.mode]
    value = held(forward, backward)
    if path and not 0.5 <= value <= 2:
        message = (
            f"{name} is {value:.2g}, not 1: the signal changes {forward:.2g}x from "
            f"{sites[path[0]].path} to here, the gradient {backward:.2g}x on its way back."
        )
        advice = "Add normalization layers or residual connections."
        found.append(Finding("warning", "unreached", sites[path[-1]].path, message, advice))
    ratio = forward / backward
    growths = [_growth(sites[i]) for i in path]
    total = math.prod(growths)
    if path and ratio < 0.25 and total > 10:
        message = (
            f"Its activation lets a deviation grow {max(growths):.3g}x per layer "
            f"(chi) even where the signal is level: up to {total:.2g}x over "
            f"{len(growths)} kernels."
        )
        advice = (
            "No scale of the kernels changes that: use fewer layers, residual connections, "
            "normalization layers, or another activation, such as 'relu'."
        )
        path_of = sites[path[int(np.argmax(growths))]].path
        found.append(Finding("warning", "unstable-activation", path_of, message, advice))
    for i, site in enumerate(sites):
        if math.isnan(after.signal[i]):
            reason = "Not scaled: its layer was not called."
            found.append(Finding("info", "not-scaled", site.path, reason, ""))
        elif after.signal[i] == -math.inf:
            reason = "Not scaled: its output is zero on this batch."
            found.append(Finding("info", "not-scaled", site.path, reason, ""))
        elif i == after.stem:
            reason = "Not scaled: a learned table, such as of positions, is added to it."
            found.append(Finding("info", "not-scaled", site.path, reason, ""))
        elif after.share[i] <= _SMALLEST_SHARE and not site.is_unit:
            message = (
                f"It gets {after.share[i]:.1g} of the gradient that passes by, as if "
                "switched off on purpose: only its signal was set."
            )
            found.append(Finding("info", "off-path", site.path, message, ""))
    return found


def _growth(site: _Site) -> float:
    activation = site.kernels[0].activation
    return activation_growth(activation) if activation else 1.0
