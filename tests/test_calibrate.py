"""`calibrate`: signal and gradient hold, by hand-made backpropagation too; only factors."""

import itertools
import json
import math
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from cases import CASES, data, fill, mlp
from keras import layers

import keras_glorot
from keras_glorot import _backends as backends
from keras_glorot import calibrate, propagate
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
def test_forward_times_backward_is_one_by_hand(activation):
    """And s / g is the same at every kernel: the least of the objective."""
    model, x = deep(activation)
    calibrate(model, x)
    s, g = signal_and_gradient(model, x, *FUNCTIONS[activation])
    assert s[-1] / s[0] * g[0] / g[-1] == pytest.approx(1, abs=0.2)
    # Another random gradient at the output than the one that was calibrated with.
    np.testing.assert_allclose(s / g, np.exp(np.mean(np.log(s / g))), rtol=0.3)


def test_forward_mode_gives_every_output_unit_variance():
    model, x = deep("relu")
    calibrate(model, x, mode="forward")
    s, _ = signal_and_gradient(model, x, *FUNCTIONS["relu"])
    np.testing.assert_allclose(s, 1, rtol=1e-3)


def test_backward_mode_levels_the_gradient():
    model, x = deep("relu", depth=8)
    calibrate(model, x, mode="backward")
    _, g = signal_and_gradient(model, x, *FUNCTIONS["relu"])
    assert g.max() / g.min() < 1.15


def test_the_ratio_is_that_of_the_widths():
    """A linear chain from 64 to 16 units and back: Glorot's compromise, exactly.

    s g is 1 / sqrt(width), so s is 1 / width^(1/4), up to a common factor.
    """
    widths = [64, 64, 16, 16, 16, 256, 256]
    model = keras.Sequential([keras.Input((64,))])
    for width in widths:
        model.add(layers.Dense(width, use_bias=False))
    model.add(layers.Dense(10))
    fill(model)
    table = calibrate(model, data(256, 64))
    s = np.array([row["std"] for row in table][:-1]) * np.array(widths) ** 0.25
    np.testing.assert_allclose(s, s.mean(), rtol=0.15)


@pytest.mark.parametrize("case", CASES)
def test_factors_are_the_same_on_every_backend(case, request):
    model, x = CASES[case]()
    before = model.get_weights()
    table = calibrate(model, x, seed=3)
    factors = [row["factor"] for row in table]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--overwrite"):
        GOLDEN.write_text(json.dumps(golden | {case: factors}, indent=0) + "\n")
        return
    assert factors == pytest.approx(golden[case], rel=1e-3)
    paths = [weight.path for weight in model.weights]
    assert len(set(paths)) == len(paths)
    changed = 0
    for old, new in zip(before, model.get_weights(), strict=True):
        ratio = new[old != 0] / old[old != 0]
        if not np.array_equal(old, new):
            changed += 1
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
            assert ratio[0] > 0
    assert changed == sum(factor != 1 for factor in factors)


@pytest.mark.parametrize("case", CASES)
def test_the_table_tells_what_propagate_then_measures(case):
    """Not only in the pass that set the factors: on the model that was assigned to."""
    model, x = CASES[case]()
    for weight in model.weights:
        if weight.name == "bias":
            weight.assign(np.zeros(weight.shape))
    table = calibrate(model, x, seed=3)
    rows = {row["path"]: row for row in propagate(model, x, seed=3)}
    for path, row in by_path(table).items():
        layer = rows.get(path.rpartition("/")[0])
        if layer is None:  # inside a loop
            continue
        linear = layer["saturated"] is None and layer["dead"] is None
        plain = layer["layer"] in ("Dense", "EinsumDense", "SeparableConv2D")
        if linear and plain and path not in ("softmax/kernel", "first/kernel"):
            assert row["std"] == pytest.approx(layer["std"], rel=0.02), path


def test_the_same_batch_gives_the_same_factors():
    one, again, other = (CASES["convnet"]() for _ in range(3))
    tables = [calibrate(*one, seed=1), calibrate(*again, seed=1), calibrate(*other, seed=2)]
    factors = [[row["factor"] for row in table] for table in tables]
    assert factors[0] == factors[1] != factors[2]


def test_a_second_calibration_changes_little():
    model, x = deep("relu", depth=8)
    calibrate(model, x)
    factors = [row["factor"] for row in calibrate(model, x)]
    np.testing.assert_allclose(factors, 1, rtol=0.02)


def test_a_shared_layer_has_one_factor_for_all_its_calls():
    shared = layers.Dense(32, use_bias=False, name="shared")
    inputs = keras.Input((32,))
    x = shared(layers.Rescaling(1.5)(shared(inputs)))
    model = fill(keras.Model(inputs, layers.Dense(4, name="last")(x)))
    table = calibrate(model, data(64, 32), mode="forward")
    rows = [row for row in propagate(model, data(64, 32)) if "shared" in row["path"]]
    assert len(table) == 2
    assert rows[0]["std"] * rows[1]["std"] == pytest.approx(1, rel=0.05)


def test_a_bias_is_kept_out_of_the_scale():
    model, x = deep("tanh", depth=4)
    for layer in model.layers:
        layer.bias.assign(np.full(layer.units, 0.5))
    calibrate(model, x, mode="forward")
    z = x @ np.asarray(model.layers[0].kernel)
    assert z.std() == pytest.approx(1, rel=1e-3)
    assert np.all(np.asarray(model.layers[0].bias) == 0.5)


def test_what_is_not_to_be_scaled_stays_and_is_listed():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 8, name="embedding")(inputs)
    x = layers.LSTM(6, return_sequences=True, name="lstm")(x)
    x = layers.Dense(6, name="frozen", trainable=False)(x)
    x = layers.Dense(6, name="ones", kernel_initializer="ones")(x)
    x = layers.Dense(6, name="free")(x)
    model = fill(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    before = {weight.path: np.asarray(weight) for weight in model.weights}
    table = calibrate(model, np.arange(84).reshape(12, 7) % 11)
    left = {finding.path for finding in table.findings if finding.code == "not-scaled"}
    assert left == {
        "embedding/embeddings",
        "lstm/lstm_cell/recurrent_kernel",
        "frozen/kernel",
        "ones/kernel",
    }
    for weight in model.weights:
        scaled = weight.path in ("lstm/lstm_cell/kernel", "free/kernel", "last/kernel")
        assert scaled != np.array_equal(before[weight.path], np.asarray(weight)), (
            weight.path
        )
    assert by_path(table)["lstm/lstm_cell/kernel"]["std"] == pytest.approx(1, rel=1e-5)


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
    table = calibrate(model, x, mode="forward")
    assert [row["path"] for row in table] == ["one/kernel", "last/kernel"]
    w = np.asarray(one.kernel)
    assert (x @ w).std() == pytest.approx(1, rel=1e-3)
    assert (x @ w @ w.T @ np.asarray(model.layers[-1].kernel)).std() == pytest.approx(1)


def test_queries_and_keys_give_logits_of_unit_variance():
    inputs = keras.Input((20, 32))
    attention = layers.MultiHeadAttention(4, 8, name="attention")
    model = fill(keras.Model(inputs, layers.Dense(3)(attention(inputs, inputs))))
    x = 5 * data(16, 20, 32)
    table = by_path(calibrate(model, x))
    for name in ("query", "key"):
        assert table[f"attention/{name}/kernel"]["std"] == pytest.approx(1, rel=1e-3)
        assert table[f"attention/{name}/kernel"]["target"] == "unit"
    q, k = (
        np.einsum("btd,dhe->bthe", x, np.asarray(layer.kernel))
        for layer in (attention._query_dense, attention._key_dense)
    )
    logits = np.einsum("bthe,bshe->bhts", q, k) / math.sqrt(8)
    assert logits.std() == pytest.approx(1, rel=0.1)


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
    """Their kernels get a level signal; the rest is as if they were not there."""
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
    table = calibrate(model, data(64, 32))
    rows = by_path(table)
    for i in range(4):
        assert rows[f"branch{i}/kernel"]["target"] == "off path"
        assert rows[f"branch{i}/kernel"]["std"] == pytest.approx(1, rel=0.02)
    assert "off-path" in codes(table)
    forward = rows["stem/kernel"]["std"]
    assert forward == pytest.approx(1, rel=0.1)


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


@pytest.mark.parametrize(
    ("add", "normalize"),
    [
        (add, layers.LayerNormalization),
        (add, None),
        (lambda x, branch: x + branch, None),
    ],
)
@pytest.mark.parametrize("blocks", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_residual_streams_are_bounded(add, normalize, blocks):
    """Few blocks together by 1.15; many by a quarter for each; the last holds the ends."""
    model, x = residual(blocks, add, normalize), data(16, 6, 32)
    table = calibrate(model, x, mode="forward")
    rows = by_path(propagate(model, x))
    stds = {path: row["std"] for path, row in by_path(table).items()}
    *ends, last = [std for path, std in stds.items() if path.startswith("end")]
    assert 0.8 < last < 0.9
    stream = math.sqrt(rows["norm"]["input_std"] ** 2 - last**2)
    expected = (1.15 if blocks == 4 else 1.36) / math.sqrt(1 + ends[0] ** 2)
    assert stream == pytest.approx(expected, rel=0.1)
    others = [std for path, std in stds.items() if not path.startswith("end")]
    np.testing.assert_allclose(others, 1, rtol=0.01)
    np.testing.assert_allclose(ends, ends[0], rtol=0.01)
    assert 0.25 <= ends[0] < 0.4


def test_the_ends_of_residual_networks_hold():
    """The first kernel stands inside a branch, the last ends one, small on purpose."""
    model, x = residual(6, add, layers.LayerNormalization), data(16, 6, 32)
    table = calibrate(model, x)
    forward, backward, _ = calibration.measure_ends(model, x)
    assert 0.5 < forward * backward < 2
    assert "unreached" not in codes(table)


def test_no_output_is_further_off_than_the_ends_need():
    """Seven gates let the gradient grow so much that both bounds can just be met."""
    inputs = x = keras.Input((32,))
    for _ in range(7):
        x = layers.Multiply()([layers.Dense(32, "silu")(x), layers.Dense(32)(x)])
    model, x = fill(keras.Model(inputs, layers.Dense(3)(x))), data(64, 32)
    stds = np.array([row["std"] for row in calibrate(model, x)][:-1])
    forward, backward, _ = calibration.measure_ends(model, x)
    assert 0.5 < forward * backward < 2
    assert forward / backward < 0.01
    assert np.abs(np.log(stds / np.median(stds))).max() < math.log(4)


class Patches(layers.Layer):
    """As where SegFormer cuts them."""

    def __init__(self):
        super().__init__()
        self.cut, self.norm = layers.Conv2D(32, 2, strides=2), layers.LayerNormalization()

    def call(self, x):
        return self.norm(keras.ops.reshape(self.cut(x), (-1, 16, 32)))


@pytest.mark.parametrize(
    "stem",
    [
        lambda: [Patches()],
        lambda: [layers.Conv2D(32, 2, strides=2), layers.ReLU(), layers.Reshape((16, 32))],
        lambda: [layers.Conv2D(32, 1), layers.MaxPooling2D(), layers.Reshape((16, 32))],
    ],
)
def test_what_follows_a_kernel_is_no_sum(stem):
    """Only blocks add, whatever stands between the first kernel and their normalization."""
    x = data(16, 8, 8, 3)
    blocks = [Residual() for _ in range(4)]
    final = [layers.LayerNormalization(), layers.Dense(3)]
    model = fill(keras.Sequential([keras.Input(x.shape[1:]), *stem(), *blocks, *final]))
    first, *others = [row["std"] for row in calibrate(model, x, mode="forward")]
    assert first == pytest.approx(1, rel=0.01)
    assert others[1] < 0.4  # the end of a block


@pytest.mark.slow
def test_residual_streams_are_bounded_where_an_activation_follows_the_sum():
    model, x = residual(48, add, activate=layers.ReLU), data(16, 6, 32)
    calibrate(model, x)
    sums = [row["std"] for row in propagate(model, x) if row["layer"] == "Add"]
    assert max(sums[:-1]) < 2 * max(1, sums[0])  # to the last, more is added


@pytest.mark.slow
def test_residual_streams_of_subclassed_blocks_are_bounded():
    blocks = [Residual() for _ in range(24)]
    final = layers.LayerNormalization(name="norm")
    model = keras.Sequential([keras.Input((6, 32)), *blocks, final, layers.Dense(3)])
    fill(model)
    calibrate(model, data(16, 6, 32), mode="forward")
    norm = by_path(propagate(model, data(16, 6, 32)))["norm"]
    assert norm["input_std"] == pytest.approx(1.8, rel=0.06)


def test_branches_that_end_in_a_normalization_are_not_made_smaller():
    inputs = x = keras.Input((32,))
    for _ in range(12):
        branch = layers.Dense(32, use_bias=False)(layers.ReLU()(x))
        x = layers.Add()([x, layers.BatchNormalization()(branch)])
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    table = calibrate(model, data(64, 32), mode="forward")
    np.testing.assert_allclose([row["std"] for row in table], 1, rtol=0.01)


def test_concatenated_branches_are_no_sum():
    """As in DenseNet: what normalization sees grows, but nothing is made smaller."""
    inputs = x = keras.Input((32,))
    for _ in range(8):
        branch = layers.ReLU()(layers.BatchNormalization()(x))
        branch = layers.Rescaling(3.0)(layers.Dense(8, use_bias=False)(branch))
        x = layers.Concatenate()([x, branch])
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    table = calibrate(model, data(64, 32), mode="forward")
    np.testing.assert_allclose([row["std"] for row in table], 1, rtol=0.01)
    table = calibrate(model, data(64, 32))
    assert "unreached" not in codes(table)


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
    table = calibrate(model, data(16, 6, 32))
    rows = by_path(table)
    same = np.array_equal(before, np.asarray(model.get_layer("stem").kernel))
    assert same == with_positions
    assert rows["next/kernel"]["std"] == pytest.approx(1, rel=0.2)
    left = {finding.path for finding in table.findings if finding.code == "not-scaled"}
    assert left == ({"stem", "positions/table"} if with_positions else set())


@pytest.mark.parametrize(
    ("activation", "low", "high"), [("gelu", 4, 8), ("tanh", 0.25, 0.5), ("relu", 1, 1)]
)
def test_the_level_is_where_the_gradient_changes_least(activation, low, high):
    """Deep GELU nets are nearer to linear far from zero, tanh near zero."""
    model, x = deep(activation, depth=40)
    table = calibrate(model, x, mode="forward")
    s = [row["std"] for row in table]
    assert low * 0.99 <= s[0] <= high * 1.01
    np.testing.assert_allclose(s[:-1], s[0], rtol=0.01)
    assert s[-1] == pytest.approx(1, rel=0.01)


def test_a_shallow_net_keeps_level_1():
    table = calibrate(*deep("tanh", depth=3), mode="forward")
    np.testing.assert_allclose([row["std"] for row in table], 1, rtol=0.01)


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


def test_a_part_of_the_model_alone():
    model, x = deep("relu", depth=4)
    before = model.get_weights()
    part = model.layers[1:3]
    table = calibrate(model, x, layers=[part[0], part[1].name])
    assert [row["path"] for row in table] == [f"{layer.name}/kernel" for layer in part]
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)
    ]
    assert changed == [False, False, True, False, True, False] + 4 * [False]


def test_half_precision():
    model, single = mlp(dtype="mixed_bfloat16"), mlp()
    tables = [calibrate(each, data(64, 12)) for each in (model, single)]
    for row, expected in zip(*tables, strict=True):
        assert row["factor"] == pytest.approx(expected["factor"], rel=0.03)
    half = mlp(dtype="bfloat16")
    calibrate(half, data(64, 12))
    assert half.layers[0].kernel.dtype == "bfloat16"


@pytest.mark.slow
def test_what_no_scale_can_mend_is_said():
    """A gate doubles a relative error: the gradient doubles where the signal is level."""
    inputs = x = keras.Input((32,))
    for _ in range(15):
        x = layers.Multiply()([layers.Dense(32, "silu")(x), layers.Dense(32)(x)])
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    assert "unstable-activation" in codes(calibrate(model, data(64, 32)))
    assert not codes(calibrate(*deep("relu")))


class Stop(BaseException):
    """As an interrupt: no `Exception`."""


@pytest.mark.parametrize(
    "stage", ["first call", "later call", "gradient", "assign", "loss"]
)
def test_an_error_at_any_stage_leaves_the_model_bit_identical(stage, monkeypatch):
    model, x = CASES["convnet"]()
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
    model, x = CASES["convnet"]()
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

    original, tracer = calibration._solve, sys.gettrace()
    monkeypatch.setattr(calibration, "_solve", solve)
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
        (lambda: (mlp(), data(1, 12)), ValueError, "several examples"),
        (lambda: (mlp(), np.ones((9, 12))), ValueError, "all examples alike"),
        (lambda: (mlp(), data(2, 12) * np.inf), ValueError, "`x` must be finite"),
        (lambda: (mlp(), data(2, 13)), ValueError, r"`x` must .* \(2, 13\)"),
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
        ({"mode": "both"}, ValueError, "Argument `mode` must be 'balanced'"),
        ({"mode": None}, ValueError, "Argument `mode`"),
        ({"seed": 1.5}, TypeError, "Argument `seed`"),
        ({"layers": ["none"]}, ValueError, "Argument `layers`"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        calibrate(mlp(), data(9, 12), **options)


def test_the_verdict_has_what_the_mode_holds():
    model = keras.Sequential([keras.Input((16,))])
    for _ in range(4):
        model.add(keras.layers.Dense(16, "tanh"))
    x = np.random.default_rng(0).normal(size=(64, 16))
    held = {"forward": "The signal's change", "balanced": "Forward times backward"}
    for mode, name in held.items():
        note = calibrate(model, x, mode=mode).note
        assert note.startswith("From the first kernel to the last the signal changes ")
        value = float(note.split(f"{name}: ")[1].split(",")[0])
        assert value == pytest.approx(1, abs=0.25)
        assert "Residual sums" not in note


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
        blocks = [OwnSum(make()) for i in range(8)]
        model = keras.Sequential([keras.Input((32,)), *blocks, layers.Dense(3)])
        tables.append(calibrate(fill(model), data(64, 32)))
    for row, expected in zip(*tables, strict=True):
        assert row["factor"] == pytest.approx(expected["factor"], rel=1e-4)
    assert tables[0].note == tables[1].note
    assert "Residual sums have a std of " in tables[0].note


def test_every_head_is_level_and_one_that_was_made_small_stays_small():
    """As in detectors and variational autoencoders: the last called is not the only one."""
    inputs = x = keras.Input((32,))
    for _ in range(6):
        x = layers.Dense(32, "gelu")(x)
    small = keras.initializers.RandomNormal(stddev=0.01)
    heads = [
        layers.Dense(8, name="plain"),
        layers.Dense(8, name="small", kernel_initializer=small),
    ]
    outputs = [head(x) for head in heads] + [layers.Dense(3, name="last")(x)]
    model = fill(keras.Model(inputs, outputs))
    model.get_layer("small").kernel.assign(0.01 * data(32, 8))
    rows = by_path(calibrate(model, data(64, 32)))
    assert rows["plain/kernel"]["std"] == pytest.approx(1, rel=0.02)
    assert rows["last/kernel"]["std"] == pytest.approx(1, rel=0.02)
    gain = math.sqrt(32) * 0.01 * data(32, 8).std()
    assert rows["small/kernel"]["std"] == pytest.approx(gain, rel=0.05)
    assert rows["small/kernel"]["target"] == "small"


def test_scores_of_a_softmax_are_level_whatever_their_layer_is_called():
    """Attention pooling over time, deep enough for another level than 1."""
    inputs = x = keras.Input((12, 32))
    for _ in range(12):
        x = layers.Dense(32, "gelu")(x)
    weights = keras.ops.softmax(layers.Dense(1, name="scores")(x), axis=1)
    x = layers.Dense(16, name="pooled")(keras.ops.sum(weights * x, axis=1))
    model = fill(keras.Model(inputs, layers.Dense(3)(x)))
    row = by_path(calibrate(model, data(32, 12, 32)))["scores/kernel"]
    assert row["std"] == pytest.approx(1, rel=0.02)
    assert row["target"] == "unit"


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
