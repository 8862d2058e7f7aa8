"""`plot_histograms`: how activations and their gradients are distributed, by layer."""

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_glorot._models.passes import Batch, record
from keras_glorot._models.survey import Survey
from keras_glorot.tables.plots import NAMES_DOWN, fold_names, new_axes

__all__ = ["plot_histograms", "plotted_histograms"]

# Of a tensor, as many values as show its distribution to half a percent.
_SAMPLE = 20_000
# Lines of names in a figure of its own, which grows with them.
_MOST_NAMES = 300


def plot_histograms(
    model: keras.Layer,
    x: Any,
    y: Any = None,
    loss: Any = None,
    *,
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
    return plotted_histograms(Survey(model), batch, layers, axes)


def plotted_histograms(
    survey: Survey, batch: Batch, layers: Iterable[str] | None = None, axes: Any = None
) -> Any:
    """As `plot_histograms`, of a model that has been looked at."""
    calls = record(survey, batch, of_value=_sample, of_gradient=_sample).calls[:-1]
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
    names, lines = fold_names((call.path for call in calls), 32)
    room = NAMES_DOWN
    if axes is None:
        room = _MOST_NAMES
        height = 0.3 * min(max(count, 4), 22)
        height = 1.4 + max(height, 0.11 * min(count * lines, room))
        axes = new_axes((1, 2), (9, height))
    sides = {
        "activation": [_finite(call.output.value) for call in calls],
        "back-propagated gradient": [_finite(call.output.gradient) for call in calls],
    }
    bands = [_bands(samples) for samples in sides.values()]
    most = max(float(parts.max()) for _, _, parts in bands)
    for ax, label, (linear, edges, parts) in zip(axes, sides, bands, strict=True):
        _draw_bands(ax, linear, edges, parts, most)
        ax.set_xlabel(label)
    step = -(-count * lines // room)
    size = 8 if count <= 24 else 6
    places = np.arange(count)[::step]
    axes[0].set_yticks(places, names[::step], fontsize=size, parse_math=False)
    axes[0].tick_params("y", length=0)
    axes[1].set_yticks([])
    bar = axes[0].figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.02)
    bar.set_label("part of the values")
    return axes


_BINS = 81  # odd: zero is in the middle of one
_LEAST = 1e-3  # less, a sample can't tell from nothing


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


def _sample(layer: keras.Layer, values: np.ndarray, is_input: bool) -> np.ndarray:
    """Some values, taken at random: each n-th one would always be of the same channels."""
    flat = np.asarray(values).reshape(-1)
    if flat.size <= _SAMPLE:
        return np.array(flat, np.float32)
    places = np.random.default_rng(0).integers(0, flat.size, _SAMPLE)
    return flat[places].astype(np.float32)


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
