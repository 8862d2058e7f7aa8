"""`calibrate`: both of Glorot's constraints, held on the whole network by measurement."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._models.kernels import Flow, flow_of_model
from keras_glorot._models.passes import Batch
from keras_glorot._models.progress import progress
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.gains import activation_growth
from keras_glorot.tables import Finding, Layout, Row, Table
from keras_glorot.tables.plots import STDS_BY_KERNEL
from keras_glorot.tools._scaling import Measured, Measurement, Site, find_sites, scaled

__all__ = ["calibrate", "measure_ends"]


Mode = Literal["balanced", "forward", "backward"]

# How much of the compromise goes to the gradient.
_GRADIENT_WEIGHT = {"forward": 0.0, "balanced": 0.5, "backward": 1.0}
# What a mode holds from end to end.
_HELD = {
    "forward": ("The signal's change", lambda forward, backward: forward),
    "balanced": ("Forward times backward", lambda forward, backward: forward * backward),
    "backward": ("The gradient's change", lambda forward, backward: backward),
}
# No kernel's output leaves the median by more, unless the ends can't hold otherwise.
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
    a high level, tanh at a low one. Heads, from which no other kernel leads to an output
    of the model, have s = 1, or less where their author gave them a small std.

    Each pass sets the factors as the layers are called, one after the other, and then
    measures g. Start from the right fans: `initialize(model, "xavier_uniform")`.

    - Kernels that feed a softmax or a sigmoid get s = 1, such as those of query and key, so
      that the scores have unit variance; so do the input kernels of recurrent layers.
    - Where blocks add to a sum, the last kernels of the branches are made smaller until the
      sum has at most 1.15 times the std that it starts with, but not below about 1/4: the
      sum of 48 branches then has twice that std. The last of them may be larger, to hold
      the ends (see below). In the objective they count as if they were not smaller.
      Branches that end in a normalization layer have a scale of their own. Sums are known
      by the graph, also a bare `+` in the `call` of a layer. One is measured where a layer
      takes it or makes it. Of layers that can't be called without values, such as those
      that call the backend, only what goes in and out is seen.
    - A first kernel stays as it is if a learned table, as of positions, is added to its
      output: in another proportion, the places could not be told apart.
    - Kernels in branches that are switched off on purpose (LayerScale, zeros) get s = 1.
    - Constants, frozen layers, embeddings, recurrent kernels, and layers that are called in
      a loop, derivative or program that the backend traces stay as they are; a finding says
      so. A shared kernel has one factor, for the mean over its calls.
    - s stays within a factor of 4 of the median, unless the ends can't hold otherwise.
    - From end to end nothing changes by more than a factor of about 1.2: not forward in
      mode `"forward"`, backward in `"backward"`, and the root of their product in
      `"balanced"`. Where the rules above leave more, the last kernel makes up for it, then
      the first.

    All or nothing: after an error or an interrupt the kernels are as they were.

    Args:
        model: A built Keras model or layer.
        x: A batch like those it will be trained on, as in `propagate`: dozens of examples.
        y: Targets for `loss`. Give both or neither.
        loss: What is differentiated, as in `propagate`. Without one it is
            `sum(c * model(x))`, where c is random.
        mode: `"balanced"`, `"forward"` or `"backward"`.
        layers: Layers of the model, or their names, to which to limit the work.
        seed: An integer: the same one gives the same c.
        training: Whether BatchNormalization uses the statistics of the batch, as training
            will. Dropout is off.
        verbose: Whether to show progress. `"auto"`: on a terminal, after a second.

    Returns:
        A `Table` with a row per kernel. Keys: `path`, `factor`; `std`, `gradient_std`:
        s and g, this relative to their geometric mean; `std_before`; `share`: the part of
        the gradient that it gets of what passes by; `target`: `"balanced"`, `"unit"`,
        `"small"` (a head), `"off path"` or `""` (not scaled); `shape`, `layer`. The note
        has forward (s of the last kernel over the first), backward (g of the first over
        the last), and what the mode holds of them.

    Raises:
        ValueError: If the model is not built or not finite, the batch does not fit, or
            nothing can be measured on it: one example, or all alike, or not finite.
        TypeError: If an argument is of a wrong type, or `x` does not hold numbers.

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
    survey = Survey(model)
    selected = survey.select(layers)
    flow = flow_of_model(survey, batch, training)
    sites, left = find_sites(survey, selected, flow)
    if not sites:
        raise ValueError(
            "Argument `model` must have a kernel that may be scaled: one that is trainable "
            f"and was not made constant. Received: model={model}"
        )
    with progress("calibrate", verbose) as advance:
        advance(0.0, "as it is")
        measure, first = _first_pass(survey, batch, flow, sites, training)
        left += _unseen(sites, measure.sites)
        result = _solve(measure, first, mode, advance)
        _check_finite(model, result)
    table = _table(result, left)
    before: list[tuple[keras.Variable, Any]] = []
    try:
        for site, factor in zip(result.sites, result.after.factors, strict=True):
            for weight in site.kernels:
                before.append((weight.variable, backends.held_value(weight.variable)))
                scale = functools.partial(scaled, site, factor)
                backends.assign(weight.variable, backends.map_parts(weight.variable, scale))
        return table  # within, so that an interrupt in this last moment is caught too
    except BaseException:
        for variable, old in before:
            backends.assign(variable, old)
        raise


def _first_pass(
    survey: Survey,
    batch: Batch,
    flow: Flow,
    sites: list[Site],
    training: bool,
) -> tuple[Measurement, Measured]:
    """The pass before, over those sites of which each call is seen."""
    measure = Measurement(survey, batch, flow, sites, training)
    before = measure(None)
    unseen = {id(layer) for layer in measure.unseen}
    seen = [site for site in sites if id(site.layer) not in unseen]
    if len(seen) < len(sites):
        measure = Measurement(survey, batch, flow, seen, training)
        before = measure(None)
    if not before.order:
        raise ValueError(
            "Argument `model` must call a layer whose kernel may be scaled, outside of "
            "loops, derivatives and programs that the backend traces. "
            f"Received: model={survey.root}"
        )
    return measure, before


def _unseen(sites: list[Site], seen: list[Site]) -> list[tuple[Weight, str]]:
    reason = "it is called in a loop, a derivative or a program that the backend traces"
    missing = [site for site in sites if site not in seen]
    return [(weight, reason) for site in missing for weight in site.kernels]


def measure_ends(
    model: keras.Layer, x: Any, training: bool = True, on_path: np.ndarray | None = None
) -> tuple[float, float, np.ndarray]:
    """Signal and gradient from end to end of the model as it is, and between which sites.

    `on_path` is what an earlier call returned, to measure between the same two kernels.
    """
    batch, survey = Batch.check(x), Survey(model)
    flow = flow_of_model(survey, batch, training)
    sites, _ = find_sites(survey, survey.select(None), flow)
    seen = Measurement(survey, batch, flow, sites, training)(None)
    on_path = _on_path(sites, seen) if on_path is None else on_path
    return (*_ends(seen, on_path), on_path)


def _check_mode(mode: Any) -> None:
    if not isinstance(mode, str) or mode not in _GRADIENT_WEIGHT:
        raise ValueError(
            "Argument `mode` must be 'balanced', 'forward' or 'backward'. "
            f"Received: mode={mode!r}"
        )


def _check_tells(batch: Batch) -> None:
    parts = keras.tree.flatten(batch.x)
    arrays = [np.asarray(keras.ops.convert_to_numpy(part)) for part in parts]
    varies = any((array != array[:1]).any() for array in arrays if array.size)
    if batch.size < 2 or not varies:
        raise ValueError(
            "Argument `x` must be a batch of several examples that differ, dozens of them: "
            f"nothing can be measured on one. Received: x of shape {arrays[0].shape}"
            + ("" if batch.size < 2 else ", with all examples alike")
        )


def _check_finite(model: keras.Layer, result: "_Result") -> None:
    """An error where even the scaled model does not give numbers."""
    after = result.after
    if after.is_finite:
        return
    wrong = [i for i in after.order if not after.signal[i] < math.inf]
    place = f"At {result.sites[wrong[0]].path}" if wrong else "Behind the last kernel"
    raise ValueError(
        "Argument `model` must give finite values on `x`, whatever the scale of its "
        f"kernels. {place} they are not: look for weights that are not finite with "
        f"`audit(model)`. Received: model={model}"
    )


class _Result(NamedTuple):
    """The pass before, the best pass after, and what it aimed at."""

    mode: Mode
    sites: list[Site]
    before: Measured
    after: Measured
    on_path: np.ndarray  # which sites take part in the compromise
    passes: int


def _solve(
    measure: Measurement,
    before: Measured,
    mode: Mode,
    advance: Callable[[float, str], None],
) -> _Result:
    """The objective at its least, on the level where the gradient changes least."""
    level = _level(measure, before, advance)
    seen, on_path = _converge(measure, before, _GRADIENT_WEIGHT[mode], level, advance)
    return _Result(mode, measure.sites, before, seen, on_path, measure.passes)


def _base(sites: list[Site], seen: Measured, level: float) -> np.ndarray:
    """Log targets: the level, or the site's goal; 1 for what is called last.

    The stem stays as it is, in proportion to what is added to it.
    """
    base = np.array([level if site.goal is None else site.goal for site in sites])
    last = seen.order[-1]
    if sites[last].goal is None and last not in seen.ends:
        base[last] = 0.0
    if seen.stem is not None:
        base[seen.stem] = seen.signal[seen.stem]
    return base


def _level(
    measure: Measurement, before: Measured, advance: Callable[[float, str], None]
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
    measure: Measurement,
    before: Measured,
    weight: float,
    level: float,
    advance: Callable[[float, str], None],
) -> tuple[Measured, np.ndarray]:
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


def _small_ends(sites: list[Site], seen: Measured) -> np.ndarray:
    """1 for the ends of branches that are made smaller; 0 elsewhere."""
    is_small = [i for i in seen.ends if sites[i].goal is None]
    ends = np.zeros(len(sites))
    ends[is_small] = seen.share[is_small] > _SMALLEST_SHARE
    return ends


def _excess(seen: Measured, level: float, small: float) -> float:
    """By how much, in logarithms, the ends of branches have to change for the bound."""
    start = max(math.exp(level), seen.start)
    grown = seen.stream**2 - start**2
    if not 0 < grown < math.inf:
        return -small
    change = 0.5 * math.log((_STREAM_BOUND**2 - 1) * start**2 / grown)
    return float(np.clip(small + change, -_LIMIT, 0.0)) - small


def _hold_ends(
    aim: np.ndarray, seen: Measured, on_path: np.ndarray, weight: float
) -> np.ndarray:
    """The same targets, but for the last kernel, else the first, that keep the ends level.

    Limits, and what is small on purpose, would leave a change from end to end.
    """
    aim = aim.copy()
    path = _path(seen, on_path)
    if path:
        middle, limit = float(np.median(aim[path])), _limit(seen, on_path, weight)
        for i, sign in (path[-1], -1), (path[0], 1):
            change = _end_excess(seen, on_path, weight, aim)
            low, high = min(aim[i], middle - limit), max(aim[i], middle + limit)
            aim[i] = np.clip(aim[i] + sign * change, low, high)
    return aim


def _limit(seen: Measured, on_path: np.ndarray, weight: float) -> float:
    """How far, in logarithms, an output may be from the median.

    As far as it has to if the first and the last are to hold the ends.
    """
    forward, backward = _log_ends(seen, on_path, seen.signal)
    tilt = weight * abs(forward - backward)
    return max(_LIMIT, (tilt - _END_BOUND) / 2)


def _end_excess(
    seen: Measured, on_path: np.ndarray, weight: float, signal: np.ndarray
) -> float:
    """How far beyond the bound signal and gradient change from end to end, on average."""
    forward, backward = _log_ends(seen, on_path, signal)
    change = (1 - weight) * forward + weight * backward
    return float(change - np.clip(change, -_END_BOUND, _END_BOUND))


def _log_ends(
    seen: Measured, on_path: np.ndarray, signal: np.ndarray
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


def _path(seen: Measured, on_path: np.ndarray) -> list[int]:
    """The sites that take part in the compromise, in order of their calls."""
    return [i for i in seen.order if on_path[i]]


def _on_path(sites: list[Site], seen: Measured) -> np.ndarray:
    """Where the gradient counts: not in branches that are switched off, nor at the end."""
    balanced = np.array([site.goal is None for site in sites])
    on_path = balanced & (seen.share > _SMALLEST_SHARE) & np.isfinite(seen.gradient)
    on_path[seen.order[-1]] = False  # what follows it is the loss
    if seen.stem is not None:
        on_path[seen.stem] = False
    return on_path


def _compromise(
    seen: Measured, on_path: np.ndarray, weight: float, level: float, small: np.ndarray
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
    limit = _limit(seen, on_path, weight)
    middle = float(np.median((compromise + small)[on_path]))
    compromise = np.clip(compromise + small, middle - limit, middle + limit) - small
    misfit = ((1 - weight) * s - weight * g)[on_path]
    return float(misfit.std()), compromise


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
    findings += _findings(result)
    layout = Layout(is_sequence=True, picture=STDS_BY_KERNEL)
    return Table("calibrate", rows, findings, columns, _note(result), layout)


def _note(result: _Result) -> str:
    """What became of signal and gradient, and what the mode holds of both."""
    (forward, backward), (old_forward, old_backward) = (
        _ends(seen, result.on_path) for seen in (result.after, result.before)
    )
    name, held = _HELD[result.mode]
    stream = result.after.stream
    sums = f"Residual sums have a std of {stream:.3g} at most. " if stream else ""
    return (
        f"From the first kernel to the last the signal changes {forward:.3g}x (before: "
        f"{old_forward:.2g}x); on the way back the gradient changes {backward:.3g}x "
        f"(before: {old_backward:.2g}x). {name}: {held(forward, backward):.3g}, where 1 is "
        f"aimed at. {sums}Done in {result.passes} passes."
    )


def _row(result: _Result, i: int, weight: Weight) -> Row:
    site, after = result.sites[i], result.after
    called = not math.isnan(after.signal[i])
    reached = called and math.isfinite(after.gradient[i])
    middle = after.gradient[result.on_path].mean() if result.on_path.any() else 0.0
    target = "balanced" if result.on_path[i] else "off path"
    if site.goal is not None or i == after.order[-1]:
        target = "small" if site.goal else "unit"
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


def _ends(seen: Measured, on_path: np.ndarray) -> tuple[float, float]:
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
        elif after.share[i] <= _SMALLEST_SHARE and site.goal is None:
            message = (
                f"It gets {after.share[i]:.1g} of the gradient that passes by, as if "
                "switched off on purpose: only its signal was set."
            )
            found.append(Finding("info", "off-path", site.path, message, ""))
    return found


def _growth(site: Site) -> float:
    activation = site.kernels[0].activation
    return activation_growth(activation) if activation else 1.0
