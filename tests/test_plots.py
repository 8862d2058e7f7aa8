"""The plots draw what the tables say, on any Axes, and change nothing but those."""

import sys

import keras
import numpy as np
import pytest

from keras_glorot import audit, initialize, plots, propagate
from keras_glorot.sampling import draw
from keras_glorot.tables import Table

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


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


TABLE = Table(
    "propagate",
    [{"path": path, "std": 0.5, "gradient_std": 0.1} for path in (*HIDDEN, "out", "model")],
)


def test_propagate_draws_both_stds_by_depth():
    table = propagate(net(), X)
    ax = table.plot()
    forward, backward = (line.get_ydata() for line in ax.lines)
    assert list(forward) == [row["std"] for row in table.rows[:-1]]
    assert list(backward) == [row["gradient_std"] for row in table.rows[:-1]]
    assert ax.get_yscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "h0",
        "h1",
        "h2",
        "h3",
        "out",
    ]
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    # Readable in grey: told apart by more than their color.
    first, second = ax.lines
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()


def test_audit_draws_the_expected_std_against_the_one_drawn():
    model = net()
    model.layers[1].kernel.assign(3 * model.layers[1].kernel.numpy())
    drawn, expected = (np.array(line.get_ydata()) for line in audit(model).plot().lines)
    assert len(drawn) == 5
    np.testing.assert_allclose(drawn / expected, [1, 3, 1, 1, 1], rtol=0.2)


def test_draws_on_the_axes_that_it_is_given():
    _, (ax, *axes) = pyplot.subplots(1, 3)
    assert TABLE.plot(ax=ax) is ax
    assert plots.plot_histograms(net(1), X, layers=["out"], axes=axes) is axes
    assert len(pyplot.get_fignums()) == 1
    assert [line.get_label() for line in axes[1].lines] == ["out"]


def test_names_are_thinned_out_where_there_are_many():
    rows = [{"path": f"layer{i}", "std": 1.0, "gradient_std": 2.0} for i in range(100)]
    assert len(Table("propagate", rows).plot().get_xticklabels()) <= 28


def test_a_table_without_stds_is_refused():
    with pytest.raises(ValueError, match="Argument `table`"):
        initialize(net(), seed=1, verbose=0).plot()


def test_histograms_are_those_of_the_activations_and_gradients():
    model = net()
    outputs = [layer.output for layer in model.layers[:-1]]
    activations = keras.Model(model.inputs, outputs).predict(X, verbose=0)
    table = propagate(model, X)
    for ax, key in zip(
        plots.plot_histograms(model, X), ("std", "gradient_std"), strict=True
    ):
        assert [line.get_label() for line in ax.lines] == HIDDEN
        for line, row in zip(ax.lines, table, strict=False):
            x, density = np.array(line.get_data())
            width = x[1] - x[0]
            assert density.sum() * width == pytest.approx(1, abs=0.01)
            std = np.sqrt((density * width * (x - (density * width * x).sum()) ** 2).sum())
            assert std == pytest.approx(row[key], rel=0.03)
            if key == "std":
                values = activations[line.axes.lines.index(line)]
                edges = np.append(x - width / 2, x[-1] + width / 2)
                counts, _ = np.histogram(values, edges)
                np.testing.assert_allclose(density * width, counts / values.size, atol=2e-3)


def test_histograms_of_layers_that_are_not_there():
    with pytest.raises(ValueError, match="Argument `layers`"):
        plots.plot_histograms(net(1), X, layers=["h9"])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"keras-glorot\[plot\]"):
        TABLE.plot()
