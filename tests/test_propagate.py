"""`propagate`: right by hand-made backpropagation, equal on all backends, no trace left."""

import io
import json
import logging
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from cases import CASES, TOKENS, convnet, data, fill, mixed, mlp
from keras import layers
from networks import HEALTHY, SICK
from rich.console import Console
from rich.live import Live

from keras_glorot import GlorotUniform, calibrate, initialize, layer_fans, propagate
from keras_glorot._drawing.stream import draw
from keras_glorot._models.passes import gradient_std, likeness, moments

GOLDEN = Path(__file__).parent / "golden" / "propagate.json"
rng = np.random.default_rng
NUMBERS = ("std", "forward_gain", "gradient_std", "backward_gain", "kernel_gradient_std",
           "saturated", "dead", "likeness")  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_the_same_on_every_backend(case, request):
    model, x = CASES[case]()
    # Automatic names count up within a process, and the mean is next to zero as a rule.
    rows = [
        {
            "layer": row["layer"],
            "shape": list(row["shape"]),
            "mean/std": row["mean"] / row["std"],
        }
        | {key: row[key] for key in NUMBERS if row[key] is not None}
        for row in propagate(model, x, seed=3)
    ]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--overwrite"):
        GOLDEN.write_text(json.dumps(golden | {case: rows}, indent=0) + "\n")
        return
    assert len(rows) == len(golden[case])
    for row, expected in zip(rows, golden[case], strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float):
                absolute = 1e-4 if key == "mean/std" else 1e-9
                value = pytest.approx(value, rel=1e-4, abs=absolute)
            assert row[key] == value, key


def test_every_number_is_that_of_backpropagation_by_hand():
    """tanh, tanh, linear under a mean squared error, in NumPy and float64."""
    model, x, y = mlp(depth=2), data(16, 12), data(16, 4)[::-1]
    w1, b1, w2, b2, w3, b3 = (np.float64(weight) for weight in model.get_weights())
    h1 = np.tanh(x @ w1 + b1)
    h2 = np.tanh(h1 @ w2 + b2)
    out = h2 @ w3 + b3
    g_out = 2 * (out - y) / out.size
    g_h2 = g_out @ w3.T
    g_z2 = g_h2 * (1 - h2**2)
    g_h1 = g_z2 @ w2.T
    g_z1 = g_h1 * (1 - h1**2)
    g_x = g_z1 @ w1.T
    values = [
        (x, h1, g_x, g_h1, x.T @ g_z1),
        (h1, h2, g_h1, g_h2, h1.T @ g_z2),
        (h2, out, g_h2, g_out, h2.T @ g_out),
        (x, out, g_x, g_out, None),
    ]
    table = propagate(model, x, y, "mse")
    assert len(table) == len(values)
    for row, (before, after, g_before, g_after, g_kernel) in zip(
        table, values, strict=True
    ):
        assert row["mean"] == pytest.approx(after.mean(), rel=1e-4, abs=1e-6)
        assert row["std"] == pytest.approx(after.std(), rel=1e-5)
        assert row["forward_gain"] == pytest.approx(after.std() / before.std(), rel=1e-5)
        assert row["gradient_std"] == pytest.approx(g_after.std(), rel=1e-4)
        assert row["backward_gain"] == pytest.approx(
            g_before.std() / g_after.std(), rel=1e-4
        )
        if g_kernel is not None:
            assert row["kernel_gradient_std"] == pytest.approx(g_kernel.std(), rel=1e-4)
    assert table.rows[0]["saturated"] == pytest.approx(np.mean(1 - h1**2 < 0.1))
    assert table.rows[2]["saturated"] is None


def test_rows_stand_in_order_of_execution():
    paths = {
        "convnet": "conv norm separable relu pool dropout softmax",
        "branches": "shared shared inner/dense add first second",
        "text": "embedding attention/query attention/key attention/value "
        "attention/attention_output lstm steps last",
        "residual": "first second",
    }
    for case, expected in paths.items():
        model, x = CASES[case]()
        *rows, last = propagate(model, x)
        found = [row["path"].split(" (")[0] for row in rows]
        if case == "branches":  # Keras is free to call the second `shared` when it likes
            assert sorted(found) == sorted(expected.split())
            assert "shared (2)" in [row["path"] for row in rows]
        else:
            assert found == expected.split()
        assert last["path"] == case


def test_the_gradient_of_a_shared_layer_and_of_branches_is_the_sum():
    """x -> shared -> shared: the kernel's gradient has two parts; x + 2x: three."""
    shared = layers.Dense(3, use_bias=False)
    inputs = keras.Input((3,))
    x = shared(shared(inputs))
    model = fill(keras.Model(inputs, layers.Add()([x, layers.Rescaling(2.0)(x)])))
    x, y = np.float64(data(8, 3)), np.zeros((8, 3))
    w = np.float64(model.get_weights()[0])
    h1, h2 = x @ w, x @ w @ w
    g2 = 3 * (2 * 3 * h2 / h2.size)
    g1 = g2 @ w.T
    first, second, *_ = propagate(model, x, y, "mse")
    assert first["gradient_std"] == pytest.approx(g1.std(), rel=1e-4)
    assert second["gradient_std"] == pytest.approx(g2.std(), rel=1e-4)
    for row in (first, second):
        expected = (x.T @ g1 + h1.T @ g2).std()
        assert row["kernel_gradient_std"] == pytest.approx(expected, rel=1e-4)


def test_the_loss_may_be_a_name_a_loss_or_a_function():
    model, x, y = mlp(), data(16, 12), data(16, 4)
    losses = ["mse", keras.losses.MeanSquaredError()]
    losses.append(lambda y, outputs: keras.ops.mean((y - outputs) ** 2))
    tables = [propagate(model, x, y, loss) for loss in losses]
    assert [row["gradient_std"] for row in tables[0]] == pytest.approx(
        [row["gradient_std"] for row in tables[1]]
    )
    assert [row["gradient_std"] for row in tables[0]] == pytest.approx(
        [row["gradient_std"] for row in tables[2]]
    )


def test_the_seed_chooses_the_gradient_at_the_output():
    model, x = mlp(), data(64, 12)
    one, again, other = (propagate(model, x, seed=seed).rows[-1] for seed in (1, 1, 2))
    assert one == again
    assert one["gradient_std"] != other["gradient_std"]
    # 256 draws of unit variance: the std of their std is 1 / sqrt(2 * 256) = 0.044.
    assert abs(one["gradient_std"] - 1) < 4 * 0.044


def everything(model):
    """All that a pass over the model could have changed."""
    objects = model._flatten_layers()
    return (
        [np.asarray(weight).tobytes() for weight in model.variables],
        [sorted(vars(layer)) for layer in objects],
        [list(layer.losses) for layer in objects],
        [layer.call.__func__ for layer in objects],
        [np.asarray(state).tobytes() for m in model.metrics for state in m.variables],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(fails):
    """Not in weights, BatchNorm statistics, random states, metrics or layers."""
    model = convnet()
    model.compile("sgd", "mse", run_eagerly=True, metrics=["mae"])
    x = data(4, 9, 9, 3)
    model.fit(x, np.zeros((4, 4)), verbose=0)
    scores = model.evaluate(x, np.zeros((4, 4)), verbose=0)
    before = everything(model)
    if fails:
        with pytest.raises(ValueError, match="Argument `x`"):
            propagate(model, data(4, 9, 9, 2))
    else:
        propagate(model, x)
    assert everything(model) == before
    assert model.evaluate(x, np.zeros((4, 4)), verbose=0) == scores


@pytest.mark.parametrize("training", [False, True])
def test_is_the_model_at_inference_or_in_training(training):
    """BatchNorm does what it does in `predict` or in `fit`; dropout is off in both."""
    model, x = convnet(), data(4, 9, 9, 3)
    table = propagate(model, x, training=training)
    model.get_layer("dropout").rate = 0.0
    before = [np.asarray(weight) for weight in model.non_trainable_weights]
    outputs = np.asarray(keras.ops.convert_to_numpy(model(x, training=training)).copy())
    for weight, value in zip(model.non_trainable_weights, before, strict=True):
        weight.assign(value)
    assert table.rows[-1]["std"] == pytest.approx(outputs.std(), rel=1e-5)
    rows = {row["path"]: row for row in table}
    assert rows["dropout"]["forward_gain"] == rows["dropout"]["backward_gain"] == 1


def test_half_precision():
    model = mlp(dtype="mixed_bfloat16")
    single = mlp()
    for row, expected in zip(
        propagate(model, data(64, 12)), propagate(single, data(64, 12)), strict=True
    ):
        assert row["std"] == pytest.approx(expected["std"], rel=0.02)
        assert row["gradient_std"] == pytest.approx(expected["gradient_std"], rel=0.02)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_squares_neither_vanish_nor_overflow(scale):
    values = np.float32(scale * (3 + data(1000)))
    mean, std = moments(values)
    assert mean / scale == pytest.approx(3 + data(1000).mean(), rel=1e-5)
    assert std / scale == pytest.approx(data(1000).std(), rel=1e-5)


def test_ten_million_values_keep_five_digits():
    values = draw("uniform", (10_000_000,), 1.0, "float32", (2,)) + np.float32(10)
    std = moments(values).std
    assert std == pytest.approx(values.std(dtype="float64"), rel=3e-5)


def codes(table):
    return {finding.code for finding in table.findings}


@pytest.mark.parametrize(
    ("gain", "expected"),
    [(0.3, {"vanishing"}), (1.0, set()), (1.2, set()), (20.0, {"saturated"})],
)
def test_findings_on_deep_tanh(gain, expected):
    model = fill(mlp(10, 100), gain)
    found = codes(propagate(model, data(64, 12)))
    assert found >= expected
    assert expected or not found


def test_findings_on_relu():
    """Glorot halves a rectified signal layer by layer; the gain for it does not."""
    deep = mlp(10, 200, "relu")
    assert "vanishing" in codes(propagate(deep, data(64, 12)))
    assert not codes(propagate(fill(deep, math.sqrt(2)), data(64, 12)))
    assert "exploding" in codes(propagate(fill(deep, 3.0), data(64, 12)))


def test_findings_on_dead_units():
    model = mlp(2, 20, "relu", bias_initializer=keras.initializers.Constant(-1.0))
    model.layers[0].bias.assign(np.full(20, -100.0))
    table = propagate(model, data(16, 12), np.ones((16, 4)), "mse")
    assert table.rows[0]["dead"] == 1.0
    assert "dead" in codes(table)
    assert propagate(model, data(9, 12), np.ones((9, 4)), "mse").rows[0]["dead"] is None


def test_findings_on_zero_and_on_nan_weights():
    model = mlp(4)
    model.layers[1].kernel.assign(np.zeros((20, 20)))
    signal, gradient = propagate(model, data(16, 12)).findings
    assert (signal.code, gradient.code) == ("vanishing", "vanishing")
    assert signal.message == f"Signal vanishes: its std is 0 at {signal.path}."
    model.layers[1].kernel.assign(np.full((20, 20), np.nan))
    findings = propagate(model, data(16, 12)).findings
    assert {finding.severity for finding in findings} == {"error"}


def test_likeness_is_the_mean_cosine_between_two_examples():
    """By all pairs, in float64, on every scale; zeros belong to no pair."""
    values = data(7, 5, 3) + np.float32(0.5)
    values[2] = 0
    units = [v.ravel() / np.linalg.norm(v) for v in np.float64(values) if v.any()]
    pairs = [a @ b for i, a in enumerate(units) for b in units[:i]]
    for scale in (1e-30, 1, 1e30):
        found = likeness(values * np.float32(scale), 7)
        assert found == pytest.approx(np.mean(pairs), abs=1e-6)
    assert likeness(values, 5) is None
    assert likeness(values[:1], 1) is None
    assert likeness(values + np.float32(np.inf), 7) is None
    assert likeness(np.repeat(values[:1], 5, 0), 5) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "attention", "last", "max"])
def test_pooling_over_positions_leaves_the_gradient(pooling):
    """It only shares it out: the kernel before gets what the kernel behind does."""
    inputs = keras.Input((200, 12))
    x = layers.Dense(20, use_bias=False, name="before")(inputs)
    if pooling == "mean":
        x = layers.GlobalAveragePooling1D()(x)
    elif pooling == "max":
        x = layers.GlobalMaxPooling1D()(x)
    elif pooling == "last":
        x = x[:, -1]
    else:
        query = layers.Dense(20)(layers.GlobalAveragePooling1D(keepdims=True)(inputs))
        x = layers.Attention()([query, x])[:, 0]
    x = layers.Dense(20, use_bias=False, name="behind")(x)
    model = fill(keras.Model(inputs, layers.Dense(4)(x)))
    rows = {row["path"]: row for row in propagate(model, data(64, 200, 12))}
    behind, w = rows["behind"]["gradient_std"], model.get_layer("behind").kernel
    gradient = rows["before"]["gradient_std"]
    # Through the kernel between them, of 20 by 20 values with variance 1 / 20: the mean of
    # 20 squares of sums has a relative deviation of sqrt(2 / 20), a std half of that.
    assert gradient == pytest.approx(behind, rel=4 * math.sqrt(2 / 20) / 2)
    assert w.shape == (20, 20)


def test_strides_leave_the_gradient():
    """Each stride of 2 halves the gradients per value: to 1/8 here."""
    inputs = x = keras.Input((64, 64, 16))
    for i in range(4):
        x = layers.Conv2D(16, 3, 2, "same", use_bias=False, name=f"conv{i}")(x)
    model = fill(keras.Model(inputs, x))
    rows = propagate(model, data(8, 64, 64, 16)).rows[:4]
    # Channel by channel the factor is as above, over three kernels of 16 by 16 by 9.
    assert rows[0]["gradient_std"] == pytest.approx(rows[3]["gradient_std"], rel=0.3)


def test_the_gradient_at_positions_by_hand():
    """The larger one of the sum and of the root of the sum of squares, over positions."""
    together = np.ones((5, 7, 3), np.float32) * data(5, 1, 3)
    assert gradient_std(together, 5, (-1,)) == pytest.approx(7 * together.std(), rel=1e-5)
    apart = data(5, 400, 3)
    expected = max(20 * apart.std(), apart.sum(1).std())
    assert gradient_std(apart, 5, (-1,)) == pytest.approx(expected, rel=1e-5)
    # Queries of several heads: the last two axes are units.
    assert gradient_std(apart, 5, (-2, -1)) == pytest.approx(apart.std(), rel=1e-5)
    assert gradient_std(apart, 4, (-1,)) == pytest.approx(apart.std(), rel=1e-5)
    first = np.moveaxis(together, -1, 1)
    assert gradient_std(first, 5, (1,)) == pytest.approx(7 * together.std(), rel=1e-5)


def test_examples_that_become_alike_are_found():
    """A bias that is large beside the signal leaves no difference after 5 layers."""
    bias = keras.initializers.RandomNormal(stddev=3.0, seed=1)
    model = mlp(6, 100, "tanh", bias_initializer=bias)
    for layer in model.layers:
        layer.kernel.assign(0.3 * np.asarray(layer.kernel))
    table = propagate(model, data(64, 12))
    assert "collapsed" in codes(table)
    assert table.rows[5]["likeness"] > 0.98


def test_examples_become_alike_in_deep_relu_nets_with_level_signals():
    deep = fill(mlp(100, 100, "relu"), math.sqrt(2))
    assert "collapsed" in codes(propagate(deep, data(64, 12)))
    shallow = fill(mlp(8, 100, "relu"), math.sqrt(2))
    assert "collapsed" not in codes(propagate(shallow, data(64, 12)))
    # Examples that come in alike did not become it.
    alike = data(64, 12) * np.float32(0.01) + np.float32(1)
    assert "collapsed" not in codes(propagate(shallow, alike))


# The others take long where each network is compiled for itself.
FAST = {"dense_tanh", "dense_gelu", "variational_autoencoder", "mean_over_steps",
        "attention_pooling", "strides_and_global_pooling", "text_lstm",
        "squeeze_and_excitation", "transformer_with_normalization_last"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in HEALTHY
    ],
)
def test_networks_that_train_have_no_finding_on_scale(name):
    """That a short fit works for them shows `benchmarks/evidence/findings.py`."""
    version = tuple(map(int, keras.__version__.split(".")[:2]))
    if "transformer" in name and version < (3, 15):
        pytest.skip("Keras draws the kernels of attention too small")
    keras.utils.set_random_seed(1)
    model, x, *_ = HEALTHY[name]()
    x = keras.tree.map_structure(lambda each: each[:32], x)
    assert not codes(propagate(model, x)) & {"vanishing", "exploding", "collapsed"}


@pytest.mark.parametrize("name", SICK)
def test_sick_networks_are_found(name):
    keras.utils.set_random_seed(1)
    model, x, expected = SICK[name]()
    assert codes(propagate(model, x)) & expected


def test_an_activation_that_lets_differences_grow_is_named():
    """GELU at its gain: 40 layers explode; 5 do not."""
    deep = propagate(fill(mlp(40, 100, "gelu"), 1.5335), data(64, 12))
    assert "unstable-activation" in codes(deep)
    assert all("isometric" in finding.advice for finding in deep.findings)
    assert "unstable-activation" not in codes(
        propagate(fill(mlp(5, 100, "gelu"), 1.5335), data(64, 12))
    )


def test_small_signals_and_isometries_are_stable_whatever_the_activation():
    deep = fill(mlp(40, 100, "gelu"), 2.0)  # GELU halves what is small
    first = deep.layers[0].kernel
    first.assign(0.05 * np.asarray(first))
    assert "unstable-activation" not in codes(propagate(deep, data(64, 12)))
    initialize(deep, "isometric", seed=1)
    found = propagate(deep, data(64, 12)).findings
    assert not found


def test_the_std_before_an_activation_layer_is_that_of_the_output():
    inputs = x = keras.Input((12,))
    for _ in range(30):
        x = layers.Activation("softsign")(layers.Dense(24)(x))
    model = keras.Model(inputs, layers.Dense(3)(x))
    initialize(model, GlorotUniform(gain="auto"), seed=1)
    table = propagate(model, data(64, 12))
    (message,) = [f.message for f in table.findings if f.code == "unstable-activation"]
    assert message.startswith(f"At a std of {table.rows[0]['std']:.2g} its activation")


@pytest.mark.parametrize(
    "activations", [("elu", "tanh"), ("tanh", "elu"), ("selu", "gelu", "tanh")]
)
def test_the_levels_of_an_isometric_start_are_no_trend(activations):
    """The std before ELU is 100, before GELU 1, before tanh 0.3."""
    model = mixed(*activations)
    initialize(model, "isometric", seed=1)
    assert not propagate(model, data(64, 64)).findings
    for layer in model.layers:
        layer.kernel.assign(0.5 * np.asarray(layer.kernel))
    assert "vanishing" in codes(propagate(model, data(64, 64)))
    fill(model, 0.5)
    assert "vanishing" in codes(propagate(model, data(64, 64)))


def test_plain_layers_are_sent_to_the_isometric_start_and_others_to_calibrate():
    blocks = [BareSum() for _ in range(16)]
    residual = keras.Sequential([keras.Input((32,)), *blocks, layers.Dense(3)])
    cases = [
        (mlp(40, 20), 0.3, data(64, 12), "isometric"),
        (mlp(60, 50, "relu"), 2**0.5, data(64, 12), "isometric"),
        (residual, 2.0, data(16, 32), "calibrate"),
    ]
    for model, gain, x, word in cases:
        found = propagate(fill(model, gain), x).findings
        found = [each for each in found if each.code not in ("dead", "saturated")]
        assert found
        assert all(word in each.advice for each in found)


def test_the_growth_of_a_residual_stream_is_shown():
    def model(blocks):
        inputs = x = keras.Input((6, 12))
        for i in range(blocks):
            branch = layers.LayerNormalization(name=f"norm{i}")(x)
            x = layers.Add()([x, layers.Dense(12, name=f"dense{i}")(branch)])
        return fill(keras.Model(inputs, layers.LayerNormalization(name="norm")(x)))

    table = propagate(model(30), data(16, 6, 12))
    found = [each for each in table.findings if each.code == "residual-growth"]
    assert len(found) == 1
    # 30 branches of variance 1 on an input of variance 1.
    grown = next(row for row in table if row["path"] == found[0].path)["input_std"]
    assert grown == pytest.approx(math.sqrt(31), rel=0.2)
    assert "residual-growth" not in codes(propagate(model(4), data(16, 6, 12)))


def towers(scale=0.001, same_input=False):
    """Two healthy towers, one of them on a small scale, joined late."""
    a, b = keras.Input((20,)), keras.Input((20,))
    b = a if same_input else b
    left, right = a, layers.Rescaling(scale)(b)
    for _ in range(6):
        left = layers.Dense(20, use_bias=False)(left)
    for _ in range(6):
        right = layers.Dense(20, use_bias=False)(right)
    joined = layers.Concatenate()([left, layers.Rescaling(1 / scale)(right)])
    outputs = layers.Dense(4)(layers.Dense(20)(joined))
    return fill(keras.Model(a if same_input else [a, b], outputs))


@pytest.mark.parametrize("same_input", [False, True])
def test_towers_that_join_late_are_judged_one_by_one(same_input):
    x = data(64, 20)
    model = towers(same_input=same_input)
    assert not codes(propagate(model, x if same_input else [x, x]))
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.kernel.assign(0.3 * np.asarray(layer.kernel))
    assert "vanishing" in codes(propagate(model, x if same_input else [x, x]))


def test_embeddings_are_left_out():
    """A table drawn with std 0.02 starts a signal; it does not make one explode."""
    inputs = keras.Input((7,), dtype="int32")
    small = keras.initializers.RandomUniform(-0.001, 0.001)
    x = layers.Embedding(11, 20, embeddings_initializer=small)(inputs)
    x = layers.LayerNormalization()(x)
    for _ in range(3):
        x = layers.Dense(20)(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    assert not codes(propagate(model, TOKENS))


def test_calls_of_other_threads_are_not_recorded():
    class Slow(layers.Layer):
        def call(self, x):
            if threading.current_thread() is threading.main_thread():
                called.set()
                others_done.wait(10)
            return x

    called, others_done = threading.Event(), threading.Event()
    others_done.set()
    inputs = keras.Input((12,))
    x = layers.Dense(5, "tanh")(inputs)
    model = fill(keras.Model(inputs, layers.Dense(4)(Slow()(layers.Dense(6)(x)))))
    expected = propagate(model, data(16, 12)).rows
    right = np.asarray(keras.ops.convert_to_numpy(model(data(8, 12))))
    called.clear()
    others_done.clear()
    results = []

    def other():
        called.wait(10)
        for _ in range(3):
            results.append(np.asarray(keras.ops.convert_to_numpy(model(data(8, 12)))))
        others_done.set()

    thread = threading.Thread(target=other)
    thread.start()
    rows = propagate(model, data(16, 12)).rows
    thread.join()
    assert rows == expected
    for result in results:
        np.testing.assert_array_equal(result, right)


def test_two_threads_may_propagate_one_model():
    model, x = convnet(), data(4, 9, 9, 3)
    expected = propagate(model, x).rows
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda _: propagate(model, x), range(4)))
    assert all(table.rows == expected for table in tables)
    assert "call" not in vars(model.layers[1])


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_models_of_a_remat_scope(mode):
    def build():
        inputs = keras.Input((12,))
        x = layers.Dense(8, "tanh", name="a")(inputs)
        return fill(keras.Model(inputs, layers.Dense(3, name="b")(x), name="model"))

    with keras.RematScope(mode):
        model = build()
    rows = propagate(model, data(16, 12)).rows
    for row, expected in zip(rows, propagate(build(), data(16, 12)).rows, strict=True):
        assert row["path"] == expected["path"]
        assert row["gradient_std"] == pytest.approx(expected["gradient_std"], rel=1e-5)


class InPlace(layers.Layer):
    def call(self, x):
        if keras.backend.backend() != "torch":
            return 2 * x + 1
        return x.mul_(2).add_(1)


def test_layers_that_work_in_place():
    """The signal that the layer before returned is measured before it is overwritten."""
    inputs = keras.Input((12,))
    x = InPlace(name="inplace")(layers.Dense(9, "tanh", name="first")(inputs))
    model = fill(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    x, w = data(16, 12), np.float64(model.get_weights()[0])
    first, second, *_ = propagate(model, x)
    h = np.tanh(x @ w)
    assert first["std"] == pytest.approx(h.std(), rel=1e-5)
    assert second["std"] == pytest.approx((2 * h + 1).std(), rel=1e-5)
    assert second["backward_gain"] == pytest.approx(2, rel=1e-5)


def test_empty_tensors_between_layers_and_among_inputs():
    """As GPT-NeoX has them (no rotary part) and SAM (no points)."""

    class Split(layers.Layer):
        def call(self, inputs):
            x, points = inputs
            return x[:, :0], x, points

    class Join(layers.Layer):
        def call(self, parts):
            return keras.ops.concatenate(parts[:2], axis=-1)

    x, points = keras.Input((12,)), keras.Input((0, 2))
    parts = Split(name="split")([layers.Dense(8, name="first")(x), points])
    outputs = layers.Dense(3, name="last")(Join(name="join")(parts))
    model = fill(keras.Model([x, points], outputs))
    rows = {
        row["path"]: row for row in propagate(model, [data(16, 12), np.zeros((16, 0, 2))])
    }
    assert rows["split"]["std"] == pytest.approx(rows["first"]["std"], rel=1e-6)
    assert rows["join"]["forward_gain"] == pytest.approx(1, rel=1e-6)


def test_paths_are_those_of_the_other_tables():
    """Two nested models of the same layers, and a layer called twice."""

    def inner(name):
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(6, name="dense")], name=name
        )

    inputs = keras.Input((6,))
    one = inner("one")
    model = fill(keras.Model(inputs, inner("two")(one(one(inputs)))))
    paths = [row["path"] for row in propagate(model, data(8, 6))][:-1]
    assert paths == ["one/dense", "one/dense (2)", "two/dense"]
    assert {f"{path}/kernel" for path in paths if "(" not in path} <= set(layer_fans(model))


def test_progress_that_can_not_be_drawn_disturbs_nothing():
    console = Console(file=io.StringIO(), force_terminal=True)
    with Live("outer", console=console):
        table = propagate(mlp(), data(16, 12), verbose=True)
    assert table.rows == propagate(mlp(), data(16, 12), verbose=False).rows or len(table)


class Decoder(layers.Layer):
    """Takes two tensors, and has no value to return first."""

    def __init__(self):
        super().__init__(name="decoder")
        self.embed = layers.Embedding(11, 8, name="embed")
        self.attention = layers.MultiHeadAttention(2, 4, name="attention")

    def build(self, ids_shape, context_shape):
        self.embed.build(ids_shape)
        self.attention.build((*ids_shape, 8), context_shape)

    def call(self, ids, context, scale=1.0):
        x = self.embed(ids)
        return {"cache": None, "outputs": x + scale * self.attention(x, context)}


def built(layer, *shapes):
    layer.build(*shapes)
    return fill(layer)


@pytest.mark.parametrize("tool", [propagate, calibrate])
def test_a_call_that_takes_several_tensors(tool):
    context = data(12, 5, 6)
    model = built(Decoder(), (12, 7), (12, 5, 6))
    rows = tool(model, [TOKENS, context]).rows
    assert {row["path"].split("/")[0] for row in rows} >= {"attention"}
    assert rows[0]["std"] > 0
    assert rows[0]["gradient_std"] > 0
    if tool is propagate:
        named = {"context": context, "ids": TOKENS}
        assert propagate(model, named).rows == rows
        assert propagate(model, (TOKENS, context)).rows == rows
        assert rows[-1]["shape"] == (12, 7, 8)


def test_attention_alone():
    model = built(layers.MultiHeadAttention(2, 4, name="attention"), (4, 7, 8), (4, 5, 6))
    rows = propagate(model, [data(4, 7, 8), data(4, 5, 6)]).rows
    paths = ["query", "key", "value", "attention_output", "attention"]
    assert [row["path"] for row in rows] == paths


def test_a_call_that_takes_one_structure():
    """A list, or a dictionary of other names than those of arguments, stays whole."""

    class Sum(layers.Layer):
        def __init__(self):
            super().__init__(name="sum")
            self.dense = layers.Dense(3)

        def build(self, shapes):
            self.dense.build((None, 6))

        def call(self, parts, scale=1.0):
            one, other = parts.values() if isinstance(parts, dict) else parts
            return self.dense(scale * one + other)

    model, x = built(Sum(), [(None, 6), (None, 6)]), data(8, 6)
    by_name = {"one": x, "scale": x}
    assert propagate(model, [x, x]).rows == propagate(model, by_name).rows
    one, other = keras.Input((6,), name="inputs"), keras.Input((6,), name="mask")
    functional = keras.Model({"inputs": one, "mask": other}, model([one, other]))
    rows = propagate(functional, {"inputs": x, "mask": x}).rows
    assert rows[-1]["shape"] == (8, 3)


class Broken(layers.Dense):
    def call(self, x):
        return super().call(x) + {"a": 1}["b"]


def test_an_error_of_the_model_begins_with_its_reason():
    model = built(Broken(3, name="broken"), (None, 6))
    with pytest.raises(ValueError, match=r"^Calling `model` failed: KeyError: b\. R"):
        propagate(model, data(4, 6))


class ToClasses(keras.layers.Layer):
    def call(self, x):
        return keras.ops.argmax(x, -1)


class Stop(keras.layers.Layer):
    def call(self, x):
        return keras.ops.stop_gradient(x)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda: (len, data(2, 12)), TypeError, "Argument `model` must be a Keras"),
        (lambda: (layers.Dense(2), data(2, 12)), ValueError, "`model` must be built"),
        (lambda: (mlp(), data(2, 13)), ValueError, r"`x` must .* \(2, 13\)"),
        (lambda: (mlp(), data(0, 12)), ValueError, r"at least one example.*\(0, 12\)"),
        (lambda: (mlp(), [[1.0] * 12]), ValueError, "at least one example"),
        (lambda: (mlp(), data(2, 12) * np.nan), ValueError, "`x` must be finite"),
        (lambda: (mlp(), np.float64(data(2, 12)) * 1e300), ValueError, "must be finite"),
        (lambda: (mlp(), np.zeros((2, 12))), ValueError, "`x` must hold data"),
        (lambda: (mlp(), data(2, 12), data(2, 4)), ValueError, "given together"),
        (lambda: (mlp(), data(2, 12), None, "mse"), ValueError, "given together"),
        (lambda: (mlp(), data(2, 12), data(2, 9), "mse"), ValueError, r"`y` must .*2, 9"),
        (lambda: (mlp(), data(2, 12), {"a": 3}, "mse"), ValueError, "`y` must be targets"),
        (
            lambda: (keras.Sequential([*mlp().layers, ToClasses()]), data(2, 12)),
            ValueError,
            "must return floats",
        ),
        (
            lambda: (keras.Sequential([*mlp().layers, Stop()]), data(2, 12)),
            ValueError,
            "differentiable path",
        ),
    ],
)
def test_arguments_that_can_not_be_used(arguments, error, match):
    model, *rest = arguments()
    if isinstance(model, keras.Sequential):
        model.build((None, 12))
    with pytest.raises(error, match=match):
        propagate(model, *rest)


@pytest.mark.parametrize("seed", [1.5, True])
def test_seeds_that_are_no_integers(seed):
    with pytest.raises(TypeError, match="Argument `seed` must be an int"):
        propagate(mlp(), data(2, 12), seed=seed)


def test_forward_and_backward_are_shown_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    inputs = keras.Input((32, 32, 3))
    x = inputs
    for i in range(4):
        name = f"a_long_name_of_a_layer_of_a_network_{i}"
        x = layers.Conv2D(128, 3, activation="tanh", name=name)(x)
    model = keras.Model(inputs, x)
    text = str(propagate(model, np.random.default_rng(0).normal(size=(16, 32, 32, 3))))
    heads = " ".join(text.split("──")[0].split())
    assert "forward gradient backward" in heads
    assert max(map(len, text.splitlines())) <= 80


def test_no_remarks_on_retracing(caplog):
    """TensorFlow's, as each grouped convolution is compiled anew."""
    x = inputs = keras.Input((8, 8, 8))
    for _ in range(8):
        x = layers.Conv2D(8, 3, groups=4, padding="same")(x)
    logging.getLogger("tensorflow").addHandler(caplog.handler)
    try:
        propagate(keras.Model(inputs, x), data(4, 8, 8, 8))
    finally:
        logging.getLogger("tensorflow").removeHandler(caplog.handler)
    assert caplog.text == ""


@pytest.mark.parametrize("tool", [propagate, calibrate])
@pytest.mark.parametrize(
    "x",
    [
        np.arange(48).reshape(4, 12).astype(str),
        np.full((4, 12), None),
        np.full((4, 12), {}, object),
    ],
)
def test_a_batch_of_text_or_objects_is_refused_by_its_name(tool, x):
    with pytest.raises((TypeError, ValueError), match=r"Argument `x` must .* numbers"):
        tool(mlp(), x)


class BareSum(layers.Layer):
    """A residual block that adds in its own `call`."""

    def __init__(self):
        super().__init__()
        self.inner, self.end = layers.Dense(32, "gelu"), layers.Dense(32)

    def call(self, x):
        return x + self.end(self.inner(x))


def test_blocks_that_add_in_their_own_call_are_no_plain_layers():
    blocks = [BareSum() for _ in range(16)]
    model = keras.Sequential([keras.Input((32,)), *blocks, layers.Dense(3)])
    assert "unstable-activation" not in codes(propagate(fill(model), data(16, 32)))


def test_each_activation_is_integrated_once(monkeypatch):
    """That takes longer than a pass over its layer."""
    calls = []
    module = sys.modules["keras_glorot.tools.propagate"]
    monkeypatch.setattr(
        module, "activation_growth", lambda *arguments: calls.append(arguments) or 1.2
    )
    hidden = [layers.Dense(8, "gelu") for _ in range(30)]
    table = propagate(keras.Sequential([keras.Input((8,)), *hidden]), data(16, 8))
    assert "unstable-activation" in {finding.code for finding in table.findings}
    assert len(calls) == 1
