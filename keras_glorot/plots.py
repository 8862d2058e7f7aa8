"""Pictures of tables and of signals. matplotlib is imported when one is drawn."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_glorot.recording import moments, record

__all__ = ["plot_histograms", "plot_table"]

ops: Any = keras.ops

# In units of a tensor's own std, so that one pass will do.
_REACH, _BINS = 4, 80


def plot_table(table: Any, ax: Any = None) -> Any:
    """Draws what a table is about, by layer.

    Args:
        table: A `Table` from `audit`: the std of each kernel and the std expected. From
            `propagate`: the std of the signal and of the gradient at each output.
        ax: The matplotlib `Axes` to draw on. Defaults to a new figure's.

    Returns:
        The `Axes`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw: `initialize` tells what was done.
    """
    lines = {
        "audit": {"std": "drawn", "expected_std": "expected"},
        "propagate": {"std": "signal, forward", "gradient_std": "gradient, backward"},
    }.get(table.kind, {})
    rows = table.rows[:-1] if table.kind == "propagate" else table.rows
    rows = [row for row in rows if lines and all(row[key] for key in lines)]
    if not rows:
        raise ValueError(
            "Argument `table` must come from `audit` or `propagate`, with a std to draw. "
            f"Received: a table of kind {table.kind!r} with {len(table)} rows"
        )
    ax = ax or _new_axes(1, (1.5 + 0.3 * min(len(rows), 28), 3.8))[0]
    # Told apart by marker and dash, so that the picture can be read in grey.
    for (key, label), style in zip(lines.items(), ("o-", "s--"), strict=True):
        ax.plot([row[key] for row in rows], style, label=label, markersize=4, linewidth=1)
    ax.set_yscale("log")
    step = -(-len(rows) // 28)  # more names than that can't be read
    ax.set_xticks(range(0, len(rows), step))
    names = [row["path"] for row in rows[::step]]
    ax.set_xticklabels(names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_ylabel("standard deviation")
    ax.set_xlabel("layer" if table.kind == "propagate" else "kernel")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
    return ax


def plot_histograms(
    model: keras.Layer,
    x: Any,
    y: Any = None,
    loss: Any = None,
    seed: int = 0,
    layers: Iterable[str] | None = None,
    axes: Any = None,
) -> Any:
    """Draws the distributions of activations and of their gradients, layer over layer.

    As figures 6 and 7 of the paper do it, on the same passes as `propagate`.

    Args:
        model: As in `propagate`.
        x: As in `propagate`.
        y: As in `propagate`.
        loss: As in `propagate`.
        seed: As in `propagate`.
        layers: Paths of rows of `propagate`. Defaults to all hidden layers with a kernel.
        axes: Two matplotlib `Axes`. Defaults to those of a new figure.

    Returns:
        The two `Axes`: of the activations and of their gradients.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `layers` names no row of `propagate`.

    Example:

    >>> activations, gradients = plot_histograms(model, x)
    >>> activations.get_xlabel()
    'activation'

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), section 4.2
    """
    calls = record(model, x, y, loss, seed, _histogram)[:-1]
    if layers is None:
        calls = [call for call in calls if call["kernel"][0][0] is not None][:-1]
    else:
        selected = set(layers)
        calls = [call for call in calls if call["path"] in selected]
    if not calls:
        raise ValueError(
            "Argument `layers` must name rows of `propagate(model, x)`; without it, there "
            f"must be a hidden layer with a kernel. Received: layers={layers}"
        )
    axes = _new_axes(2, (10, 3.6)) if axes is None else axes
    import matplotlib

    # From dark to light, so that the order of the layers can be read in grey as well.
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(calls)))
    titles = ("activation", "back-propagated gradient")
    for side, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        for i, call in enumerate(calls):
            mean, std, _, *fractions, _ = call["output"][side]
            width = max(std, 1e-38) * 2 * _REACH / _BINS
            values = mean + width * (np.arange(_BINS) - (_BINS - 1) / 2)
            filled = np.flatnonzero(fractions)
            part = slice(filled[0], filled[-1] + 1) if filled.size else slice(None)
            density = np.divide(fractions, width)
            style = ("-", "--", "-.", ":")[i % 4]
            ax.plot(values[part], density[part], style, color=colors[i], label=call["path"])
        ax.set_xlabel(title)
        ax.set_ylabel("density")
        ax.ticklabel_format(scilimits=(-3, 4))
    axes[0].legend(fontsize=8)
    return axes


def _histogram(tensor: Any) -> Any:
    """Mean, std, and the fraction in each bin; the first and the last hold the rest."""
    both = moments(tensor)
    std = ops.where(both[1] > 0, both[1], 1.0)
    deviations = ops.reshape((ops.cast(tensor, "float32") - both[0]) / std, (-1,))
    bins = ops.floor((deviations + _REACH) / (2 * _REACH) * _BINS) + 1
    bins = ops.cast(ops.clip(bins, 0, _BINS + 1), "int32")
    counts = ops.segment_sum(ops.ones_like(deviations), bins, num_segments=_BINS + 2)
    return ops.concatenate([both, counts / deviations.shape[0]])


def _new_axes(count: int, size: tuple[float, float]) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(
            "Plots need matplotlib: `pip install keras-glorot[plot]`."
        ) from None
    return plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)[1][0]
