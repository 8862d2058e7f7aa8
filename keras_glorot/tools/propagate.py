"""`propagate`: how the signal and its gradient change from layer to layer."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np

from keras_glorot._backends.signals import Signal
from keras_glorot._keras.graph import LOOPS
from keras_glorot._models.jacobian import singular_spread
from keras_glorot._models.kernels import Flow, Kernel, Kinds, flow_of_calls
from keras_glorot._models.pairs import fitting_levels
from keras_glorot._models.passes import (
    Batch,
    Call,
    Moments,
    gradient_std,
    likeness,
    moments,
    position_axes,
    record,
)
from keras_glorot._models.progress import progress
from keras_glorot._models.survey import Survey
from keras_glorot.gains import activation_growth, known_gain
from keras_glorot.layer_rules import is_normalization, kernel_activation
from keras_glorot.tables import Finding, Layout, Row, Table
from keras_glorot.tables.plots import STDS

__all__ = ["propagate", "propagated"]


# The last ones are left out where there is no room.
_COLUMNS = ("path", "std", "forward_gain", "gradient_std", "backward_gain", "saturated",
            "dead", "likeness", "shape", "kernel_gradient_std", "mean",
            "layer")  # fmt: skip
_LAYOUT = Layout(
    kernel_key="kernel_gradient_std",
    has_total=True,
    is_sequence=True,
    can_be_sound=True,
    picture=STDS,
)


def propagate(
    model: keras.Layer,
    x: Any,
    y: Any = None,
    loss: Any = None,
    *,
    seed: int = 0,
    training: bool = True,
    verbose: Literal["auto"] | bool = "auto",
) -> Table:
    """Shows how the signal and its gradient change from layer to layer.

    The model is called and differentiated; its weights, statistics, metrics and random
    states stay as they are. The gradient is that of the mean of `loss(y, model(x))`;
    without a loss, that of `sum(c * model(x))`, with a random c of variance 1. Dropout is
    off.

    A layer may use one kernel at many positions: steps of a sequence, pixels. The gradients
    there train one kernel, so they count together, as the larger one of their sum and the
    root of the sum of their squares. A mean over T positions divides each of them by T and
    leaves their sum: it is no fault, and neither is a stride.

    The note tells the spread of the singular values σ of the model's Jacobian,
    E[σ⁴] / E[σ²]², which is 1 for an isometry: by one random direction, led back by the
    gradient and forth again by small steps of the inputs. Where all are equal the error is
    nearly 0; else, from 64 examples of 16 outputs, the standard error of a spread of 3 is
    5 %, of 20 it is 15 %, and of 100 it is 40 %. It is left out where no input is a float,
    where the outputs jump, and in half precision.

    Args:
        model: A built Keras model or layer.
        x: A batch to call it on, an array or a structure of arrays: dozens of examples.
            Where `call` requires several arguments, a list gives them in order; a
            dictionary gives them by their names.
        y: Targets for `loss`. Give both or neither.
        loss: A Keras loss or its name, or a function of `(y, outputs)`.
        seed: An integer: the same one gives the same c.
        training: Whether BatchNormalization uses the statistics of the batch, as in
            training, or its moving ones, as in `predict`.
        verbose: Whether to show progress. `"auto"`: on a terminal, after a second.

    Returns:
        A `Table` with a row for each call of a layer, in order of execution, and a last
        one for the model. A layer that only returns the result of a layer inside it has no
        row; a recurrent layer has one for all steps. A call in a loop, a derivative or a
        program that the backend traces has none; a finding names it. Keys of a row:

        - `path`, `layer`, `shape`: the layer, its class, and the shape of its output.
        - `mean`, `std`: of the first float tensor of the output.
        - `gradient_std`: of the gradient there, at all positions of a unit together.
        - `likeness`: the mean cosine between two examples of the output: 1 if they have
          become alike, 0 if they have nothing in common.
        - `input_std`: the std of the first float tensor of the input.
        - `forward_gain`: `std / input_std`. `backward_gain`: the std of the gradient at
          the input over that at the output.
        - `kernel_gradient_std`: of the first kernel.
        - `jacobian_spread`: of the model, in its row: E[σ⁴] / E[σ²]².
        - `saturated`: the fraction with slope |f'| < 0.1 (tanh, sigmoid, softsign).
        - `dead`: the fraction of ReLU units that are zero on the whole batch, if it
          holds at least ten positions.

        The findings tell what vanishes, explodes, is saturated or dead, where examples
        become alike, and where the activation lets small differences grow.

    Raises:
        ValueError: If the model is not built, can't be called on `x` or differentiated; `x`
            is empty, not finite or does not fit; `y` does not fit, or comes without `loss`,
            or `loss` without it; or no gradient reaches the layers.
        TypeError: If `model` is not a Keras layer, `seed` not an integer, or `x` does not
            hold numbers.

    Example:

    >>> table = propagate(model, x)
    >>> [row["path"] for row in table.rows[:2]]
    ['dense', 'dense_1']

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), section 4
    """
    batch = Batch.check(x, y, loss, seed)
    return propagated(Survey(model), batch, training, verbose)


def propagated(
    survey: Survey,
    batch: Batch,
    training: bool = True,
    verbose: Literal["auto"] | bool = "auto",
) -> Table:
    """As `propagate`, of a model that has been looked at."""

    def of_value(layer: keras.Layer, values: np.ndarray, is_input: bool) -> Any:
        if is_input:
            return moments(values).std
        return _statistics(layer, values, batch.size)

    def of_gradient(layer: keras.Layer, values: np.ndarray, is_input: bool) -> float:
        return gradient_std(values, batch.size, _unit_axes(layer, is_input))

    with progress("propagate", verbose) as advance:
        seen = record(survey, batch, training, of_value, of_gradient, advance)
        rows = _rows(seen.calls)
        inside = [row for row in rows[:-1] if row["kernel_gradient_std"] is not None]
        if not any(row["gradient_std"] for row in inside or rows):
            raise ValueError(
                "Argument `model` must have a differentiable path from its kernels to its "
                "output, and the gradient there must not be zero. "
                f"Received: model={survey.root}"
            )
        spread = singular_spread(survey, batch, seen, training)
        rows[-1]["jacobian_spread"] = spread
    filled = [key for key in _COLUMNS if any(row[key] is not None for row in rows)]
    flow = flow_of_calls(survey, batch, seen.calls)
    found = _findings(seen.calls, rows, flow) + _unseen_findings(survey, seen.unseen)
    return Table("propagate", rows, found, filled, _note(spread), _LAYOUT)


def _note(spread: float | None) -> str:
    if spread is None:
        return ""
    return f"The Jacobian's singular values spread {spread:.3g}x (1: an isometry)."


def _rows(calls: list[Call]) -> list[Row]:
    if calls[-1].input.gradient is None:
        # Token ids have no std and no gradient: the model then starts at its first output.
        first = calls[0].output
        value = first.value and first.value["std"]
        calls[-1] = calls[-1]._replace(input=Signal(value, first.gradient))
    return [_row(call) for call in calls]


def _row(call: Call) -> Row:
    output = call.output.value or {}
    return {
        "path": call.path,
        "layer": type(call.layer).__name__,
        "shape": call.shape,
        **{name: output.get(name) for name in _STATISTICS},
        "input_std": call.input.value,
        "forward_gain": _ratio(output.get("std"), call.input.value),
        "gradient_std": call.output.gradient,
        "backward_gain": _ratio(call.input.gradient, call.output.gradient),
        "kernel_gradient_std": call.kernel.gradient,
        "jacobian_spread": None,
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


# Below, the whole network is nearly an isometry, whatever its activations do one by one.
_LARGE_SPREAD = 2.0

# A statistic of an output is a function of the layer, the values and their moments, and
# the number of examples; it returns a number, or None where it says nothing.
Statistic = Callable[[Any, np.ndarray, Moments, int], float | None]


def _statistics(layer: Any, values: np.ndarray, examples: int) -> dict[str, Any]:
    """All of them, and the std of the means over positions."""
    both = moments(values)
    axes = position_axes(values, examples, _unit_axes(layer))
    found = {
        name: each(layer, values, both, examples) for name, each in _STATISTICS.items()
    }
    return {"pooled_std": moments(values.mean(axes)).std if axes else both.std, **found}


def _unit_axes(layer: Any, is_input: bool = False) -> tuple[int, ...]:
    """The axes along which units differ, at the output of a layer or at its input."""
    if getattr(layer, "data_format", None) == "channels_first":
        return (1,)
    if not isinstance(layer, keras.layers.EinsumDense):
        return (-1,)
    inputs, kernel, outputs = re.split(",|->", layer.equation)
    side = inputs if is_input else outputs
    return tuple(range(len(side.rstrip(kernel)) - len(side), 0)) or (-1,)


# |f'(z)| of what saturates, from y = f(z).
_SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
    "softsign": lambda y: (1 - np.abs(y)) ** 2,
}


def _saturated(
    layer: Any, values: np.ndarray, both: Moments, examples: int
) -> float | None:
    slope = _SLOPES.get(_activation_name(layer))
    if slope is None or isinstance(layer, LOOPS):
        return None
    return float((slope(values) < 0.1).mean())


def _dead(layer: Any, values: np.ndarray, both: Moments, examples: int) -> float | None:
    is_relu = _activation_name(layer) in ("relu", "relu6")
    if not is_relu and not isinstance(layer, keras.layers.ReLU):
        return None
    first = getattr(layer, "data_format", None) == "channels_first"
    units = values.reshape(values.shape[0], values.shape[1], -1) if first else values
    units = np.moveaxis(units, 1, -1) if first else units
    units = units.reshape(-1, units.shape[-1])
    return float((units <= 0).all(axis=0).mean()) if len(units) >= 10 else None


def _activation_name(layer: Any) -> str:
    return getattr(getattr(layer, "activation", None), "__name__", "")


_STATISTICS: dict[str, Statistic] = {
    "mean": lambda layer, values, both, examples: both.mean,
    "std": lambda layer, values, both, examples: both.std,
    "likeness": lambda layer, values, both, examples: likeness(values, examples),
    "saturated": _saturated,
    "dead": _dead,
}

_ADVICE = {
    "not-finite": "Look for weights that are not finite with audit(model).",
    "saturated": "Use a smaller gain for its kernel, or scale its input down to std 1.",
    "dead": "Check its bias and the mean of its input, train with a smaller learning rate, "
    "or use an activation that has a slope on both sides.",
    "plain": 'Start with initialize(model, "isometric"), or scale the kernels with '
    "calibrate(model, x).",
    "scale": "Scale the kernels with calibrate(model, x), or add normalization layers.",
    "residual-growth": "Scale the ends of the branches down with calibrate(model, x).",
}


def _findings(calls: list[Call], rows: list[Row], flow: Flow) -> list[Finding]:
    found = []
    for row in rows[:-1] or rows:
        found += _unit_findings(row)
    chains = _chains(flow.kernels)
    places = flow.rows([call.layer for call in calls[:-1]])
    for chain in chains:
        parts = [
            [calls[i] for i in _known(places, part)] for part in _parts(flow.kernels, chain)
        ]
        advice = _ADVICE["plain" if _is_plain(flow, chain) else "scale"]
        levels = list(map(_levels, parts))
        for part, own in zip(parts, levels, strict=True):
            found += _signal_trend(part, own, advice)
        found += _gradient_trend(parts, levels, advice)
        found += _collapse([rows[i] for i in _known(places, chain)], advice)
    plain = [_known(places, chain) for chain in chains if _is_plain(flow, chain)]
    found += _residual_growth(calls[:-1], rows)
    spread = rows[-1]["jacobian_spread"]
    is_isometry = spread is not None and spread < _LARGE_SPREAD
    return found if is_isometry else found + _instability(calls, plain)


def _known(places: list[int | None], chain: list[int]) -> list[int]:
    """The calls of a chain of kernels that were seen, each once."""
    found = [places[i] for i in chain]
    return list(dict.fromkeys(i for i in found if i is not None))


def _unseen_findings(survey: Survey, unseen: list[keras.Layer]) -> list[Finding]:
    """Of the outermost layers: those inside are not seen either."""
    hidden = sorted(survey.paths[id(layer)] for layer in unseen)
    message = (
        "Not seen: it is called in a loop, a derivative or a program that the backend "
        "traces, so that call has no row."
    )
    return [
        Finding("info", "not-seen", path, message, "")
        for path in hidden
        if not any(path.startswith(f"{other}/") for other in hidden)
    ]


def _unit_findings(row: Row) -> list[Finding]:
    found = []
    if not math.isfinite((row["std"] or 0) + (row["gradient_std"] or 0)):
        message = "Its signal or gradient is not finite."
        advice = _ADVICE["not-finite"]
        found.append(Finding("error", "not-finite", row["path"], message, advice))
    for state in ("saturated", "dead"):
        if (row[state] or 0) > 0.5:
            message = f"{row[state]:.0%} of its units are {state}."
            found.append(Finding("warning", state, row["path"], message, _ADVICE[state]))
    return found


def _chains(kernels: list[Kernel]) -> list[list[int]]:
    """The hidden kernels along the paths of the graph: the longest first, each in one.

    A path ends where others join it that come from another input of the model, and goes by
    a gate or a softmax only where nothing goes past it. The last kernel of each path is
    left out: its gains are those of its width and softmax.
    """

    def rank(sources: dict[int, Kinds], source: int) -> tuple[bool, int]:
        return not sources[source] & {"gate", "softmax"}, depths[source]

    depths: list[int] = []
    for kernel in kernels:
        depths.append(1 + max((depths[i] for i in kernel.sources), default=0))
    leads_on = {i for kernel in kernels for i in kernel.sources}  # to another kernel
    chains: list[list[int]] = []
    left = set(range(len(kernels)))
    while left:
        i = start = max(left, key=lambda i: (depths[i], i))
        chain = []
        while i in left and kernels[i].inputs == kernels[start].inputs:
            left.remove(i)
            chain.append(i)
            sources = kernels[i].sources
            i = max(sources, key=lambda source: rank(sources, source), default=-1)
        chains.append([i for i in chain[::-1] if i in leads_on])
    return [chain for chain in chains if chain]


def _parts(kernels: list[Kernel], chain: list[int]) -> list[list[int]]:
    """A chain cut at normalization layers: behind one the signal has a scale of its own."""
    parts: list[list[int]] = [[]]
    for place, i in enumerate(chain):
        if place and "normalization" in kernels[i].sources[chain[place - 1]]:
            parts.append([])
        parts[-1].append(i)
    return parts


def _signal_trend(calls: list[Call], levels: np.ndarray, advice: str) -> list[Finding]:
    """By all values and by the means over positions: both have to tell the same.

    A mean over unlike positions makes the first smaller, a stride the second one larger.
    """
    outputs = [call.output.value for call in calls]
    both = list(zip(outputs, levels, strict=True))
    curves = [
        [output and output["std"] / level for output, level in both],
        [output and output["pooled_std"] / level for output, level in both],
    ]
    return _trend([call.path for call in calls], curves, "Signal", advice)


def _gradient_trend(
    parts: list[list[Call]], levels: list[np.ndarray], advice: str
) -> list[Finding]:
    """From the end to the start.

    Normalization layers give a signal the scale 1, and the gradient before them the inverse
    of the scale there: times that scale, both sides of one can be compared.
    """
    paths: list[str] = []
    curve: list[float | None] = []
    for part, own in zip(reversed(parts), reversed(levels), strict=True):
        output = part[-1].output.value if part and paths else None
        scale = output["std"] / own[-1] if output else 1.0
        for call, level in zip(reversed(part), reversed(own), strict=True):
            gradient = call.output.gradient
            paths.append(call.path)
            curve.append(None if gradient is None else scale * gradient * level)
    return _trend(paths, [curve], "Gradient", advice)


def _levels(calls: list[Call]) -> np.ndarray:
    """The levels with which the stds of the outputs of kernels are compared."""
    outputs = [call.output.value for call in calls]
    stds = np.array([output["std"] if output else 0.0 for output in outputs])
    activations = [call.weight.activation if call.weight else None for call in calls]
    return fitting_levels(activations, stds)


def _trend(
    paths: list[str], curves: list[list[float | None]], name: str, advice: str
) -> list[Finding]:
    """The trend of a std along the layers, if each of its curves tells the same."""
    changes = [_change(curve) for curve in curves]
    if len(paths) < 3 or min(changes) * max(changes) <= 0:
        return []
    change = min(changes, key=abs)
    total = abs(change) * (len(paths) - 1)
    # Nets that train well change by up to 10x. A stride or a pooling changes something too:
    # that much only where it goes on and on.
    if total < math.log(15) or (abs(change) < math.log(4 / 3) and total < math.log(1000)):
        return []
    verb, code = ("vanishes", "vanishing") if change < 0 else ("explodes", "exploding")
    if change == -math.inf:
        last = paths[curves[0].index(0)]
        how = f"is 0 at {last}"
    else:
        last = paths[-1]
        how = f"changes {math.exp(change):.2g}x per layer from {paths[0]} to {last}"
    message = f"{name} {verb}: its std {how}."
    return [Finding("warning", code, last, message, advice)]


def _change(stds: list[float | None]) -> float:
    """Of the logarithm per layer, by a straight line through all of them.

    In branches, such as those of attention, one may differ widely.
    """
    known = [std for std in stds if std is not None and math.isfinite(std)]
    if len(known) < max(2, len(stds)):
        return 0.0
    if not all(known):
        return -math.inf
    return float(np.polyfit(range(len(known)), np.log(known), 1)[0])


def _collapse(rows: list[Row], advice: str) -> list[Finding]:
    """Examples that became alike on their way, while the signal as a whole may be level."""
    if len(rows) < 3:
        return []
    first, last = rows[0]["likeness"], rows[-1]["likeness"]
    if first is None or last is None or last < 0.98 or 1 - first < 10 * (1 - last):
        return []
    message = (
        f"Examples become alike: their mean cosine is {first:.2g} at {rows[0]['path']}, "
        f"{last:.3g} here."
    )
    return [Finding("warning", "collapsed", rows[-1]["path"], message, advice)]


def _residual_growth(calls: Sequence[Call], rows: list[Row]) -> list[Finding]:
    """A sum that each block adds to, as its normalization layers see it."""
    stream = [
        row
        for call, row in zip(calls, rows, strict=False)
        if is_normalization(call.layer) and row["input_std"] and len(row["shape"]) > 2
    ]
    if len(stream) < 8:
        return []
    first, last = stream[0], max(stream[1:], key=lambda row: row["input_std"])
    growth = last["input_std"] / first["input_std"]
    if not 3 < growth < math.inf or "Batch" in last["layer"]:
        return []
    message = (
        f"The residual stream grows: the input of this normalization has {growth:.2g} "
        f"times the std of that of {first['path']}."
    )
    advice = _ADVICE["residual-growth"]
    return [Finding("info", "residual-growth", last["path"], message, advice)]


# Sums and products have laws of their own.
_JOINED = {"addition", "product", "concatenation", "softmax", "gate"}


def _is_plain(flow: Flow, chain: list[int]) -> bool:
    """Whether each kernel feeds the next one alone, and nothing is added or multiplied."""
    sources = [flow.kernels[i].sources for i in chain[1:]]
    between = frozenset().union(*(kinds for each in sources for kinds in each.values()))
    return all(len(each) == 1 for each in sources) and not _JOINED & between


def _instability(calls: list[Call], chains: list[list[int]]) -> list[Finding]:
    """Where activations by themselves let small differences explode along plain layers."""
    if any(is_normalization(call.layer) for call in calls):
        return []
    for chain in filter(None, chains):
        level = _level(calls[chain[0]])
        activations = [getattr(calls[i].weight, "activation", None) for i in chain]
        by_id = {id(each): each for each in activations}  # most layers have the same
        known = {key: _growth(each, level) for key, each in by_id.items()}
        growths = [known[id(each)] for each in activations]
        total, worst = math.prod(growths), max(growths)
        if total > 10:
            message = (
                f"At a std of {level:.2g} its activation lets a deviation grow "
                f"{worst:.3g}x per layer (chi), even if the signal is level: {total:.2g}x "
                f"from {calls[chain[0]].path} to here."
            )
            path, advice = calls[chain[-1]].path, _ADVICE["plain"]
            return [Finding("warning", "unstable-activation", path, message, advice)]
    return []


def _level(call: Call) -> float:
    """The std before the activation: that of the output, if a layer follows that is the
    activation, else as far as the gain tells."""
    std = call.output.value["std"] if call.output.value else 1.0
    own = kernel_activation(call.weight.owner) if call.weight else None
    return std * (known_gain(own) or 1.0) if std > 0 else 1.0


def _growth(activation: Any, level: float) -> float:
    return activation_growth(activation, level) if activation else 1.0
