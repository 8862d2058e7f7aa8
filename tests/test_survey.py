"""A model is looked at once, and its weights are told from what connects nothing."""

from collections import Counter

import keras
import numpy as np
import pytest

import keras_glorot
from keras_glorot import audit, calibrate, initialize, layer_fans, propagate
from keras_glorot._keras import tree
from keras_glorot._models.survey import Survey

layers = keras.layers
X = np.random.default_rng(0).normal(size=(18, 8)).astype("float32")


def deep(depth):
    hidden = [layers.Dense(8, activation="tanh") for _ in range(depth)]
    return keras.Sequential([keras.Input((8,)), *hidden])


TOOLS = {
    "initialize": initialize,
    "audit": audit,
    "propagate": lambda model: propagate(model, X),
    "calibrate": lambda model: calibrate(model, X),
    "layer_fans": layer_fans,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_walk_the_tree_of_a_model_twice_at_most(tool, monkeypatch):
    asked = Counter()
    ask = tree.direct_sublayers

    def count(layer):
        asked[id(layer)] += 1
        return ask(layer)

    model = deep(50 if tool in ("initialize", "audit", "layer_fans") else 12)
    monkeypatch.setattr(tree, "direct_sublayers", count)
    TOOLS[tool](model)
    assert all(1 <= asked[id(layer)] <= 2 for layer in (model, *model.layers))


def test_report_walks_the_tree_of_a_model_once(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    walked = []
    ask = tree.direct_sublayers
    monkeypatch.setattr(
        tree, "direct_sublayers", lambda layer: walked.append(layer) or ask(layer)
    )
    model = deep(3)
    keras_glorot.report(model, X, path=tmp_path / "report.html")
    assert walked.count(model) == 1


def test_what_connects_nothing_has_no_fans():
    """Biases of attention have rank two, slopes and scales the shape of their input."""
    entry = keras.Input((6, 8))
    y = layers.MultiHeadAttention(2, 4, name="attention")(entry, entry)
    y = layers.LayerNormalization(axis=(1, 2), name="norm")(y)
    y = layers.GRU(4, return_sequences=True, name="gru")(layers.PReLU(name="slopes")(y))
    model = keras.Model(entry, y)
    expected = {
        *(f"attention/{name}/kernel" for name in ("query", "key", "value")),
        "attention/attention_output/kernel",
        *("gru/gru_cell/kernel", "gru/gru_cell/recurrent_kernel"),
    }
    assert set(layer_fans(model)) == expected
    assert {row["path"] for row in audit(model).rows if row["fan_in"]} == expected
    slopes = next(
        row for row in propagate(model, x_like(entry)).rows if "slopes" in row["path"]
    )
    assert slopes["kernel_gradient_std"] is None


def x_like(entry):
    return np.random.default_rng(0).normal(size=(4, *entry.shape[1:])).astype("float32")


def test_factors_of_lora_have_fans_though_one_is_zero():
    layer = layers.Dense(5, name="dense")
    layer.build((None, 7))
    layer.enable_lora(2)
    names = {path.rpartition("/")[2] for path in layer_fans(layer)}
    assert names == {"kernel", "lora_kernel_a", "lora_kernel_b"}
    found = {weight.path: weight.fans for weight in Survey(layer).weights}
    assert found["dense/lora_kernel_b"] == (2, 5)
    assert found["dense/bias"] is None
