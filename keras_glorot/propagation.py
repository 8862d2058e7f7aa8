"""`propagate`: how the signal and its gradient change from layer to layer."""

import math
from typing import Any

import keras
import numpy as np

from keras_glorot.recording import NOTHING, moments, record
from keras_glorot.tables import Finding, Table

__all__ = ["propagate"]


# The last ones are left out where there is no room.
_COLUMNS = ("path", "shape", "std", "forward_gain", "gradient_std", "backward_gain",
            "saturated", "dead", "kernel_gradient_std", "mean", "layer")  # fmt: skip


def propagate(
    model: keras.Layer, x: Any, y: Any = None, loss: Any = None, seed: int = 0
) -> Table:
    """Shows how the signal and its gradient change from layer to layer.

    The model is called once with `training=False` and differentiated once; its weights,
    statistics, metrics and random states stay as they are. Differentiated is the mean of
    `loss(y, model(x))`; without a loss, `sum(c * model(x))`, c random with unit variance.

    Args:
        model: A built Keras model or layer.
        x: A batch to call it on, an array or a structure of arrays: dozens of examples.
        y: Targets for `loss`.
        loss: A Keras loss or its name, or a function of `(y, outputs)`.
        seed: Integer: which random c.

    Returns:
        A `Table` with a row for each call of a layer, in order of execution, and at last
        one for the model. What only hands on the result of a layer inside it has no row; a
        recurrent layer has one for all steps. `mean`, `std` and `gradient_std` belong to
        the output; `forward_gain` is the std of output over input, `backward_gain` that of
        the gradient at the input over that at the output, each of the first tensor where
        there are several; `kernel_gradient_std` is of the first kernel. `saturated` is the
        fraction with slope |f'| < 0.1 (tanh, sigmoid, softsign), `dead` that of ReLU units
        that are zero on the whole batch, where it holds ten positions. The findings tell
        what vanishes, explodes, is saturated or dead.

    Raises:
        ValueError: If the model is not built; `x` is empty, not finite or does not fit; or
            no gradient reaches the layers.
        TypeError: If `model` is not a Keras layer.

    Example:

    >>> table = propagate(model, x)
    >>> [row["path"] for row in table.rows[:2]]
    ['dense', 'dense_1']

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), section 4
    """
    calls = record(model, x, y, loss, seed, moments)
    if calls[-1]["input"] == NOTHING:
        # Token ids have no std and no gradient: the model then starts at its first output.
        calls[-1]["input"] = calls[0]["output"]
    rows = []
    for call in calls:
        ((_, std_before), (_, gradient_before)) = call["input"]
        ((mean, std), (_, gradient)) = call["output"]
        gains = (_ratio(std, std_before), _ratio(gradient_before, gradient))
        rows.append({"path": call["path"], "layer": call["layer"], "shape": call["shape"],
                     "mean": mean, "std": std, "forward_gain": gains[0],
                     "gradient_std": gradient, "backward_gain": gains[1],
                     "kernel_gradient_std": call["kernel"][1][1],
                     "saturated": call["saturated"], "dead": call["dead"]})  # fmt: skip
    inside = [row for row in rows[:-1] if row["kernel_gradient_std"] is not None]
    if not any(row["gradient_std"] for row in inside or rows):
        raise ValueError(
            "Argument `model` must have a differentiable path from its kernels to its "
            f"output, and the gradient there must not be zero. Received: model={model}"
        )
    filled = [key for key in _COLUMNS if any(row[key] is not None for row in rows)]
    return Table("propagate", rows, _findings(rows), filled)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


_REDRAW = (
    "See audit(model) for kernels of a wrong scale; redraw them with initialize(model, "
    "GlorotUniform(gain='auto')), or normalize in between."
)
_ADVICE = {
    "not finite": "Look for weights that are not finite with audit(model).",
    "saturated": "Draw its kernel with a smaller gain, or scale its input down to std 1.",
    "dead": "Check its bias and the mean of its input, train with a smaller learning rate, "
    "or use an activation that has a slope on both sides.",
}


def _findings(rows: list[dict[str, Any]]) -> list[Finding]:
    found = []
    for row in rows[:-1] or rows:
        if not math.isfinite((row["std"] or 0) + (row["gradient_std"] or 0)):
            message = "Its signal or gradient is not finite."
            advice = _ADVICE["not finite"]
            found.append(Finding("error", "not-finite", row["path"], message, advice))
        for state in ("saturated", "dead"):
            if (row[state] or 0) > 0.5:
                message = f"{row[state]:.0%} of its units are {state}."
                found.append(
                    Finding("warning", state, row["path"], message, _ADVICE[state])
                )
    # The last kernel's layer is left out: its gains are those of its width and softmax.
    hidden = [row for row in rows[:-1] if row["kernel_gradient_std"] is not None][:-1]
    found += _trend(hidden, "std", "signal")
    return found + _trend(hidden[::-1], "gradient_std", "gradient")


def _trend(rows: list[dict[str, Any]], key: str, name: str) -> list[Finding]:
    """What becomes of a std along the layers, by a straight line through its logarithms.

    Through all of them: in branches, such as those of attention, one may differ widely.
    """
    stds = [row[key] for row in rows]
    if len(rows) < 3 or not all(map(math.isfinite, stds)):
        return []
    if not all(stds):
        path, change = rows[stds.index(0)]["path"], -math.inf
    else:
        path, change = (
            rows[-1]["path"],
            float(np.polyfit(range(len(rows)), np.log(stds), 1)[0]),
        )
    total = abs(change) * (len(rows) - 1)
    # A stride or a pooling changes something too: that much only where it goes on and on.
    if total < math.log(5) or (abs(change) < math.log(4 / 3) and total < math.log(1000)):
        return []
    message = (
        f"The {name} {'vanishes' if change < 0 else 'explodes'}: from {rows[0]['path']} on "
        f"its std changes by a factor of {math.exp(change):.2g} per layer."
    )
    code = "vanishing" if change < 0 else "exploding"
    return [Finding("warning", code, path, message, _REDRAW)]
