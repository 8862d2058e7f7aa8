"""Pictures of tables and of signals. matplotlib is imported when one is drawn.

Colors are told apart in grey too, and by their marks; text and axes have the colors of the
user's style. Names of layers are drawn as they are: no `$` in them is a formula.
"""

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_glorot.recording import Batch, record
from keras_glorot.tables import Row, shorten

__all__ = ["OFF_COLOR", "drawable_rows", "plot_histograms", "plot_table"]

# Readable on light and on dark, and in grey.
_SIGNAL, _GRADIENT, _SOUND = "#2a6fbb", "#f09a30", "#8a8a8a"
OFF_COLOR = "#d13438"  # of what has a finding
# More names than that can't be read beside each other, or below each other.
_NAMES_ACROSS, _NAMES_DOWN = 24, 48
_NAME_WIDTH = 32  # letters
# Of a tensor, as many values as show its distribution to half a percent.
_SAMPLE = 20_000


def plot_table(table: Any, ax: Any = None) -> Any:
    """Draws what a table is about.

    Of an `audit`, a dot per kernel: its std over the expected one, in the order of the
    model from the top down. Those with a finding are named; at the left edge stands what
    has no spread, at the right edge what is not finite. Of `propagate` and `calibrate`, the
    std of the signal and of the gradient by depth. They have no lines, for what stands
    side by side in the order of calls may belong to two branches.

    Args:
        table: A `Table` from `audit`, `propagate` or `calibrate`.
        ax: The matplotlib `Axes` to draw on. Defaults to a new figure's.

    Returns:
        The `Axes`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw: `initialize` tells what was done.
    """
    draw = {"audit": _plot_ratios, "propagate": _plot_stds, "calibrate": _plot_stds}
    rows = drawable_rows(table)
    if not rows:
        raise ValueError(
            "Argument `table` must come from `audit`, `propagate` or `calibrate`, with a "
            "std to draw. "
            f"Received: a table of kind {table.kind!r} with {len(table)} rows"
        )
    return draw[table.kind](table, rows, ax)


def drawable_rows(table: Any) -> list[Row]:
    """The rows that `plot_table` draws; none: it has nothing to draw."""
    if table.kind == "audit":
        off = _off(table)
        return [
            row
            for row in table.rows
            if (row["fan_in"] is not None and row["ratio"] is not None)
            or row["path"] in off
        ]
    if table.kind in ("propagate", "calibrate"):
        rows = table.rows[:-1] if table.kind == "propagate" else table.rows
        return [row for row in rows if row["std"] or row["gradient_std"]]
    return []


def _off(table: Any) -> dict[str, str]:
    """By path of each row with a warning or an error, the code of the first one."""
    found = [each for each in table.findings if each.severity != "info"]
    return {finding.path: finding.code for finding in reversed(found)}


def _plot_ratios(table: Any, rows: list[Row], ax: Any) -> Any:
    off = _off(table)
    count = len(rows)
    height = 1.2 + 0.14 * min(max(count, 10), _NAMES_DOWN)
    ax = ax or _new_axes((1, 1), (7, height))[0]
    ratios = np.array([row["ratio"] or 0.0 for row in rows], float)
    usual = ratios[np.isfinite(ratios) & (ratios > 0)]
    # At least a factor of two to each side, so that chance looks as small as it is.
    left, right = min(0.5, *usual, 1) / 1.3, max(2.0, *usual, 1) * 1.3
    places = np.where(np.isnan(ratios), right, np.clip(ratios, left, right))
    is_off = np.array([row["path"] in off for row in rows])
    depth = np.arange(1, count + 1)

    ax.axvline(1, color=_SOUND, linewidth=1)
    size = 16 if count <= 100 else 5
    rasterized = count > 1000
    ax.scatter(places[~is_off], depth[~is_off], size, color=_SOUND, rasterized=rasterized)
    ax.hlines(
        depth[is_off], left, places[is_off], color=OFF_COLOR, alpha=0.3, linewidth=0.8
    )
    ax.scatter(
        places[is_off],
        depth[is_off],
        size * 1.5,
        color=OFF_COLOR,
        marker="D",
        clip_on=False,
        zorder=3,
    )
    ax.set_xscale("log")
    ax.set_xlim(left, right)
    ax.set_ylim(count + 0.8, 0.2)
    _plain_ticks(ax.xaxis, right / left)
    ax.set_xlabel("std over expected std")
    ax.set_ylabel("kernels, input to output")
    weights = np.where(ratios > 0, np.abs(np.log(places)), math.inf)
    named = _spread(np.where(np.isfinite(ratios), weights, math.inf), is_off, count)
    names = [
        name if off[rows[i]["path"]] == "std" else f"{name} ({off[rows[i]['path']]})"
        for i, name in zip(
            named, shorten([rows[i]["path"] for i in named], _NAME_WIDTH), strict=True
        )
    ]
    ax.set_yticks(depth[named], names, fontsize=7, color=OFF_COLOR, parse_math=False)
    ax.tick_params("y", length=0)
    ax.set_title(f"{is_off.sum()} of {count} have a finding", loc="left", fontsize=10)
    return ax


def _spread(weights: np.ndarray, allowed: np.ndarray, count: int) -> list[int]:
    """Positions to name: the heaviest first, none so near another that they overlap."""
    apart = count / _NAMES_DOWN
    named: list[int] = []
    for i in sorted(np.flatnonzero(allowed), key=lambda i: -weights[i]):
        if all(abs(i - other) >= apart for other in named):
            named.append(int(i))
    return sorted(named)


def _plot_stds(table: Any, rows: list[Row], ax: Any) -> Any:
    count = len(rows)
    width = 4 + 0.14 * min(max(count, 6), 40)
    ax = ax or _new_axes((1, 1), (width, 3.8))[0]
    depth = np.arange(1, count + 1)
    size = 5 if count <= 40 else 3
    series = (
        ("std", "signal, forward", "o", _SIGNAL),
        ("gradient_std", "gradient, backward", "s", _GRADIENT),
    )
    for key, label, marker, color in series:
        stds = np.array([row[key] or math.nan for row in rows], float)
        fill = color if marker == "o" else "none"
        ax.plot(depth, stds, marker, color=color, markerfacecolor=fill, markersize=size,
                markeredgewidth=0.8, label=label, rasterized=count > 1000)  # fmt: skip
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 10 * low:  # what is level should look level
        middle = math.sqrt(low * high)
        low, high = middle / 10**0.5, middle * 10**0.5
        ax.set_ylim(low, high)
    _plain_ticks(ax.yaxis, high / low)
    ax.set_ylabel("standard deviation")
    ax.grid(axis="y", alpha=0.3)
    thing = "kernel" if table.kind == "calibrate" else "call of a layer"
    if count <= _NAMES_ACROSS:
        names = shorten([row["path"] for row in rows], _NAME_WIDTH)
        ax.set_xticks(depth, names, rotation=45, ha="right", rotation_mode="anchor",
                      fontsize=8, parse_math=False)  # fmt: skip
    else:
        ax.set_xlabel(f"{thing}, input to output")
    ax.set_title(table.summary or table.kind, loc="left", fontsize=10)
    ax.legend(fontsize=8)
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
    """Draws the distributions of activations and of their gradients, layer by layer.

    Like figures 6 and 7 of the paper, from the same passes as `propagate`: each layer has a
    band, and the color at a place says how many of its values lie there. The axis of values
    is linear around zero and logarithmic beyond the smallest std of a layer, so that layers
    whose scales differ by many powers of ten can be compared.

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
        ValueError: If `layers` names no row of `propagate`; else as `propagate`.
        TypeError: As `propagate`.

    Example:

    >>> activations, gradients = plot_histograms(model, x)
    >>> activations.get_xlabel()
    'activation'

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), section 4.2
    """
    batch = Batch.check(x, y, loss, seed)
    calls = record(model, batch, of_tensor=_sample)[:-1]
    if layers is None:
        calls = [call for call in calls if call.weight is not None][:-1]
    else:
        selected = set(layers)
        calls = [call for call in calls if call.path in selected]
    if not calls:
        raise ValueError(
            "Argument `layers` must name rows of `propagate(model, x)`; without it, there "
            f"must be a hidden layer with a kernel. Received: layers={layers}"
        )
    count = len(calls)
    height = 1.4 + 0.3 * min(max(count, 4), 22)
    axes = _new_axes((1, 2), (9, height)) if axes is None else axes
    sides = {
        "activation": [_finite(call.output.value) for call in calls],
        "back-propagated gradient": [_finite(call.output.gradient) for call in calls],
    }
    bands = [_bands(samples) for samples in sides.values()]
    most = max(float(parts.max()) for _, _, parts in bands)
    for ax, label, (linear, edges, parts) in zip(axes, sides, bands, strict=True):
        _draw_bands(ax, linear, edges, parts, most)
        ax.set_xlabel(label)
    step = -(-count // _NAMES_DOWN)
    names = shorten([call.path for call in calls[::step]], _NAME_WIDTH)
    size = 8 if count <= 24 else 6
    axes[0].set_yticks(np.arange(count)[::step], names, fontsize=size, parse_math=False)
    axes[0].tick_params("y", length=0)
    axes[1].set_yticks([])
    bar = axes[0].figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.02)
    bar.set_label("part of the values")
    return axes


_BINS = 81  # odd: zero is in the middle of one
_LEAST = 1e-3  # what a sample can tell from nothing


def _bands(samples: list[np.ndarray]) -> tuple[float, np.ndarray, np.ndarray]:
    """Where the axis is linear, the edges of the bins, and each sample's part in each."""
    stds = [float(sample.std()) for sample in samples if sample.size]
    linear = min((std for std in stds if std), default=1.0)
    reach = max(float(np.abs(sample).max(initial=linear)) for sample in samples)
    # Bins of equal width on the axis, which is that of the inverse hyperbolic sine.
    end = np.arcsinh(reach / linear) * 1.02
    edges = np.sinh(np.linspace(-end, end, _BINS + 1)) * linear
    counts = [np.histogram(sample, edges)[0] / max(sample.size, 1) for sample in samples]
    return linear, edges, np.array(counts)


def _draw_bands(
    ax: Any, linear: float, edges: np.ndarray, parts: np.ndarray, most: float
) -> None:
    """A band per row of `parts`, from the top down."""
    from matplotlib.colors import LogNorm

    ax.set_xscale("asinh", linear_width=linear)
    rows = np.arange(len(parts) + 1) - 0.5
    norm = LogNorm(_LEAST, max(most, 10 * _LEAST), clip=True)
    shown = np.ma.masked_equal(parts, 0)
    # The lightest color is next to nothing, whose place stays empty.
    ax.set_facecolor("white")
    ax.pcolormesh(edges, rows, shown, norm=norm, cmap="viridis_r", rasterized=True)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(len(parts) - 0.5, -0.5)
    _signed_ticks(ax, linear, edges[-1])


def _finite(sample: np.ndarray | None) -> np.ndarray:
    values = np.zeros(0) if sample is None else np.asarray(sample, float)
    return values[np.isfinite(values)]


def _sample(values: np.ndarray) -> np.ndarray:
    """Some values, taken at random: each n-th one would always be of the same channels."""
    flat = np.asarray(values).reshape(-1)
    if flat.size <= _SAMPLE:
        return np.array(flat, np.float32)
    places = np.random.default_rng(0).integers(0, flat.size, _SAMPLE)
    return flat[places].astype(np.float32)


def _plain_ticks(axis: Any, span: float) -> None:
    """0.1, 0.2, 0.5, 1 and not powers of ten, where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = (1, 2, 5) if span < 1e3 else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _signed_ticks(ax: Any, linear: float, reach: float) -> None:
    """Evenly where the axis is almost linear; else zero and a few powers of ten."""
    from matplotlib.ticker import MaxNLocator

    if reach < 20 * linear:
        ticks = MaxNLocator(6).tick_values(-reach, reach)
    else:
        first, last = math.ceil(math.log10(linear)), math.floor(math.log10(reach))
        step = -(-(last - first + 1) // 3)
        powers = [10.0**power for power in range(last, first - 1, -step)]
        ticks = [-power for power in powers] + [0.0] + powers[::-1]
    ticks = [float(tick) for tick in ticks if abs(tick) <= reach]
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=8)
    ax.set_xticks([], minor=True)


def _new_axes(shape: tuple[int, int], size: tuple[float, float], **options: Any) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(
            "Plots need matplotlib: `pip install keras-glorot[plot]`."
        ) from None
    return plt.subplots(
        *shape, figsize=size, layout="constrained", squeeze=False, **options
    )[1].ravel()
