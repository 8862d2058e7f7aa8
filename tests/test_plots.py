"""The plots draw what the tables say, on any Axes, and change nothing but those.

`pytest tests/test_plots.py --overwrite` draws the golden pictures anew: look at them.
"""

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_glorot import audit, initialize, plot_histograms, propagate
from keras_glorot._drawing.stream import draw
from keras_glorot.tables import Finding, Layout, Table
from keras_glorot.tables.plots import OFF_COLOR, RATIOS, STDS

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.testing.compare import compare_images  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _close_figures():
    before = dict(matplotlib.rcParams)
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == before


def net(depth=4, width=30):
    hidden = [keras.layers.Dense(width, "tanh", name=f"h{i}") for i in range(depth)]
    model = keras.Sequential(
        [keras.Input((9,)), *hidden, keras.layers.Dense(3, name="out")]
    )
    initialize(model, seed=1, verbose=0)
    return model


HIDDEN = ["h0", "h1", "h2", "h3"]
X = draw("truncated_normal", (50, 9), 1.0, "float32", (7,))
AUDIT = Layout(picture=RATIOS)
PROPAGATE = Layout(picture=STDS, has_total=True, can_be_sound=True)


TABLE = Table(
    "propagate",
    [{"path": path, "std": 0.5, "gradient_std": 0.1} for path in (*HIDDEN, "out", "model")],
    layout=PROPAGATE,
)


def test_propagate_draws_both_stds_by_depth():
    table = propagate(net(), X)
    ax = table.plot()
    forward, backward = (line.get_ydata() for line in ax.lines)
    assert list(forward) == [row["std"] for row in table.rows[:-1]]
    assert list(backward) == [row["gradient_std"] for row in table.rows[:-1]]
    assert ax.get_yscale() == "log"
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names == ["h0", "h1", "h2", "h3", "out"]
    assert ax.get_ylabel()
    # Rows side by side may belong to two branches: no line joins them.
    assert {line.get_linestyle() for line in ax.lines} == {"None"}


def test_colors_can_be_told_apart_in_grey():
    first, second = (line for line in TABLE.plot().lines)
    assert first.get_marker() != second.get_marker()
    weights = (0.2126, 0.7152, 0.0722)
    dark, light = (
        np.dot(matplotlib.colors.to_rgb(line.get_color()), weights)
        for line in (first, second)
    )
    assert light - dark > 0.2


def dots(ax):
    """Of an audit: the kernels without and with a finding, as (ratio, depth)."""
    sound, _, off = ax.collections
    return np.array(sound.get_offsets()), np.array(off.get_offsets())


def names(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_audit_draws_a_dot_per_kernel_and_names_what_is_off():
    model = net()
    kernel = model.layers[1].kernel  # uniform, and then normal
    noise = np.random.default_rng(0).normal(0, 3 * kernel.numpy().std(), kernel.shape)
    kernel.assign(noise)
    ax = audit(model).plot()
    sound, off = dots(ax)
    assert sound[:, 1].tolist() == [1, 3, 4, 5]
    np.testing.assert_allclose(sound[:, 0], 1, rtol=0.2)
    np.testing.assert_allclose(off, [(3 * 3 / 5, 2)], rtol=0.2)  # 5/3: the gain of tanh
    assert names(ax) == [*(f"h{i}/kernel" for i in range(4)), "out/kernel"]
    red = [label for label in ax.get_yticklabels() if label.get_color() == OFF_COLOR]
    assert [label.get_text() for label in red] == ["h1/kernel"]


def test_audit_shows_kernels_without_a_ratio_at_the_edges():
    model = net()
    values = model.layers[0].kernel.numpy()
    model.layers[0].kernel.assign(0 * values)
    model.layers[2].kernel.assign(np.nan * values[:1, :1] * model.layers[2].kernel.numpy())
    ax = audit(model).plot()
    _, off = dots(ax)
    assert off.tolist() == [[ax.get_xlim()[0], 1], [ax.get_xlim()[1], 3]]
    assert names(ax)[:3:2] == ["h0/kernel (constant-kernel)", "h2/kernel (not-finite)"]


def test_the_title_counts_no_remarks_as_sound():
    found = [
        Finding("info", "relu-gain", "a", "", ""),
        Finding("error", "std", "b", "", ""),
    ]
    rows = [{"path": path, "fan_in": 1, "ratio": 1.0} for path in "ab"]
    title = Table("audit", rows, found, layout=AUDIT).plot().get_title("left")
    assert title == "1 of 2 have an error or a warning"


def test_draws_on_the_axes_that_it_is_given():
    _, (ax, *axes) = pyplot.subplots(1, 3)
    assert TABLE.plot(ax=ax) is ax
    assert plot_histograms(net(1), X, layers=["out"], axes=axes) is axes
    assert len(pyplot.get_fignums()) == 1
    assert names(axes[0]) == ["out"]


def ratios(count):
    """An audit of made-up kernels."""
    rng = np.random.default_rng(0)
    rows = [
        {"path": f"encoder/layer_{i}/dense/kernel", "fan_in": 9, "ratio": float(ratio)}
        for i, ratio in enumerate(np.exp(0.03 * rng.normal(size=count)))
    ]
    found = []
    for row in rows[3::7]:
        row["ratio"] *= 0.2
        found.append(Finding("warning", "std", row["path"], "It is off.", "Fix it."))
    return Table("audit", rows, found, layout=AUDIT)


def stds(count):
    """A signal that vanishes along two branches, and a gradient that explodes."""
    rows = [
        {
            "path": f"block_{i}/dense",
            "std": 0.98**i * (1 if i % 2 else 3),
            "gradient_std": 1e-3 * 1.02**i,
        }
        for i in range(count + 1)
    ]
    return Table("propagate", rows, layout=PROPAGATE)


def test_names_do_not_overlap():
    assert len(ratios(5000).plot().get_yticks()) <= 48
    assert stds(300).plot().get_xlabel() == "layers, input to output"


def test_long_names_are_whole_and_do_not_overlap():
    block = "encoder_stage_residual_bottleneck_block"
    rows = [{"path": f"{block}_{i}/pointwise_projection/kernel", "fan_in": 1, "ratio": 0.1}
            for i in range(300)]  # fmt: skip
    found = [Finding("warning", "std", row["path"], "", "") for row in rows]
    ax = Table("audit", rows, found, layout=AUDIT).plot()
    paths = [row["path"] for row in rows]
    assert all(name.replace("\n", "") in paths for name in names(ax))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert len(boxes) > 10
    assert all(low.y1 < high.y0 for high, low in pairwise(boxes))


def test_names_are_no_formulas():
    found = [Finding("warning", "std", "a_$x^$_{", "", "")]
    rows = [{"path": "a_$x^$_{", "fan_in": 1, "ratio": 0.1}]
    ax = Table("audit", rows, found, layout=AUDIT).plot()
    ax.figure.canvas.draw()
    assert names(ax) == ["a_$x^$_{"]
    row = {"path": "a_$x^$_{", "std": 0.5, "gradient_std": 0.1}
    Table("propagate", [row, row], layout=PROPAGATE).plot().figure.canvas.draw()


def test_a_table_without_stds_is_refused():
    with pytest.raises(ValueError, match="Argument `table`"):
        initialize(net(), seed=1, verbose=0).plot()


def test_histograms_are_those_of_the_activations_and_gradients():
    model = net()
    outputs = [layer.output for layer in model.layers[:-1]]
    activations = keras.Model(model.inputs, outputs).predict(X, verbose=0)
    table = propagate(model, X)
    axes = plot_histograms(model, X)
    assert names(axes[0]) == HIDDEN
    for ax, key in zip(axes, ("std", "gradient_std"), strict=True):
        mesh = ax.collections[0]
        edges = mesh.get_coordinates()[0, :, 0]
        parts = mesh.get_array().filled(0)
        np.testing.assert_allclose(parts.sum(1), 1, atol=1e-9)
        centers = (edges[1:] + edges[:-1]) / 2
        for part, row in zip(parts, table, strict=False):
            mean = (part * centers).sum()
            std = np.sqrt((part * (centers - mean) ** 2).sum())
            assert std == pytest.approx(row[key], rel=0.03)
        if key == "std":
            for part, values in zip(parts, activations, strict=True):
                counts, _ = np.histogram(values, edges)
                np.testing.assert_allclose(part, counts / values.size, atol=2e-3)


@pytest.mark.parametrize("scale", [0.05, 0.4, 1.0, 30.0])
def test_the_values_of_histograms_do_not_overlap(scale):
    model = net(12)
    for layer in model.layers:
        layer.kernel.assign(scale * layer.kernel.numpy())
    for ax in plot_histograms(model, X):
        ax.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert len(boxes) == 5
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


@pytest.mark.parametrize("count", [5, 80])
def test_each_histogram_has_a_name(count):
    rows = plot_histograms(net(count, 12), X)[0]
    rows.figure.canvas.draw()
    assert names(rows) == [f"h{i}" for i in range(count)]
    boxes = [label.get_window_extent() for label in rows.get_yticklabels()]
    assert all(low.y1 <= high.y0 for high, low in pairwise(boxes))


def test_histograms_of_signals_that_are_zero_or_not_finite():
    model = net()
    model.layers[1].kernel.assign(0 * model.layers[1].kernel.numpy())
    plot_histograms(model, X)[0].figure.canvas.draw()
    model.layers[1].kernel.assign(model.layers[1].kernel.numpy() + np.inf)
    plot_histograms(model, X)[0].figure.canvas.draw()


PICTURES = {
    "audit_6": lambda: ratios(6).plot(),
    "audit_53": lambda: ratios(53).plot(),
    "audit_300": lambda: ratios(300).plot(),
    "propagate_6": lambda: stds(6).plot(),
    "propagate_300": lambda: stds(300).plot(),
    "histograms_5": lambda: plot_histograms(net(5), X)[0],
    "histograms_53": lambda: plot_histograms(net(53, 12), X)[0],
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, request, tmp_path):
    """Root mean square of the difference, of 255: 2 if one dot of six moves by 30 %."""
    with matplotlib.style.context("default"):
        figure = PICTURES[name]().figure
        path = GOLDEN / f"{name}.png"
        drawn = tmp_path / path.name
        figure.savefig(drawn, dpi=50)
        if request.config.getoption("--overwrite"):
            shutil.copy(drawn, path)
    assert compare_images(str(path), str(drawn), tol=1) is None


def test_histograms_of_layers_that_are_not_there():
    for layers in (["h9"], ["h0", "h9"], [], "h0"):
        with pytest.raises(ValueError, match="Argument `layers`"):
            plot_histograms(net(1), X, layers=layers)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"keras-glorot\[plot\]"):
        TABLE.plot()
