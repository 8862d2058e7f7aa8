"""`plot_histograms`: how activations and their gradients are distributed, by layer."""

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
    kernels = [call.path for call in calls if call.weight is not None]
    selected = set(kernels[:-1] if layers is None else layers)
    if not selected or not selected <= {call.path for call in calls}:
        raise ValueError(
            "Argument `layers` must name rows of `propagate(model, x)`; without it, there "
            f"must be a hidden layer with a kernel. Received: layers={layers}"
        )
    calls = [call for call in calls if call.path in selected]
    count = len(calls)
    names, lines = fold_names((call.path for call in calls), 32)
    room = NAMES_DOWN
    if axes is None:
        room = _MOST_NAMES
        height = max(0.3 * min(max(count, 4), 22), 0.11 * min(count * lines, room))
        axes = new_axes(9, 1.4 + height, columns=2)
    step = -(-count * lines // room)
    _draw_bands(axes[0], "activation", [call.output.value for call in calls])
    _draw_bands(
        axes[1], "back-propagated gradient", [call.output.gradient for call in calls]
    )
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


def _draw_bands(ax: Any, label: str, samples: Iterable[np.ndarray | None]) -> None:
    """A band for each sample, from the top down."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import AsinhLocator

    samples = [np.zeros(0) if sample is None else sample for sample in samples]
    stds = [float(sample.std()) for sample in samples if sample.size]
    linear = min((std for std in stds if std), default=1.0)
    reach = max(float(np.abs(sample).max(initial=linear)) for sample in samples)
    # Bins of equal width on the axis, which is that of the inverse hyperbolic sine.
    end = np.arcsinh(reach / linear) * 1.02
    edges = np.sinh(np.linspace(-end, end, _BINS + 1)) * linear
    counts = [np.histogram(sample, edges)[0] / max(sample.size, 1) for sample in samples]

    ax.set_xscale("asinh", linear_width=linear)
    rows = np.arange(len(counts) + 1) - 0.5
    # The lightest color is next to nothing, whose place stays empty.
    ax.set_facecolor("white")
    ax.pcolormesh(edges, rows, np.ma.masked_equal(counts, 0), cmap="viridis_r",
                  norm=LogNorm(_LEAST, 1, clip=True), rasterized=True)  # fmt: skip
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(len(counts) - 0.5, -0.5)
    ax.set_xticks(AsinhLocator(linear, numticks=5, base=0).tick_values(-reach, reach))
    ax.xaxis.set_major_formatter("{x:.3g}")
    ax.tick_params("x", labelsize=8)
    ax.set_xlabel(label)


def _sample(layer: keras.Layer, values: np.ndarray, is_input: bool) -> np.ndarray:
    """Some finite values, at random: each n-th would always be of the same channels."""
    flat = np.asarray(values).reshape(-1)
    if flat.size > _SAMPLE:
        flat = flat[np.random.default_rng(0).integers(0, flat.size, _SAMPLE)]
    finite = flat.astype(float)
    return finite[np.isfinite(finite)]
