"""`calibrate`: all three hold on new data, by hand too, or nothing is changed."""

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from cases import CASES, data, fill, mixed, mlp
from keras import layers

import keras_glorot
from keras_glorot import _backends as backends
from keras_glorot import calibrate, initialize, propagate
from keras_glorot.tables.findings import are_remarks
from keras_glorot.tools import _scaling
from keras_glorot.tools import calibrate as calibration

PACKAGE = Path(keras_glorot.__file__).parent
GOLDEN = Path(__file__).parent / "golden" / "calibrate.json"


def snapshot(model):
    """All that `calibrate` could change."""
    return (
        [np.asarray(weight).tobytes() for weight in model.variables],
        [sorted(vars(layer)) for layer in model._flatten_layers()],
    )


def sick(case):
    """The models of other tests, with kernels of five times the size."""
    model, x = CASES[case]()
    return fill(model, 5), x


def codes(table):
    return {finding.code for finding in table.findings}


def by_path(table):
    return {row["path"]: row for row in table}


def deep(activation, depth=30, width=64):
    model = keras.Sequential([keras.Input((width,))])
    for _ in range(depth):
        model.add(layers.Dense(width, activation))
    model.add(layers.Dense(10))
    return fill(model), data(64, width)


def signal_and_gradient(model, x, activation, slope):
    """Std of each hidden kernel's output and of the gradient there, in NumPy."""
    weights = [np.float64(weight) for weight in model.get_weights() if weight.ndim == 2]
    h, outputs = np.float64(x), []
    for w in weights[:-1]:
        outputs.append(h @ w)
        h = activation(outputs[-1])
    g = np.random.default_rng(0).standard_normal((len(x), weights[-1].shape[1]))
    gradients = []
    for w, z in zip(weights[:0:-1], outputs[::-1], strict=True):
        g = (g @ w.T) * slope(z)
        gradients.insert(0, g.std())
    return np.array([z.std() for z in outputs]), np.array(gradients)


FUNCTIONS = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: z > 0),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_signal_and_gradient_hold_on_new_data_by_hand(activation):
    """With another random gradient at the output than the one of `calibrate`."""
    model, x = deep(activation, depth=20)
    calibrate(model, x)
    s, g = signal_and_gradient(model, data(128, 64)[64:], *FUNCTIONS[activation])
    middle = np.exp(np.mean(np.log(s)))
    assert s.max() / middle < 2
    assert middle / s.min() < 2
    assert 0.5 < s[-1] / s[0] * g[0] / g[-1] < 2


@pytest.mark.parametrize("case", CASES)
def test_factors_are_the_same_on_every_backend(case, request):
    model, x = sick(case)
    before = model.get_weights()
    table = calibrate(model, x, seed=3)
    factors = [row["factor"] for row in table]
    named = {f"{row['path']} of {case}": row["factor"] for row in table}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--overwrite"):
        GOLDEN.write_text(json.dumps(golden | {case: factors}, indent=0) + "\n")
        return
    assert named == pytest.approx(dict(zip(named, golden[case], strict=True)), rel=1e-3)
    paths = [weight.path for weight in model.weights]
    assert len(set(paths)) == len(paths)
    changed = 0
    for path, old, new in zip(paths, before, model.get_weights(), strict=True):
        ratio = new[old != 0] / old[old != 0]
        if not np.array_equal(old, new):
            changed += 1
            np.testing.assert_allclose(ratio, ratio[0], 1e-5, err_msg=f"{path} of {case}")
            assert ratio[0] > 0, f"{path} of {case}"
    assert changed == sum(factor != 1 for factor in factors)


@pytest.mark.parametrize("case", CASES)
def test_the_table_tells_what_propagate_then_measures(case):
    """On the half of the batch that the factors do not come from."""
    model, x = sick(case)
    for weight in model.weights:
        if weight.name == "bias":
            weight.assign(np.zeros(weight.shape))
    table = calibrate(model, x, seed=3)
    is_scaled = any(row["factor"] != 1 for row in table)
    half = keras.tree.map_structure(lambda array: array[is_scaled::2], x)
    rows = {row["path"]: row for row in propagate(model, half, seed=3)}
    for path, row in by_path(table).items():
        layer = rows.get(path.rpartition("/")[0])
        if layer is None:  # inside a loop
            continue
        linear = layer["saturated"] is None and layer["dead"] is None
        plain = layer["layer"] in ("Dense", "EinsumDense", "SeparableConv2D")
        if linear and plain and path not in ("softmax/kernel", "first/kernel"):
            name = f"{path} of {case}"
            assert row["std"] == pytest.approx(layer["std"], rel=0.02), name
            assert row["likeness"] == pytest.approx(layer["likeness"], abs=0.01), name


def test_the_same_batch_gives_the_same_factors():
    tables = [calibrate(*deep("tanh", depth=12), seed=1) for _ in range(2)]
    factors = [[row["factor"] for row in table] for table in tables]
    assert factors[0] == factors[1]
    assert set(factors[0]) != {1}


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_second_calibration_changes_nothing(activation):
    model, x = deep(activation, depth=8)
    assert max(row["factor"] for row in calibrate(model, x)) > 1
    before = model.get_weights()
    calibrate(model, x)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("activation", ["gelu", "relu", "linear"])
def test_an_isometric_start_is_left_as_it_is(activation):
    model, x = deep(activation, depth=30 if activation == "gelu" else 8)
    initialize(model, "isometric", seed=1)
    before = model.get_weights()
    table = calibrate(model, x)
    assert table.note.startswith("Nothing was scaled: all three hold as they are.")
    assert not table.findings
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("activations", [("elu", "tanh"), ("elu", "gelu", "relu")])
def test_levels_of_an_isometric_start_stay(activations):
    """The std before ELU is 100, before GELU and ReLU 1, before tanh 0.3."""
    model = mixed(*activations)
    initialize(model, "isometric", seed=1)
    before = snapshot(model)
    assert not calibrate(model, data(64, 64)).findings
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("activations", "factor"), [(("elu", "tanh"), 0.8), (("tanh", "relu"), 1.2)]
)
def test_levels_of_an_isometric_start_are_restored(activations, factor):
    """Nearly an isometry again, and the kernels of each activation at their own level."""
    model, x = mixed(*activations), data(64, 64)
    initialize(model, "isometric", seed=1)
    spread = propagate(model, x).rows[-1]["jacobian_spread"]
    for layer in model.layers:
        layer.kernel.assign(factor * np.asarray(layer.kernel))
    calibrate(model, x)
    assert propagate(model, x).rows[-1]["jacobian_spread"] < 1.1 * spread


def test_the_levels_of_other_starts_are_alike():
    model = fill(mixed("elu", "tanh"))
    stds = [row["std"] for row in calibrate(model, data(64, 64))][:-1]
    assert max(stds) < 1.5 * min(stds)


def test_a_shared_layer_has_one_factor_which_its_first_call_decides():
    shared = layers.Dense(32, use_bias=False, name="shared")
    inputs = keras.Input((32,))
    x = shared(layers.Rescaling(1.5)(shared(inputs)))
    model = fill(keras.Model(inputs, layers.Dense(4, name="last")(x)), 3)
    table = calibrate(model, data(64, 32))
    assert len(table) == 2
    x = data(64, 32)[::2]
    assert (x @ np.asarray(shared.kernel)).std() == pytest.approx(1, rel=1e-3)


def test_a_bias_is_kept_out_of_the_scale():
    model, x = deep("tanh", depth=4)
    fill(model, 0.3)
    for layer in model.layers:
        layer.bias.assign(np.full(layer.units, 0.5))
    calibrate(model, x)
    z = x[::2] @ np.asarray(model.layers[0].kernel)
    assert z.std() == pytest.approx(1, rel=1e-3)
    assert np.all(np.asarray(model.layers[0].bias) == 0.5)


def test_what_is_not_to_be_scaled_stays_and_is_listed():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 8, name="embedding")(inputs)
    x = layers.LSTM(6, return_sequences=True, name="lstm")(x)
    x = layers.Dense(6, name="frozen", trainable=False)(x)
    x = layers.Dense(6, name="ones", kernel_initializer="ones")(x)
    for i, norm in enumerate([keras.constraints.MaxNorm(2), keras.constraints.UnitNorm()]):
        x = layers.Dense(6, name=f"norm{i}", kernel_constraint=norm)(x)
    x = layers.LayerNormalization()(x)
    x = layers.Dense(6, name="free", kernel_constraint="non_neg")(x)
    model = fill(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    model.get_layer("last").kernel.assign(30 * data(6, 3))
    before = {weight.path: np.asarray(weight) for weight in model.weights}
    table = calibrate(model, np.arange(84).reshape(12, 7) % 11)
    left = {finding.path for finding in table.findings if finding.code == "not-scaled"}
    assert left == {
        "embedding/embeddings",
        "lstm/lstm_cell/recurrent_kernel",
        "frozen/kernel",
        "ones/kernel",
        "norm0/kernel",
        "norm1/kernel",
    }
    changed = {
        weight.path
        for weight in model.weights
        if not np.array_equal(before[weight.path], np.asarray(weight))
    }
    assert changed == {"free/kernel", "last/kernel"}


class Standardized(layers.Dense):
    """Its own scale does not matter: as weight standardization has it."""

    def call(self, x):
        w = self.kernel - keras.ops.mean(self.kernel)
        z = keras.ops.matmul(x, w / keras.ops.std(w)) / math.sqrt(w.shape[0])
        return self.activation(z)


class ByOperation(layers.Conv2D):
    """The same by Keras's own hook; `call` is that of Keras."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel / keras.ops.std(kernel) / 4)


def with_lora(units, activation, name):
    layer = layers.Dense(units, activation, name=name)
    layer.build((None, 32))
    layer.enable_lora(4)  # its second factor is zero
    return layer


@pytest.mark.parametrize(
    "make",
    [
        Standardized,
        lambda units, activation, name: ByOperation(
            units, 1, activation=activation, name=name
        ),
        with_lora,
    ],
)
def test_a_kernel_that_its_output_does_not_follow_is_left_and_listed(make):
    inputs = x = keras.Input((2, 3, 32))
    for i in range(6):
        x = layers.Dense(32, "relu", name=f"dense{i}")(x)
    x = make(32, "relu", name="odd")(x)
    model = fill(keras.Model(inputs, layers.Dense(3, name="last")(x)), 0.5)
    for weight in model.get_layer("odd").weights:
        weight.assign(3 * weight.value)
    if make is with_lora:
        model.get_layer("odd").lora_kernel_b.assign(np.zeros((4, 32)))
    before = [np.array(weight) for weight in model.get_layer("odd").weights]
    table = calibrate(model, data(64, 2, 3, 32))
    for weight, value in zip(model.get_layer("odd").weights, before, strict=True):
        np.testing.assert_array_equal(np.asarray(weight), value)
    assert by_path(table)["dense3/kernel"]["factor"] > 1
    left = {finding.path for finding in table.findings if finding.code == "not-scaled"}
    assert any(path.startswith("odd/") for path in left)
    rows = by_path(propagate(model, data(64, 2, 3, 32)[1::2]))
    assert by_path(table)["last/kernel"]["std"] == pytest.approx(rows["last"]["std"], 0.02)


class Tied(layers.Layer):
    def __init__(self, other, **options):
        super().__init__(**options)
        self.other = other

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.other.kernel))


def test_a_kernel_of_two_layers_has_one_factor():
    one = layers.Dense(16, name="one")
    inputs = keras.Input((16,))
    x = Tied(one, name="tied")(one(inputs))
    model = fill(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    x = data(32, 16)
    table = calibrate(model, 9 * x)
    assert [row["path"] for row in table] == ["one/kernel", "last/kernel"]
    assert (9 * x[::2] @ np.asarray(one.kernel)).std() == pytest.approx(1, rel=1e-3)


def test_scores_of_attention_are_made_smaller_and_never_larger():
    for scale, most in ((9, 1.1), (0.1, 0.1)):
        inputs = keras.Input((20, 32))
        x = inputs + layers.MultiHeadAttention(4, 8, name="attention")(inputs, inputs)
        model = fill(keras.Model(inputs, layers.Dense(3)(layers.Dense(32)(x))), scale)
        rows = by_path(calibrate(model, data(16, 20, 32)))
        for name in ("query", "key"):
            assert rows[f"attention/{name}/kernel"]["role"] == "bounded"
            assert rows[f"attention/{name}/kernel"]["std"] < most


class LayerScale(layers.Layer):
    def build(self, input_shape):
        start = keras.initializers.Constant(1e-6)
        self.gamma = self.add_weight(
            shape=input_shape[-1:], initializer=start, name="gamma"
        )

    def call(self, x):
        return x * self.gamma


@pytest.mark.parametrize("switch", [LayerScale, "zeros"])
def test_branches_that_are_switched_off_on_purpose(switch):
    """The rest is as if they were not there."""
    inputs = keras.Input((32,))
    x = layers.Dense(32, name="stem")(inputs)
    for i in range(4):
        branch = layers.Dense(32, "relu", name=f"branch{i}")(x)
        if switch == "zeros":
            branch = layers.Dense(32, kernel_initializer="zeros", name=f"zero{i}")(branch)
        else:
            branch = switch()(branch)
        x = layers.Add()([x, branch])
    model = keras.Model(inputs, layers.Dense(3, name="last")(layers.Dense(32)(x)))
    for layer in model.layers:
        if isinstance(layer, layers.Dense) and "zero" not in layer.name:
            layer.kernel.assign(data(*layer.kernel.shape) / 5)
    rows = by_path(calibrate(model, 9 * data(64, 32)))
    assert rows["stem/kernel"]["std"] == pytest.approx(1, rel=0.1)
    assert rows["last/kernel"]["std"] < 1.1


def add(*terms):
    return layers.Add()(terms)


def residual(blocks, add, normalize=None, activate=None):
    inputs = x = keras.Input((6, 32))
    for i in range(blocks):
        branch = normalize()(x) if normalize else x
        branch = layers.Dense(64, "gelu", name=f"inner{i}")(branch)
        x = add(x, layers.Dense(32, name=f"end{i}")(branch))
        x = activate()(x) if activate else x
    x = layers.LayerNormalization(name="norm")(x)
    return fill(keras.Model(inputs, layers.Dense(3, name="last")(x)))


class Residual(layers.Layer):
    def __init__(self):
        super().__init__()
        self.norm = layers.LayerNormalization()
        self.inner, self.end = layers.Dense(64, "gelu"), layers.Dense(32)

    def call(self, x):
        return x + self.end(self.inner(self.norm(x)))


@pytest.mark.parametrize("add", [add, lambda x, branch: x + branch])
@pytest.mark.parametrize("blocks", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_residual_streams_are_bounded(add, blocks):
    """All branches together add a quarter to the variance."""
    model, x = fill(residual(blocks, add), 3), data(32, 6, 32)
    table = calibrate(model, x)
    stds = {path: row["std"] for path, row in by_path(table).items()}
    ends = [std for path, std in stds.items() if path.startswith("end")]
    inner = [std for path, std in stds.items() if path.startswith("inner")]
    np.testing.assert_allclose(inner, 1, rtol=0.1)
    np.testing.assert_allclose(ends, 0.5 / math.sqrt(blocks), rtol=0.1)
    stream = by_path(propagate(model, x))["norm"]["input_std"]
    assert stream == pytest.approx(math.sqrt(x.var() + 0.25), rel=0.05)
    assert are_remarks(table.findings)


@pytest.mark.slow
def test_residual_streams_of_subclassed_blocks_are_bounded():
    blocks = [OwnSum(None) for _ in range(24)]
    final = layers.LayerNormalization(name="norm")
    model = keras.Sequential([keras.Input((6, 32)), *blocks, final, layers.Dense(3)])
    x = data(32, 6, 32)
    calibrate(fill(model), x)
    norm = by_path(propagate(model, x))["norm"]
    assert norm["input_std"] == pytest.approx(math.sqrt(x.var() + 0.25), rel=0.06)


class Positions(layers.Layer):
    def build(self, input_shape):
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.table = self.add_weight(
            shape=input_shape[1:], initializer=normal, name="table"
        )

    def call(self, x):
        return x + self.table


@pytest.mark.parametrize("with_positions", [False, True])
def test_a_stem_stays_in_proportion_to_the_positions_added_to_it(with_positions):
    inputs = keras.Input((6, 32))
    x = layers.Dense(32, name="stem")(inputs)
    x = Positions(name="positions")(x) if with_positions else x
    x = layers.Dense(32, "relu", name="next")(x)
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    before = np.asarray(model.get_layer("stem").kernel)
    table = calibrate(model, 9 * data(16, 6, 32))
    same = np.array_equal(before, np.asarray(model.get_layer("stem").kernel))
    assert same == with_positions
    assert by_path(table)["next/kernel"]["std"] == pytest.approx(1, rel=0.2)
    left = {finding.path for finding in table.findings if finding.code == "not-scaled"}
    assert left == ({"stem/kernel", "positions/table"} if with_positions else set())


@pytest.mark.parametrize(
    ("activation", "levels"), [("gelu", {0.05, 0.2}), ("tanh", {0.2, 0.5}), ("relu", {1})]
)
def test_the_level_is_the_highest_at_which_all_three_hold(activation, levels):
    """GELU and tanh let differences grow near 1; ReLU is the same at any level."""
    model, x = deep(activation, depth=20 if activation == "relu" else 30)
    table = calibrate(model, x)
    assert float(table.note.split("Scaled to a std of ")[1].split(". ")[0]) in levels
    *alike, _ = [row["likeness"] for row in table]
    if activation != "relu":
        assert abs(alike[-1] - alike[0]) < 0.3
    assert 0.3 < table.rows[-1]["std"] < 1.1  # of the head, whatever the level


def test_batch_normalization_is_seen_as_in_training_and_left_as_it_is():
    inputs = x = keras.Input((16,))
    for _ in range(5):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(16)(x)))
    model = fill(keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.5)(x))))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_variance.assign(np.full(16, 100.0))
    others = [v for v in model.variables if "kernel" not in v.path]
    before = [np.asarray(variable) for variable in others]
    table = calibrate(model, data(64, 16))
    for variable, value in zip(others, before, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)
    # With the moving statistics the signal would fall tenfold at each.
    s = [row["std"] for row in table][:-1]
    assert max(s) / min(s) < 3


def test_a_model_whose_kernels_are_all_normalized_is_sound_as_it_is():
    inputs = x = keras.Input((16,))
    for _ in range(30):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(16)(x)))
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    before = snapshot(model)
    table = calibrate(model, data(64, 16))
    assert snapshot(model) == before
    assert "normalization layers undo" in table.note
    assert are_remarks(table.findings)


class WeightNormalized(layers.Layer):
    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 32), name="kernel")

    def call(self, inputs):
        return keras.ops.relu(inputs @ keras.ops.normalize(self.kernel, axis=0))


def test_a_layer_that_normalizes_its_own_kernel_is_not_sound_for_that():
    hidden = [WeightNormalized() for _ in range(16)]
    model = fill(keras.Sequential([keras.Input((32,)), *hidden, layers.Dense(3)]))
    (finding,) = calibrate(model, data(64, 32)).findings
    assert finding.severity == "warning"
    assert "normalization layer follows" not in finding.message


def test_the_kernel_that_branches_are_added_to_does_not_count():
    """Its gradient is that of the whole sum, ten times that of one of ten branches."""
    inputs = keras.Input((8, 32))
    x = layers.Dense(32, name="stem")(inputs)
    for _ in range(5):
        x = x + layers.MultiHeadAttention(4, 8)(x, x)
        x = x + layers.Dense(32)(layers.Dense(64, "gelu")(x))
    outputs = layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
    table = calibrate(fill(keras.Model(inputs, outputs), 2), data(64, 8, 32))
    assert are_remarks(table.findings), table.note
    assert min(row["factor"] for row in table) < 0.5


def test_a_part_of_the_model_alone():
    model, x = deep("relu", depth=8)
    before = model.get_weights()
    part = model.layers[1:6]
    table = calibrate(model, x, layers=[*part[:4], part[4].name])
    assert [row["path"] for row in table] == [f"{layer.name}/kernel" for layer in part]
    pairs = zip(before, model.get_weights(), strict=True)
    changed = [i for i, (a, b) in enumerate(pairs) if not np.array_equal(a, b)]
    assert changed == [2, 4, 6, 8, 10]


def test_half_precision():
    dtypes = ("mixed_bfloat16", "float32", "bfloat16")
    models = [fill(mlp(dtype=dtype), 9) for dtype in dtypes]
    half, single, all_half = (calibrate(each, data(64, 12)).rows for each in models)
    for row, expected in zip(half, single, strict=True):
        assert row["factor"] == pytest.approx(expected["factor"], rel=0.03)
    assert all_half[0]["factor"] < 1
    assert models[2].layers[0].kernel.dtype == "bfloat16"


def gated(blocks):
    inputs = x = keras.Input((32,))
    for _ in range(blocks):
        x = layers.Dense(32)(layers.Dense(64, "silu")(x) * layers.Dense(64)(x))
    return fill(keras.Model(inputs, layers.Dense(3)(x)))


def highway(blocks):
    inputs = x = keras.Input((32,))
    for _ in range(blocks):
        gate = layers.Dense(32, "sigmoid")(x)
        x = gate * layers.Dense(32, "relu")(x) + (1 - gate) * x
    return fill(keras.Model(inputs, layers.Dense(3)(x)))


def squared(blocks):
    def square(z):
        return keras.ops.relu(z) ** 2

    hidden = [layers.Dense(32, square) for _ in range(blocks)]
    return fill(keras.Sequential([keras.Input((32,)), *hidden, layers.Dense(3)]))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (gated, "product"),
        pytest.param(highway, "product", marks=pytest.mark.slow),
        (squared, "square"),
    ],
)
def test_a_model_that_no_scale_holds_is_left_with_the_cause(make, cause):
    """The factors of one half give other numbers on the other, or on 1.01 times as much."""
    model = make(16)
    before = snapshot(model)
    table = calibrate(model, data(16, 32))
    assert snapshot(model) == before
    assert {row["factor"] for row in table} == {1}
    (finding,) = [each for each in table.findings if each.code == "unreached"]
    assert finding.severity == "warning"
    assert re.search(cause, finding.message)
    assert finding.path in {row["path"].rpartition("/")[0] for row in table}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: layers.LeakyReLU(0.05), "LeakyReLU"),
        (lambda: layers.PReLU(keras.initializers.Constant(0.05)), "leaky_relu"),
    ],
)
def test_an_activation_that_is_a_layer_is_named_as_the_cause(make, name):
    hidden = [each for _ in range(24) for each in (layers.Dense(32), make())]
    model = fill(keras.Sequential([keras.Input((32,)), *hidden, layers.Dense(3)]))
    (finding,) = calibrate(model, 1 + data(32, 32)).findings
    assert finding.message.endswith(f"The likely cause is the activation {name}.")


def variational():
    inputs = keras.Input((16, 16, 1))
    x = inputs
    for filters in (16, 32):
        x = layers.Conv2D(filters, 3, 2, "same", activation="relu")(x)
    x = layers.Flatten()(x)
    mean, log_var = layers.Dense(4)(x), layers.Dense(4)(x)
    x = mean + 0.1 * keras.ops.exp(log_var / 2)
    x = layers.Reshape((4, 4, 32))(layers.Dense(512, "relu")(x))
    x = layers.Conv2DTranspose(16, 3, 2, "same", activation="relu")(x)
    x = layers.Conv2DTranspose(1, 3, 2, "same")(x)

    def loss(x, outputs):
        x_again, mean, log_var = outputs
        kl = keras.ops.exp(log_var) + mean**2 - 1 - log_var
        return keras.ops.mean((x_again - x) ** 2) + keras.ops.mean(kl) / 2

    return keras.Model(inputs, [x, mean, log_var]), data(64, 16, 16, 1), None, loss


def detector():
    """Levels of a pyramid with shared heads, and the focal prior in a bias."""
    inputs = x = keras.Input((16, 16, 3))
    levels = []
    for filters in (16, 32, 32):
        x = layers.Conv2D(filters, 3, 2, "same", activation="relu")(x)
        levels.append(layers.Conv2D(16, 1)(x))
    small = keras.initializers.RandomNormal(stddev=0.01)
    prior = keras.initializers.Constant(-math.log(99))
    inner = layers.Conv2D(16, 3, padding="same", activation="relu")
    head = layers.Conv2D(5, 3, padding="same", kernel_initializer=small)
    head.bias_initializer = prior
    outputs = [layers.Reshape((-1, 5))(head(inner(level))) for level in levels]
    model = keras.Model(inputs, layers.Concatenate(1)(outputs))

    def loss(y, logits):  # all is background
        return keras.ops.mean(keras.ops.softplus(logits))

    return model, data(64, 16, 16, 3), np.zeros((64, 84, 5), "float32"), loss


def recommender():
    users, items = keras.Input((1,), dtype="int32"), keras.Input((1,), dtype="int32")
    x = layers.Concatenate()([layers.Embedding(50, 16)(each) for each in (users, items)])
    x = layers.Flatten()(x)
    for _ in range(3):
        x = layers.Dense(32, "relu")(x)
    ids = [np.arange(64)[:, None] % 50, np.arange(64)[:, None] * 7 % 50]
    y = data(64, 1)
    return keras.Model([users, items], layers.Dense(1)(x)), ids, y, "mse"


def text():
    inputs = keras.Input((20,), dtype="int32")
    x = layers.LSTM(32)(layers.Embedding(50, 16)(inputs))
    model = keras.Model(inputs, layers.Dense(4)(layers.Dense(32, "relu")(x)))
    ids = np.arange(64 * 20).reshape(64, 20) ** 2 % 50
    return model, ids, np.arange(64) % 4, CROSS_ENTROPY


def translator():
    """Cross attention from one text to another."""
    source, target = (keras.Input((12,), dtype="int32") for _ in range(2))
    a, b = layers.Embedding(50, 32)(source), layers.Embedding(50, 32)(target)
    for _ in range(2):
        a = layers.LayerNormalization()(a + layers.MultiHeadAttention(4, 8)(a, a))
        a = a + layers.Dense(32)(layers.Dense(64, "gelu")(a))
    for _ in range(2):
        b = layers.LayerNormalization()(b + layers.MultiHeadAttention(4, 8)(b, a))
        b = b + layers.Dense(32)(layers.Dense(64, "gelu")(b))
    ids = [np.arange(64 * 12).reshape(64, 12) ** k % 50 for k in (2, 3)]
    model = keras.Model([source, target], layers.Dense(50)(b))
    return model, ids, ids[1], CROSS_ENTROPY


def u_net():
    inputs = x = keras.Input((16, 16, 1))
    skips = []
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    for skip in skips[::-1]:
        x = layers.Concatenate()([layers.UpSampling2D()(x), skip])
        x = layers.Conv2D(skip.shape[-1], 3, padding="same", activation="relu")(x)
    x, y = layers.Conv2D(1, 1)(x), data(64, 16, 16, 1)
    return keras.Model(inputs, x), data(64, 16, 16, 1), np.float32(y > 0), LOGITS


def experts():
    inputs = x = keras.Input((32,))
    for _ in range(4):
        gate = keras.ops.softmax(layers.Dense(4)(x))
        parts = [layers.Dense(32, "relu")(x) for _ in range(4)]
        x = keras.ops.sum(keras.ops.stack(parts, -1) * gate[:, None], axis=-1)
    model = keras.Model(inputs, layers.Dense(4)(x))
    return model, data(64, 32), np.arange(64) % 4, CROSS_ENTROPY


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LOGITS = keras.losses.BinaryCrossentropy(from_logits=True)
HARMED = [variational, detector, recommender, text, translator, u_net, experts]


@pytest.mark.parametrize("make", HARMED)
def test_the_loss_of_a_sound_model_is_not_made_worse(make):
    """On the half of the batch that the factors do not come from."""
    keras.utils.set_random_seed(0)
    model, x, y, loss = make()
    y = x if y is None else y

    def half(array):
        return keras.ops.convert_to_tensor(array[1::2])

    def losses():
        outputs = model(keras.tree.map_structure(half, x))
        function: Any = keras.losses.get(loss)
        values = keras.ops.convert_to_numpy(function(half(y), outputs))
        first = keras.ops.convert_to_numpy(keras.tree.flatten(outputs)[0])
        return float(np.mean(values)), float(np.var(first))

    before, most_variance = losses()
    table = calibrate(model, x)
    after, variance = losses()
    # An image of zeros, as before, is nearer to noise than one with a variance.
    most = 1.15 * before + (variance if make is variational else 0)
    assert after < most, f"{make.__name__}: {table.note}"
    assert variance < max(1, 1.01 * most_variance), f"{make.__name__}: {table.note}"
    for row in table:
        assert row["factor"] < 10, f"{row['path']} of {make.__name__}"


def test_an_output_that_other_kernels_take_keeps_its_std():
    """As the mean and the variance of a latent variable, which a loss weighs."""
    keras.utils.set_random_seed(0)
    model, x, *_ = variational()
    heads = [f"{layer.name}/kernel" for layer in model.layers if "dense" in layer.name][:2]
    rows = by_path(calibrate(model, x))
    assert any(row["factor"] != 1 for row in rows.values())
    for path in heads:
        row = rows[path]
        assert row["role"] == "bounded", path
        assert row["std"] == pytest.approx(row["std_before"], rel=0.3), path


class Stop(BaseException):
    """As an interrupt: no `Exception`."""


@pytest.mark.parametrize(
    "stage", ["first call", "later call", "gradient", "assign", "loss"]
)
def test_an_error_at_any_stage_leaves_the_model_bit_identical(stage, monkeypatch):
    model, x = sick("convnet")
    count = 0

    def failing(function, at):
        def fail(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise Stop
            return function(*args, **kwargs)

        return fail

    arguments = ()
    if stage in ("first call", "later call"):
        at = 1 if stage == "first call" else 2
        at = 1 if keras.backend.backend() == "jax" else at  # it calls the model to compile
        layer = model.get_layer("separable")
        monkeypatch.setattr(layer, "call", failing(layer.call, at))
    elif stage == "gradient":
        monkeypatch.setattr(_scaling, "moments", failing(_scaling.moments, 3))
    elif stage == "assign":
        monkeypatch.setattr(backends, "assign", failing(backends.assign, 3))
    else:
        arguments = (np.zeros((4, 4)), failing(lambda y, outputs: outputs, 1))
    before = snapshot(model)
    with pytest.raises(Stop):
        calibrate(model, x, *arguments)
    assert count >= 1
    assert snapshot(model) == before


@pytest.mark.slow
def test_an_interrupt_at_any_line_after_the_passes_leaves_the_kernels(monkeypatch):
    model, x = sick("convnet")
    before, results = snapshot(model), []

    def solve(*arguments):
        if not results:
            results.append(original(*arguments))
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace  # of `calibrate` itself, which runs already
        return results[0]

    def trace(frame, event, _):
        nonlocal left
        if PACKAGE not in Path(frame.f_code.co_filename).parents:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    original, tracer = calibration._measure, sys.gettrace()
    monkeypatch.setattr(calibration, "_measure", solve)
    line = 0
    for line in itertools.count(1):
        left = line
        try:
            calibrate(model, x)
        except KeyboardInterrupt:
            assert snapshot(model) == before
        else:
            break
        finally:
            sys.settrace(tracer)
    assert line > 50
    assert snapshot(model) != before


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda: (len, data(2, 12)), TypeError, "Argument `model` must be a Keras"),
        (lambda: (layers.Dense(2), data(2, 12)), ValueError, "`model` must be built"),
        (lambda: (mlp(), data(3, 12)), ValueError, "several examples"),
        (lambda: (mlp(), np.float64(data(9, 12)) * 1e300), ValueError, "must be finite"),
        (lambda: (mlp(), np.ones((9, 12))), ValueError, "all examples alike"),
        (lambda: (mlp(), data(2, 12) * np.inf), ValueError, "`x` must be finite"),
        (lambda: (mlp(), data(4, 13)), ValueError, r"`x` must .* \(4, 13\)"),
        (lambda: (mlp(), data(9, 12), data(9, 4)), ValueError, "given together"),
        (lambda: (mlp(trainable=False), data(9, 12)), ValueError, "a kernel that may be"),
    ],
)
def test_what_can_not_be_done_is_said(arguments, error, match):
    model, *rest = arguments()
    if match.startswith("a kernel"):
        model.trainable = False
    with pytest.raises(error, match=match):
        calibrate(model, *rest)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"seed": 1.5}, TypeError, "Argument `seed`"),
        ({"layers": ["none"]}, ValueError, "Argument `layers`"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        calibrate(mlp(), data(9, 12), **options)


def test_the_verdict_tells_all_three_before_and_after():
    table = calibrate(*deep("gelu", depth=8))
    number = r"[-+\d.e]+"
    three = f"signal {number}x, gradient {number}x, likeness {number} to {number}"
    assert re.fullmatch(
        f"Scaled to a std of {number}. From the first kernel to the last, and back, on "
        f"examples that the factors do not come from: {three} \\(before: {three}\\). "
        f"Passes over half of the batch: \\d+.",
        table.note,
    )
    assert " to a std of " not in calibrate(*deep("linear", depth=2)).note


class OwnSum(layers.Layer):
    """A block without normalization, with a sum by a layer or a bare one."""

    def __init__(self, add):
        super().__init__()
        self.inner, self.end, self.add = layers.Dense(64, "gelu"), layers.Dense(32), add

    def call(self, x):
        branch = self.end(self.inner(x))
        return x + branch if self.add is None else self.add([x, branch])


def test_bare_sums_count_as_those_of_layers_do():
    tables = []
    for make in (layers.Add, lambda: None):
        blocks = [OwnSum(make()) for i in range(4)]
        model = keras.Sequential([keras.Input((32,)), *blocks, layers.Dense(3)])
        tables.append(calibrate(fill(model), data(64, 32)))
    for row, expected in zip(*tables, strict=True):
        assert row["factor"] == pytest.approx(expected["factor"], rel=1e-4)
    assert tables[0].note == tables[1].note
    assert any(row["factor"] != 1 for row in tables[0])


def test_no_head_gets_larger_than_1_and_one_that_was_made_small_stays_small():
    """As in detectors and variational autoencoders: the last called is not the only one."""
    inputs = x = keras.Input((64,))
    for _ in range(20):
        x = layers.Dense(64, "gelu")(x)
    names = ("plain", "small", "large", "last")
    model = fill(keras.Model(inputs, [layers.Dense(8, name=name)(x) for name in names]))
    model.get_layer("small").kernel.assign(0.01 * data(64, 8))
    model.get_layer("large").kernel.assign(3 * data(64, 8))
    table = calibrate(model, data(64, 64))
    rows = by_path(table)
    assert rows["plain/kernel"]["factor"] == 20  # the level is 1/20
    assert 0.3 < rows["plain/kernel"]["std"] < 1.2
    assert 0.01 < rows["small/kernel"]["std"] < 0.06
    assert rows["large/kernel"]["std"] == pytest.approx(1, rel=0.3)
    assert {rows[f"{name}/kernel"]["role"] for name in names} == {"bounded"}


def test_scores_of_a_softmax_stay_as_large_whatever_their_layer_is_called():
    """Attention pooling over time, deep enough for another level than 1."""
    inputs = x = keras.Input((12, 32))
    for _ in range(12):
        x = layers.Dense(32, "gelu")(x)
    weights = keras.ops.softmax(layers.Dense(1, name="scores")(x), axis=1)
    x = layers.Dense(16, name="pooled")(keras.ops.sum(weights * x, axis=1))
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    row = by_path(calibrate(model, data(32, 12, 32)))["scores/kernel"]
    assert row["role"] == "bounded"
    assert row["std"] < 1.1


def test_small_inputs_are_not_made_up_for():
    """Of an embedding of std 0.03, or of a mean over positions."""
    text = keras.Sequential(
        [keras.Input((9,), dtype="int32"), layers.Embedding(50, 16), layers.LSTM(16)]
    )
    text = keras.Sequential([text, layers.Dense(16, "relu"), layers.Dense(1)])
    pooled = keras.Sequential([keras.Input((200, 16))])
    for layer in (*2 * [layers.Dense], layers.GlobalAveragePooling1D, layers.Dense):
        pooled.add(layer(32, "tanh") if layer is layers.Dense else layer())
    pooled.add(layers.Dense(1))
    batches = np.arange(64 * 9).reshape(64, 9) ** 2 % 50, data(64, 200, 16)
    for model, x in zip((text, pooled), batches, strict=True):
        table = calibrate(fill(model), x)
        assert max(row["factor"] for row in table) < 3


def sine(z):
    return keras.ops.sin(30 * z)


@pytest.mark.parametrize("is_chosen", [True, False])
@pytest.mark.parametrize("where", ["activation", "lambda", "operation"])
def test_kernels_that_their_author_scaled_for_a_sine_stay(is_chosen, where):
    """As in SIREN (Sitzmann et al., 2020)."""
    limit = math.sqrt(6 / 64) / 30
    chosen = keras.initializers.RandomUniform(-limit, limit)
    initializer = chosen if is_chosen else "glorot_uniform"
    inputs = x = keras.Input((64,))
    for _ in range(3):
        activation = {"activation": sine, "lambda": lambda z: sine(z)}.get(where)
        x = layers.Dense(64, activation, kernel_initializer=initializer)(x)
        x = x if activation else keras.ops.sin(30 * x)
    model = keras.Model(inputs, layers.Dense(1, kernel_initializer=initializer)(x))
    before = model.get_weights()
    table = calibrate(model, 30 * data(64, 64))
    left = [each for each in table.findings if each.code == "not-scaled"]
    assert len(left) == 3 * is_chosen
    if is_chosen:
        for old, new in zip(before[:-2], model.get_weights()[:-2], strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("scale", [2e-38, 1e-30, 1e30])
def test_no_size_of_the_inputs_makes_kernels_infinite(scale):
    model = mlp(depth=6, activation="relu")
    before = snapshot(model)
    table = calibrate(model, np.float32(data(64, 12) * scale))
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    if scale < 1:
        assert snapshot(model) == before
        assert "unreached" in codes(table)


@pytest.mark.parametrize("place", ["bias", "kernel", "last bias"])
def test_a_model_that_is_not_finite_is_refused(place):
    model = mlp()
    layer = model.layers[-1 if "last" in place else 1]
    weight = layer.kernel if place == "kernel" else layer.bias
    weight.assign(np.full(weight.shape, np.nan))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"must give finite values .*audit\(model\)"):
        calibrate(model, data(64, 12))
    assert snapshot(model) == before
