"""`calibrate`: signal, gradient and the likeness of examples, held by measurement."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._backends.signals import is_float
from keras_glorot._models.kernels import Flow, flow_of_model
from keras_glorot._models.pairs import fitting_levels
from keras_glorot._models.passes import Batch
from keras_glorot._models.progress import progress
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.layer_rules import activation_name
from keras_glorot.tables import Finding, Layout, Row, Table
from keras_glorot.tables.plots import STDS
from keras_glorot.tools._scaling import (
    ScaledLayer,
    ScalingPass,
    ScalingPasses,
    find_scaled_layers,
    scaled,
)

__all__ = ["calibrate"]


# The levels that are tried: the std of a hidden kernel's output.
_LEVELS = (1.0, 0.5, 0.2, 0.05)
# From the first kernel to the last, signal and gradient hold within this factor, and the
# mean cosine of examples within this difference.
_MOST_CHANGE = math.log(2)
_MOST_DRIFT = 0.2
# A level is worth it if the cosine changes by no more than this part of what it did.
_NEARER = 0.75
# Lower ones come later where the cosine changes by more than this part of what it did.
_SAME = 0.95
# By how much more than before the cosine may change where signal and gradient become level:
# in random kernels of 128 units, 50 layers change it by as much by chance.
_SLACK = 0.3
# An output of the model that other kernels build on keeps its std if that is larger: else
# the signal has vanished before it.
_SMALLEST_OUTPUT = 0.1
_FEWEST_EXAMPLES = 4
_FEWEST_KERNELS = 4


def calibrate(
    model: keras.Layer,
    x: Any,
    y: Any = None,
    loss: Any = None,
    *,
    layers: Sequence[keras.Layer | str] | None = None,
    seed: int = 0,
    training: bool = True,
    verbose: Literal["auto"] | bool = "auto",
) -> Table:
    """Scales each kernel by one factor, in place, so that signal and gradient hold.

    Three things are to be the same at the first kernel of a network and at the last one:
    the std s of the kernels' outputs (before the activation), the length g of the gradient
    there, and the mean cosine between two examples. They are measured on one half of the
    batch. The factors stand the test on the other half and on the first one times 1.01, or
    no kernel is changed, and a finding names the part of the model that is the cause.

    - Each hidden kernel gets an output of the same std, the level. By Euler's theorem, s
      times g is then the same all along a chain whose activations keep factors, as ReLU
      does and every smooth one near zero: the gradient holds where the signal does.
    - The level is the highest of 1, 0.5, 0.2 and 0.05 at which all three hold, or 1 where
      a lower one makes nothing better. GELU and SiLU let small differences grow, and tanh
      too, the more the higher the level is. Along a chain, the signal may then change by
      the root of what the gradient does.
    - The isometric start gives each activation a level of its own: 100 before ELU, 1 before
      ReLU, 0.3 before tanh. Where kernels before different ones have these stds, all of
      this is in units of them.
    - In a residual sum of n branches, their last kernels get 1 / (2 sqrt(n)).
    - Kernels before an output of the model, a softmax or a gate, and the input kernels of
      recurrent layers keep their scale, as far as the std stays below 1. At a low level
      they make up for it. An output of the model that other kernels take, as the mean of a
      latent variable, is not made larger than it is (or 0.1).
    - No kernel gets a gain (std of its output over the root mean square of its input) above
      2.5, and above 1 behind a mean over positions: that makes a signal smaller on purpose.

    A model in which all three hold already is left as it is: signal and gradient change by
    less than 2, the cosine by less than 0.2. So are models that no level makes better, such
    as those with a normalization layer behind each kernel. They are told without kernels
    whose output branches are added to: these have the gradient of the whole sum.
    Start from the right fans: `initialize(model, "xavier_uniform")`, or `"isometric"`.

    These stay as they are, and a finding says so: constants, frozen layers, embeddings and
    recurrent kernels; kernels with a constraint on their size; those that the output of
    their layer does not follow, as with weight standardization; those that their author
    scaled for a periodic activation; a first kernel to whose output a learned table, as of
    positions, is added; layers that are called in a loop, derivative or program that the
    backend traces. The first call of a shared kernel decides over its factor.

    All or nothing: after an error or an interrupt the kernels are as they were.

    Args:
        model: A built Keras model or layer.
        x: A batch like those it will be trained on, as in `propagate`: dozens of examples.
        y: Targets for `loss`. Give both or neither.
        loss: The function to differentiate, as in `propagate`. Without one it is
            `sum(c * model(x))`, where c is random.
        layers: Layers of the model, or their names, to which to limit the work.
        seed: An integer: the same one gives the same c.
        training: Whether BatchNormalization uses the statistics of the batch, as training
            will. Dropout is off.
        verbose: Whether to show progress. `"auto"`: on a terminal, after a second.

    Returns:
        A `Table` with a row per kernel, measured on the model as it is afterwards, on the
        half that the factors do not come from. Keys: `path`, `factor`; `std_before` and
        `std`: s; `gradient_std`: g, over its geometric mean; `likeness`: the mean cosine of
        two examples; `role`: `"hidden"`, `"branch"` (the end of one) or `"bounded"` (before
        an output, a softmax or a gate); `shape`, `layer`. The note tells all three from
        end to end, by straight lines through the logarithms of s and g.

    Raises:
        ValueError: If the model is not built or not finite, the batch does not fit, or
            nothing can be measured on it: fewer than four examples, or all alike.
        TypeError: If an argument is of a wrong type, or `x` does not hold numbers.

    Example:

    >>> table = initialize(model, GlorotUniform(gain="auto"), seed=0)
    >>> table = calibrate(model, x)

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), equations
      8 and 9
    - [Mishkin & Matas, 2016](https://arxiv.org/abs/1511.06422), the signal alone
    - [Schoenholz et al., 2017](https://arxiv.org/abs/1611.01232), the likeness of examples
    """
    batch, survey = Batch.check(x, y, loss, seed), Survey(model)
    _check_tells(batch)
    selected = survey.select(layers)
    flow = flow_of_model(survey, batch, training)
    found, left = find_scaled_layers(survey, selected, flow)
    if not found:
        raise ValueError(
            "Argument `model` must have a kernel that may be scaled: one that is trainable "
            f"and was not made constant. Received: model={model}"
        )
    with progress("calibrate", verbose) as advance:
        result = _measure(survey, batch, found, flow, training, advance)
    table, after = _table(result, left, flow), result.after
    before: list[tuple[keras.Variable, Any]] = []
    try:
        for layer, factor in zip(after.layers, after.factors, strict=True):
            for weight in layer.kernels if factor != 1 else ():
                before.append((weight.variable, backends.held_value(weight.variable)))
                value = scaled(weight.variable, layer.part(factor))
                backends.assign(weight.variable, value)
        return table  # within, so that an interrupt in this last moment is caught too
    except BaseException:
        for variable, old in before:
            backends.assign(variable, old)
        raise


def _check_tells(batch: Batch) -> None:
    parts = keras.tree.flatten(batch.x)
    arrays = [np.asarray(keras.ops.convert_to_numpy(part)) for part in parts]
    varies = any((array != array[:1]).any() for array in arrays if array.size)
    if batch.size < _FEWEST_EXAMPLES or not varies:
        raise ValueError(
            "Argument `x` must be a batch of several examples that differ, dozens of them: "
            "one half is measured on, the other half tests the result. "
            f"Received: x of shape {arrays[0].shape}"
            + (", with all examples alike" if len(arrays[0]) > 1 and not varies else "")
        )


def _halves(batch: Batch) -> list[Batch]:
    """Every second example, and the others; as many of them."""
    count = batch.size // 2

    def half(start: int, structure: Any) -> Any:
        def cut(array: Any) -> Any:
            is_batch = getattr(array, "shape", ())[:1] == (batch.size,)
            return array[start : start + 2 * count : 2] if is_batch else array

        return keras.tree.map_structure(cut, structure)

    return [batch._replace(x=half(i, batch.x), y=half(i, batch.y)) for i in (0, 1)]


def _grown(batch: Batch) -> Batch:
    """The same examples, a hundredth larger."""

    def grow(array: Any) -> Any:
        return array * 1.01 if is_float(array) else array

    return batch._replace(x=keras.tree.map_structure(grow, batch.x))


class _Change(NamedTuple):
    """The changes of signal, gradient and likeness from the first kernel to the last.

    Attributes:
        signal: Log of the factor on the std of the kernels' outputs.
        gradient: The same of the gradient's length, on its way back.
        likeness: The mean cosine of two examples at the first hidden kernel, and the last.
        excess: Log of the largest std before a head, a softmax or a gate; 0 if below 1.
        is_finite: Whether all of it is, and no output is zero.
        kernels: How many hidden kernels these are.
    """

    signal: float
    gradient: float
    likeness: tuple[float, float]
    excess: float
    is_finite: bool
    kernels: int

    @property
    def is_level(self) -> bool:
        """Whether signal and gradient hold."""
        both = self.signal + self.gradient
        most = max(abs(self.signal), abs(self.gradient), abs(both), self.excess)
        return self.is_finite and most <= _MOST_CHANGE

    @property
    def drift(self) -> float:
        """By how much examples become alike, or unlike."""
        return abs(self.likeness[1] - self.likeness[0])

    def is_held(self, most_drift: float) -> bool:
        return self.is_level and self.drift <= most_drift

    def __str__(self) -> str:
        if not self.is_finite:
            return "the signal overflows or vanishes on its way"
        with np.errstate(over="ignore"):
            signal, gradient = np.exp([self.signal, self.gradient])
        first, last = self.likeness
        return (
            f"signal {signal:.2g}x, gradient {gradient:.2g}x, likeness {first:.2g} to "
            f"{last:.2g}"
        )


class _Attempt(NamedTuple):
    """A pass with kernels scaled to a level, and the changes of the three in it."""

    level: float
    seen: ScalingPass
    change: _Change


class _Result(NamedTuple):
    """The attempts, and the one that is kept.

    Attributes:
        unseen: The layers of which not all calls are seen.
        was: As the model was.
        fresh: Scaled, on examples that the factors do not come from; None if nothing is to
            be scaled.
        failed: The last attempt that did not hold; None if all three hold as they are.
        passes: How many there were.
    """

    unseen: list[ScaledLayer]
    was: _Attempt
    fresh: _Attempt | None
    failed: _Attempt | None
    passes: int

    @property
    def after(self) -> ScalingPass:
        """The model as it will be."""
        return (self.fresh or self.was).seen


def _measure(
    survey: Survey,
    batch: Batch,
    found: list[ScaledLayer],
    flow: Flow,
    training: bool,
    advance: Callable[[float, str], None],
) -> _Result:
    """All passes, each on half of the batch."""
    half, other = _halves(batch)
    advance(0.0, "as it is")
    run, before, unseen = _first_pass(survey, half, found, training)
    was = _attempt(0.0, before)
    fresh, failed = None, None
    most = max(_MOST_DRIFT, was.change.drift + _SLACK)
    for attempt in _candidates(run, half, was, most, flow, advance):
        tests = []
        if not _is_starved(attempt) and attempt.change.is_held(most):
            passes = [run(each, like=attempt.seen) for each in (other, _grown(half))]
            tests = [_attempt(attempt.level, each) for each in passes]
        bad = [each for each in (attempt, *tests) if not each.change.is_held(most)]
        bad += [each for each in tests if _differ(each.seen, attempt.seen)]
        if tests and not bad:
            if was.change.is_level and attempt.change.drift > _NEARER * was.change.drift:
                failed = attempt  # the model holds what can be held
            else:
                fresh = tests[0]
            break
        failed = (bad or [attempt])[0]
    return _Result(unseen, was, fresh, failed, run.passes)


def _candidates(
    run: ScalingPasses,
    half: Batch,
    was: _Attempt,
    most: float,
    flow: Flow,
    advance: Callable[[float, str], None],
) -> Iterator[_Attempt]:
    """Attempts in the order in which they are worth a test on other examples."""
    later: list[_Attempt] = []
    is_sound = was.change.is_level and was.change.drift <= _MOST_DRIFT
    # Residual sums carry all three past the activations, whatever the level.
    levels = [] if is_sound else _LEVELS[:1] if flow.sums else _LEVELS
    for i, level in enumerate(levels):
        advance((1 + i) / (1 + len(levels)), f"level {level:g}")
        aims = _aims(was.seen, level)
        attempt = _scale(run, half, level, aims, None if flow.sums else most)
        _check_finite(run.recorder.survey.root, was.seen, attempt.seen)
        drift = attempt.change.drift
        if _is_starved(attempt):
            yield attempt
            break
        if later and drift > _SAME * later[-1].change.drift:
            yield from reversed(later)
            later.clear()
        if drift <= _MOST_DRIFT or not attempt.change.is_held(most):
            yield attempt
        elif not later or drift <= _NEARER * later[-1].change.drift:
            later.append(attempt)  # a lower level may be better still
    yield from reversed(later)


def _check_finite(model: keras.Layer, before: ScalingPass, after: ScalingPass) -> None:
    """An error where even the scaled model does not give numbers."""
    if before.is_finite or after.is_finite:
        return
    wrong = [i for i in after.order if not after.signal[i] < math.inf]
    place = f"At {after.layers[wrong[0]].path}" if wrong else "Behind the last kernel"
    raise ValueError(
        "Argument `model` must give finite values on `x`, whatever the scale of its "
        f"kernels. {place} they are not: look for weights that are not finite with "
        f"`audit(model)`. Received: model={model}"
    )


def _aims(was: ScalingPass, level: float) -> np.ndarray:
    """The std that each output is to have or, of a bounded one, the largest size.

    An output that other kernels build on keeps its own: these make up for it.
    """
    own = np.clip(np.exp(np.nan_to_num(was.signal)), _SMALLEST_OUTPUT, 1.0)
    aims = [each.share * each.own_level if each.share else 0.0 for each in was.layers]
    bounds = np.where([each.leads_on for each in was.layers], own, 1.0)
    return np.where(aims, level * np.array(aims), bounds)


def _scale(
    run: ScalingPasses, half: Batch, level: float, aims: np.ndarray, most: float | None
) -> _Attempt:
    """Scaled to a level; along a chain the signal takes half of the gradient's change.

    A factor changes both alike: their ratio is as the structure has it. `most` is the drift
    of a chain up to which that is worth a pass.
    """
    attempt = _attempt(level, run(half, level, aims))
    change = attempt.change.gradient
    is_near = _MOST_CHANGE / 2 < abs(change) < 2 * _MOST_CHANGE
    if most is not None and is_near and attempt.change.drift <= most:
        path = attempt.seen.path
        aims[path] *= np.exp(-change / 2 * np.linspace(-0.5, 0.5, len(path)))
        attempt = _attempt(level, run(half, level, aims))
    return attempt


def _attempt(level: float, seen: ScalingPass) -> _Attempt:
    return _Attempt(level, seen, _change(seen, level > 0))


def _differ(one: ScalingPass, other: ScalingPass) -> bool:
    """Whether the output of a hidden kernel has another std on other examples."""
    with np.errstate(invalid="ignore"):
        off = np.abs(one.signal - other.signal)[one.hidden]
    return bool((off > _MOST_CHANGE).any())


def _is_starved(attempt: _Attempt) -> bool:
    """Whether no sound gain makes up for the small input of the first hidden kernel."""
    seen = attempt.seen
    for i in seen.hidden[:1]:
        aim = _aims(seen, attempt.level)[i]
        return bool(math.exp(seen.signal[i]) < aim / 2)
    return False


def _first_pass(
    survey: Survey, half: Batch, found: list[ScaledLayer], training: bool
) -> tuple[ScalingPasses, ScalingPass, list[ScaledLayer]]:
    """The pass before, over those layers of which each call is seen, and the others."""
    run = ScalingPasses(survey, found, training)
    first = run(half)
    hidden = {id(layer) for layer in run.recorder.unseen}
    unseen = [each for each in found if id(each.layer) in hidden]
    if unseen:
        seen = [each for each in found if id(each.layer) not in hidden]
        run = ScalingPasses(survey, seen, training)
        first = run(half)
    if not first.order:
        raise ValueError(
            "Argument `model` must call a layer whose kernel may be scaled, outside of "
            "loops, derivatives and programs that the backend traces. "
            f"Received: model={survey.root}"
        )
    run.layers = _with_levels(first)
    return run, first._replace(layers=run.layers), unseen


def _with_levels(was: ScalingPass) -> list[ScaledLayer]:
    """The layers, those on the path with the levels that the model goes with."""
    layers, path = list(was.layers), was.path
    activations = [layers[i].kernels[0].activation for i in path]
    levels = fitting_levels(activations, np.exp(was.signal[path]))
    for i, level in zip(path, levels, strict=True):
        layers[i] = layers[i]._replace(own_level=level)
    return layers


def _change(seen: ScalingPass, is_scaled: bool) -> _Change:
    """By straight lines through the logarithms: in branches, one may differ widely."""
    layers, path = seen.layers, seen.path
    bounded = [seen.signal[i] for i in seen.order if layers[i].share is None]
    # The ends of branches are small on purpose.
    shares = [layers[i].share or 1.0 if is_scaled else 1.0 for i in path]
    aims = np.log(shares) + np.log([layers[i].own_level for i in path])
    alike = seen.likeness[path]
    alike = alike[np.isfinite(alike)]
    return _Change(
        _line(seen.signal[path] - aims),
        -_line(seen.gradient[path] + aims),
        (float(alike[0]), float(alike[-1])) if len(alike) else (0.0, 0.0),
        max([0.0, *bounded]),
        seen.is_finite and not np.isneginf(seen.signal).any(),
        len(path),
    )


def _line(values: np.ndarray) -> float:
    """By how much a straight line through them rises; nothing vanishes along a few."""
    count = len(values)
    if count < _FEWEST_KERNELS:
        return 0.0
    return float(np.polyfit(range(count), values, 1)[0] * (count - 1))


def _table(result: _Result, left: list[tuple[Weight, str]], flow: Flow) -> Table:
    after, layers = result.after, result.after.layers
    reason = "it is called in a loop, a derivative or a program that the backend traces"
    left = [*left, *((each, reason) for unseen in result.unseen for each in unseen.kernels)]
    for i, layer in enumerate(layers):
        reason = ""
        if i not in after.order:
            reason = "its layer was not called"
        elif result.was.seen.signal[i] == -math.inf:
            reason = "its output is zero on this batch"
        elif not after.follows[i]:
            reason = "the output of its layer does not change with it"
        left += [(weight, reason) for weight in layer.kernels if reason]
    findings = [
        Finding("info", "not-scaled", weight.path, f"Not scaled: {reason}.", "")
        for weight, reason in left
    ]
    columns = ("path", "factor", "std_before", "std", "gradient_std", "likeness", "role",
               "shape", "layer")  # fmt: skip
    middle = float(after.gradient[after.path].mean()) if after.path else 0.0
    rows = [
        _row(result, i, weight, middle)
        for i, layer in enumerate(layers)
        for weight in layer.kernels
    ]
    findings += _unreached(result, flow)
    layout = Layout(is_sequence=True, picture=STDS)
    return Table("calibrate", rows, findings, columns, _note(result, flow), layout)


def _row(result: _Result, i: int, weight: Weight, middle: float) -> Row:
    layer, before, after = result.after.layers[i], result.was.seen, result.after
    called = i in after.order
    alike = float(after.likeness[i])
    role = "bounded" if layer.share is None else "hidden" if layer.share == 1 else "branch"
    return {
        "path": weight.path,
        "factor": float(layer.part(after.factors[i])),
        "std_before": math.exp(before.signal[i]) if called else None,
        "std": math.exp(after.signal[i]) if called else None,
        "gradient_std": math.exp(after.gradient[i] - middle) if called else None,
        "likeness": alike if math.isfinite(alike) else None,
        "role": role,
        "shape": weight.shape,
        "layer": type(layer.owner).__name__,
    }


def _note(result: _Result, flow: Flow) -> str:
    """The verdict: the work that was done, and the changes of the three."""
    passes = f"Passes over half of the batch: {result.passes}."
    ends = "From the first kernel to the last, and back"
    was = result.was.change
    if result.fresh is None and result.failed is None and was.kernels < _FEWEST_KERNELS:
        return f"Nothing was scaled: {_TOO_FEW}. {passes}"
    if result.fresh is None:
        reason = "no scale holds more" if result.failed else "all three hold as they are"
        if result.failed and _is_normalized(result, flow):
            reason = "normalization layers undo the scale of the kernels"
        return f"Nothing was scaled: {reason}. {ends}: {result.was.change}. {passes}"
    return (
        f"Scaled to a std of {result.fresh.level:g}. {ends}, on examples that the factors "
        f"do not come from: {result.fresh.change} (before: {result.was.change}). {passes}"
    )


def _unreached(result: _Result, flow: Flow) -> list[Finding]:
    """The one of the three that does not hold, and the part that is the cause."""
    if result.fresh is None and result.failed is None:
        return []
    change = (result.fresh or result.was).change
    if change.is_held(_MOST_DRIFT):
        return []
    path, cause, advice = _cause(result, flow)
    if _is_normalized(result, flow):
        message = (
            f"No scale of the kernels changes this ({change}): a normalization layer "
            "follows each of them and undoes it. All are as they were, which is sound."
        )
        return [Finding("info", "unreached", path, message, "")]
    if result.failed is not None and result.fresh is None and not change.is_level:
        message = (
            f"No scale of the kernels holds on other examples ({result.failed.change}), "
            f"so all are as they were. The likely cause is {cause}."
        )
        return [Finding("warning", "unreached", path, message, advice)]
    first, last = change.likeness
    message = (
        f"The mean cosine of two examples goes from {first:.2g} to {last:.2g}, whatever "
        f"the scale of the kernels. The likely cause is {cause}."
    )
    return [Finding("info", "unreached", path, message, advice)]


def _is_normalized(result: _Result, flow: Flow) -> bool:
    """Whether normalization layers alone set the scale of the signal."""
    told = [each.layer for each in result.after.layers if each.is_told]
    return result.fresh is None and bool(told) and all(map(flow.is_normalized, told))


def _cause(result: _Result, flow: Flow) -> tuple[str, str, str]:
    """The path of a kernel, the part of the model there, and what to do."""
    attempt = result.failed or result.fresh or result.was
    layers, hidden = attempt.seen.layers, attempt.seen.hidden
    first = next(iter(hidden), attempt.seen.order[0])
    if _is_starved(attempt):
        cause = f"its small input: it would need a gain above {layers[first].largest_gain}"
        return layers[first].path, cause, "Scale the data, or embeddings, to a std near 1."
    for kind, cause in _CAUSES.items():
        for i in hidden:
            calls = flow.of_layer(layers[i].layer)
            sources = [kinds for each in calls for kinds in each.sources.values()]
            if any(kind in kinds for kinds in (*sources, *(each.kinds for each in calls))):
                return layers[i].path, cause, _ADVICE
    for i in hidden:
        activation = layers[i].kernels[0].activation
        if activation is not None:
            cause = f"the activation {activation_name(activation)}"
            return layers[i].path, cause, _ADVICE
    return layers[first].path, "the structure behind it", _ADVICE


_TOO_FEW = "signal and gradient come by fewer than four kernels with a scale that is free"
_ADVICE = (
    "Use `initialize(model, 'isometric')`, fewer layers, residual connections or "
    "normalization layers."
)
# By the kind of a step between kernels, the likeliest first.
_CAUSES = {
    "product": "a product of two signals, as in a gate, which doubles a relative change",
    "normalization": "a normalization layer, which undoes the scale of what it takes",
    "pooling": "a pooling over positions",
    "softmax": "a softmax, as in attention, which takes means",
}
