"""`initialize` resets what it says it does, the same everywhere, or nothing at all."""

import hashlib
import io
import math
import random
import sys
from typing import Any

import keras
import numpy as np
import pytest
from models import WITH_STATE, convnet, nested_attention, recurrent

import keras_glorot
from keras_glorot import GlorotNormal, GlorotUniform, audit, calculate_gain, initialize
from keras_glorot._keras.tree import Tree

layers: Any = keras.layers  # Keras declares many arguments as `str`
BACKEND = keras.backend.backend()


def array(variable):
    return np.array(keras.ops.convert_to_numpy(variable))


def values(model):
    return [array(variable) for variable in model.variables]


def disturb(model, value=7):
    for variable in model.variables:
        variable.assign(keras.ops.full(variable.shape, value, variable.dtype))


def row(table, ending):
    (found,) = [row for row in table if row["path"].endswith(ending)]
    return found


def std(variable):
    return float(np.std(array(variable).astype(np.float64)))


@pytest.mark.parametrize("make", WITH_STATE)
def test_rebuilt_models_get_the_same_weights_and_no_two_are_alike(make):
    one, other = make(), make()
    assert [v.path for v in one.variables] != [v.path for v in other.variables]
    disturb(other)
    initialize(one, seed=3)
    table = initialize(other, seed=3)
    assert not table.findings
    for mine, its in zip(values(one), values(other), strict=True):
        np.testing.assert_array_equal(mine, its)
    drawn = [v.ravel()[:4].tolist() for v in values(one) if v.ndim > 1 and v.any()]
    assert len({tuple(v) for v in drawn}) == len(drawn)
    initialize(one, seed=4)
    assert not np.array_equal(values(one)[0], values(other)[0])


def test_golden_kernels():
    """The same bits on every backend and in every release."""
    digests = []
    for make in WITH_STATE:
        model = make()
        initialize(model, "xavier_normal", seed=1)
        kernels = [
            array(variable).tobytes()
            for variable in model.trainable_variables
            if variable.name.endswith("kernel") and "recurrent" not in variable.name
        ]
        digests.append(hashlib.sha256(b"".join(kernels)).hexdigest()[:8])
    assert digests == GOLDEN_KERNELS


def test_golden_values_of_keras_initializers():
    """Drawn by NumPy: the same on every backend, if not in every version of NumPy."""
    model = recurrent()
    initialize(model, seed=1)
    cell = model.layers[1].forward_layer.cell
    drawn = [array(v)[0, 0] for v in (model.layers[0].embeddings, cell.recurrent_kernel)]
    layer = layers.Dense(100, bias_initializer=keras.initializers.RandomNormal(1.0, 0.5))
    layer.build((None, 2))
    initialize(layer, seed=1)
    np.testing.assert_allclose([*drawn, array(layer.bias)[0]], GOLDEN_OTHERS, rtol=1e-5)
    assert abs(array(layer.bias).mean() - 1) < 0.2
    assert abs(std(layer.bias) - 0.5) < 0.2


def test_everything_else_goes_back_to_its_own_initializer():
    model = convnet()
    disturb(model)
    initialize(model, seed=0)
    for layer in model.layers:
        for variable in layer.weights:
            if len(variable.shape) == 1:
                one = variable.name in ("gamma", "moving_variance")
                np.testing.assert_array_equal(variable, np.full(variable.shape, float(one)))
    np.testing.assert_array_equal(array(model.layers[3].alpha), np.zeros((4, 4, 16)))
    model = recurrent()
    disturb(model)
    initialize(model, seed=0)
    embedding, cell = model.layers[0], model.layers[1].forward_layer.cell
    assert abs(np.abs(embedding.embeddings).max() - 0.05) < 0.005
    kernel = np.asarray(cell.recurrent_kernel)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(8), atol=1e-5)
    np.testing.assert_array_equal(cell.bias, [0] * 8 + [1] * 8 + [0] * 16)
    bound = math.sqrt(6 / (8 + 32))
    assert 0.9 * bound < np.abs(cell.kernel).max() <= bound


def test_right_fans_and_gains():
    model = convnet()
    table = initialize(model, GlorotUniform(gain="auto"), seed=0)
    assert row(table, "separable/depthwise_kernel")["fan_in"] == 9
    assert row(table, "separable/pointwise_kernel")["done"] == "GlorotUniform(gain=1.414)"
    gains = [r["done"] for r in table if r["path"].endswith("/kernel")]
    tanh = "GlorotUniform(gain=1.667)"
    assert gains == ["GlorotUniform", tanh, tanh, "GlorotUniform"]
    dense = model.layers[6]
    right = 5 / 3 * math.sqrt(2 / (4 * 4 * 16 + 16))
    assert abs(std(dense.kernel) / right - 1) < 0.05
    assert row(table, "last/kernel")["std"] == math.sqrt(2 / (16 + 4))


@pytest.mark.parametrize("slopes", ["zeros", keras.initializers.Constant(0.25)])
def test_the_slopes_with_which_prelu_starts(slopes):
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64), layers.PReLU(slopes)])
    assert [found.code for found in audit(model).findings] == ["relu-gain"]
    table = initialize(model, GlorotNormal(gain="auto"), seed=0)
    gain = calculate_gain("leaky_relu", getattr(slopes, "value", 0.0))
    assert table.rows[0]["std"] == pytest.approx(gain / 8, rel=1e-6)
    assert not audit(model).findings


def test_an_activation_layer_behind_counts_for_auto():
    x = keras.Input((64,))
    one, branch = layers.Dense(64, name="one"), layers.Dense(64, name="branch")
    y = layers.LeakyReLU(negative_slope=0.5)(one(x))
    z = branch(y)
    out = layers.Add()([layers.ReLU()(z), layers.Activation("tanh")(z)])
    model = keras.Model(x, layers.Dense(64, name="last")(out))
    # A second model through the same layer is none of this model's business.
    keras.Model(x, layers.Activation("tanh")(one(x)))
    table = initialize(model, GlorotNormal(gain="auto"), seed=0)
    gain = calculate_gain("leaky_relu", 0.5)
    assert row(table, "one/kernel")["std"] == pytest.approx(gain / 8, rel=1e-6)
    assert row(table, "branch/kernel")["std"] == 1 / 8  # two activations: neither
    assert row(table, "last/kernel")["std"] == 1 / 8


@pytest.mark.parametrize(
    ("initializer", "variance"),
    [
        ("he_normal", 2 / 9),
        (GlorotNormal("relu", mode="fan_in"), 2 / 9),
        ("lecun_uniform", 1 / 9),
        (GlorotUniform(mode="fan_in"), 1 / 9),
        (GlorotUniform(mode="fan_out"), 1 / 18),
        ("xavier_normal", 2 / 27),
    ],
)
def test_any_initializer_gets_the_right_fans(initializer, variance):
    layer = layers.DepthwiseConv2D(3, depth_multiplier=2)
    layer.build((None, 8, 8, 512))
    initialize(layer, initializer, seed=0)
    assert abs(std(layer.kernel) / math.sqrt(variance) - 1) < 0.03


def test_another_layer_changes_no_named_layer():
    """Named layers keep their weights, and automatic ones of other classes."""
    one, other = convnet(), convnet(extra=True)
    initialize(one, seed=5)
    initialize(other, seed=5)
    for name in ("first", "separable", "last"):
        for mine, its in zip(
            one.get_layer(name).weights, other.get_layer(name).weights, strict=True
        ):
            np.testing.assert_array_equal(mine, its)
    assert not np.array_equal(one.layers[6].kernel[:16], other.layers[2].kernel)


def test_a_layer_added_behind_changes_nothing_before_it():
    def build(depth):
        return keras.Sequential(
            [keras.Input((4,)), *(layers.Dense(4) for _ in range(depth))]
        )

    short, long = build(2), build(3)
    initialize(short, seed=5)
    initialize(long, seed=5)
    for mine, its in zip(short.weights, long.weights[:4], strict=True):
        np.testing.assert_array_equal(mine, its)


def test_frozen_and_shared_layers():
    shared = layers.Dense(8)
    x = keras.Input((8,))
    model = keras.Model(x, shared(shared(x)))
    shared.trainable = False
    disturb(model)
    table = initialize(model, seed=0)
    assert [r["path"].split("/")[-1] for r in table] == ["kernel", "bias"]
    assert std(shared.kernel) > 0
    assert not shared.trainable


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtype_stays(dtype):
    if dtype == "float64" and BACKEND == "jax":
        pytest.skip("JAX has float64 only where that is switched on")
    layer = layers.Dense(32, dtype=dtype)
    layer.build((None, 32))
    initialize(layer, seed=0)
    assert layer.kernel.dtype == dtype
    full = layers.Dense(32, dtype="float64" if dtype == "float64" else "float32")
    full.build((None, 32))
    initialize(full, seed=0)
    rounded = keras.ops.cast(full.kernel, dtype)
    np.testing.assert_array_equal(
        *(
            keras.ops.convert_to_numpy(keras.ops.cast(k, "float32"))
            for k in (layer.kernel, rounded)
        )
    )


def test_seed_none_follows_set_random_seed():
    model = convnet()
    drawn = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        initialize(model)
        drawn.append(values(model)[0])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    initialize(model, GlorotUniform(seed=9))
    of_initializer = values(model)[0]
    initialize(model, seed=9)
    np.testing.assert_array_equal(of_initializer, values(model)[0])


class Noisy(keras.optimizers.SGD):
    """Makes up a seed, a name and numbers of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator()
        self.noise = np.random.random()  # noqa: NPY002 - the global one


def global_draws():
    """The next number of each global generator, and the next name."""
    return [
        random.random(),
        np.random.random(),  # noqa: NPY002
        float(array(keras.random.uniform(()))),
        layers.Dense(1).name,
    ]


@pytest.mark.parametrize(
    "how",
    [
        "xavier_uniform",
        "he_normal",
        "orthogonal",
        GlorotUniform("auto"),
        {"last": "xavier_uniform", "bias": "random_normal"},
    ],
    ids=str,
)
def test_with_a_seed_nothing_global_moves(how):
    model = convnet()
    model.compile(Noisy(momentum=0.9), "mse", run_eagerly=True)
    model.fit(np.ones((2, 8, 8, 3)), np.ones((2, 4)), verbose=0)
    drawn = []
    for tool in (
        lambda: None,
        lambda: initialize(model, how, seed=1),
        lambda: audit(model, how),
    ):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        tool()
        drawn.append(global_draws())
    assert drawn[0] == drawn[1] == drawn[2]


def test_without_a_seed_one_is_drawn_whatever_the_model():
    """So the next model gets the same weights after a large one as after a small one."""
    small = layers.Dense(2)
    small.build((None, 2))
    drawn = []
    for model in (convnet(), small):
        random.seed(1)
        initialize(model, GlorotUniform("auto", seed=None))
        drawn.append(random.random())
    assert drawn[0] == drawn[1]


def history(model, k):
    """One fold: a fresh start, then two epochs on the data without every k-th row.

    Keras's own shuffling depends on what else has drawn from the global generators.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 8, 8, 3)), rng.normal(size=(30, 4))
    initialize(model, seed=k)
    keep = rng.permutation(np.flatnonzero(np.arange(30) % 3 != k))
    options = {"batch_size": 5, "epochs": 2, "shuffle": False, "verbose": 0}
    return model.fit(x[keep], y[keep], **options).history


def test_k_folds_are_reproducible():
    """Nothing of a fold is left for the next: not in optimizer, statistics or dropout."""
    model = convnet()
    model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse", metrics=["mae"])
    first = [history(model, k) for k in range(3)]
    again = [history(model, k) for k in reversed(range(3))][::-1]
    assert first == again
    assert first[0] != first[1]
    rebuilt = convnet()
    rebuilt.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse", metrics=["mae"])
    assert history(rebuilt, 1) == first[1]


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.optimizers.Adagrad(0.1, initial_accumulator_value=0.3),
        keras.optimizers.Ftrl(0.1),
        keras.optimizers.Adam(
            keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5),
            gradient_accumulation_steps=2,
        ),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(0.1)),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_optimizer_is_as_new_but_for_a_learning_rate_that_is_not_known(optimizer):
    config = optimizer.get_config()
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.compile(optimizer, "mse", run_eagerly=True)
    fresh = type(optimizer).from_config(config)
    fresh.build(model.trainable_variables)
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    for variable in optimizer.variables:
        if variable.name == "learning_rate":
            variable.assign(0.05)
    findings = initialize(model).findings
    is_constant = "learning_rate" in {each.name for each in optimizer.variables}
    assert [(each.code, each.severity) for each in findings] == (
        [("optimizer", "info")] if is_constant else []
    )
    for mine, its in zip(optimizer.variables, fresh.variables, strict=True):
        expected = 0.05 if mine.name == "learning_rate" else its
        np.testing.assert_allclose(mine, np.asarray(expected))


def trained_by_a_callback(optimizer, before=lambda model: None):
    """A model whose learning rate a callback has lowered to 1e-5."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.compile(optimizer, "mse", run_eagerly=True)
    before(model)
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e-5)
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[lower])
    assert float(array(model.optimizer.learning_rate)) == pytest.approx(1e-5)
    return model


def test_a_learning_rate_goes_back_to_the_one_before_the_first_step():
    def set_and_initialize(model):
        model.optimizer.learning_rate = 0.02
        assert not initialize(model).findings

    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    for optimizer in "adam", scaled:
        model = trained_by_a_callback(optimizer, set_and_initialize)
        assert not initialize(model).findings
        assert float(array(model.optimizer.learning_rate)) == pytest.approx(0.02)


def test_a_learning_rate_that_is_not_known_is_warned_about():
    model = trained_by_a_callback(keras.optimizers.Adam(0.01))
    with pytest.warns(UserWarning, match="did not reset adam.*learning rate stays 1e-05"):
        (finding,) = initialize(model).findings
    assert (finding.code, finding.path) == ("optimizer", model.optimizer.name)


def test_metrics_are_reset():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.compile("sgd", "mse", run_eagerly=True, metrics=["mae"])
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    assert any(array(variable).any() for variable in model.metrics_variables)
    initialize(model)
    assert not any(array(variable).any() for variable in model.metrics_variables)


def test_orthogonal_kernels_are_uniform_over_rotations():
    """LAPACK's QR alone makes the first entry negative every time."""
    layer = layers.Dense(3, bias_initializer="zeros", kernel_initializer="zeros")
    layer.build((None, 3))
    signs = set()
    for seed in range(20):  # all of one sign: two in a million
        initialize(layer, "orthogonal", seed=seed)
        signs.add(np.sign(array(layer.kernel)[0, 0]))
    assert signs == {-1, 1}


class Custom(layers.Layer):
    """Names no initializer: it can only be asked by building another."""

    def __init__(self, scale=0.5, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 8))
        self.v = self.add_weight(
            shape=(8,), initializer=keras.initializers.Constant(self.scale)
        )
        self.e = self.add_weight(shape=(8, 8), initializer="orthogonal", name="e")

    def call(self, x):
        return (x @ self.w) * self.v

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


def test_layers_that_name_no_initializer():
    model = keras.Sequential([keras.Input((8,)), Custom(), Custom(0.25)])
    disturb(model)
    counted = layers.Dense(1).name
    table = initialize(model, seed=0)
    assert [r["done"] for r in table] == ["GlorotUniform", "Constant", "Orthogonal"] * 2
    np.testing.assert_array_equal(model.layers[1].v, np.full(8, 0.25))
    assert not np.array_equal(model.layers[0].w, model.layers[1].w)
    after = layers.Dense(1).name  # looking did not count a name
    numbers = [int(name.removeprefix("dense").strip("_") or 0) for name in (counted, after)]
    assert numbers[1] == numbers[0] + 1


class Recurrent(layers.Layer):
    def build(self, shape):
        self.r = self.add_weight(shape=(8, 8), name="recurrent_kernel")
        self.p = self.add_weight(shape=(8, 8), name="position_embeddings")
        self.k = self.add_weight(shape=(8, 8), name="kernel")

    def call(self, x):
        return x


def test_embeddings_and_recurrent_kernels_are_no_kernels():
    layer = Recurrent()
    layer(np.zeros((1, 8), "float32"))
    table = initialize(layer, "he_normal", seed=0)
    done = {r["path"].split("/")[-1]: r["done"] for r in table}
    own = dict.fromkeys(("recurrent_kernel", "position_embeddings"), "GlorotUniform")
    assert done == own | {"kernel": "HeNormal"}


class Stubborn(layers.Layer):
    """Can't be made again: its config is not enough."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.w = self.add_weight(shape=(size, size), initializer="ones", name="w")

    def call(self, x):
        return x

    def get_config(self):
        raise NotImplementedError("no config")


def test_what_can_not_be_reset_is_left_and_listed():
    normalization = layers.Normalization()
    normalization.adapt(np.arange(32.0).reshape(8, 4))
    model = keras.Sequential(
        [keras.Input((4,)), normalization, Stubborn(4), layers.Dense(2)]
    )
    model.layers[1].w.assign(np.full((4, 4), 3.0))
    with pytest.warns(UserWarning, match="did not reset stubborn/w"):
        table = initialize(model, seed=0)
    left = {finding.path.split("/")[-1]: finding for finding in table.findings}
    assert left.keys() == {"mean", "variance", "count", "w"}
    assert "adapt" in left["mean"].message
    assert "from its config (NotImplementedError)" in left["w"].message
    np.testing.assert_array_equal(model.layers[1].w, np.full((4, 4), 3.0))
    np.testing.assert_allclose(
        np.asarray(normalization.variables[0]).ravel(), [14, 15, 16, 17]
    )
    assert "4 of 6 variables" in table.note or "2 of 6 variables" in table.note


def test_quantized_layers_are_left():
    layer = layers.Dense(8)
    layer.build((None, 8))
    layer.quantize("int8")
    with pytest.warns(UserWarning, match="its layer is quantized"):
        table = initialize(layer, seed=0)
    assert all("quantized" in finding.message for finding in table.findings)
    assert len(table.findings) == len(layer.weights)


class Failing(keras.initializers.Initializer):
    """Works once, when the layer is built."""

    def __init__(self, how):
        self.how, self.calls = how, 0

    def __call__(self, shape, dtype=None):
        self.calls += 1
        if self.calls > 1 and self.how == "raises":
            raise RuntimeError("out of luck")
        return keras.ops.ones((*shape, 1) if self.calls > 1 else shape, dtype)


@pytest.mark.parametrize(
    ("how", "error"), [("raises", RuntimeError), ("wrong shape", ValueError)]
)
def test_a_failure_leaves_the_model_as_it_was(how, error):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.Dense(8, bias_initializer=Failing(how)),
        ]
    )
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.ones((4, 8)), np.ones((4, 8)), verbose=0)
    before = values(model), values(model.optimizer)
    with pytest.raises(error):
        initialize(model, seed=0)
    for old, new in zip(before, (values(model), values(model.optimizer)), strict=True):
        for mine, its in zip(old, new, strict=True):
            np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("layout", ["float16", "axes"])
def test_an_initializer_that_does_not_fit_leaves_the_model_as_it_was(layout):
    dtype = "float16" if layout == "float16" else "float32"
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, dtype=dtype)])
    before = values(model)
    wrong = {"float16": GlorotUniform(gain=1e6), "axes": GlorotUniform(1, 0, [0, 5], [1])}
    with pytest.raises(ValueError, match=r"Argument `(how|input_axes)` must"):
        initialize(model, wrong[layout])
    for mine, its in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_foreign_initializers_are_seeded_by_path():
    class Noise(keras.initializers.Initializer):
        def __init__(self, seed=None):
            self.seed = seed

        def __call__(self, shape, dtype=None):
            return keras.random.normal(shape, dtype=dtype, seed=self.seed)

        def get_config(self):
            return {"seed": self.seed}

    def build():
        dense = [layers.Dense(8, bias_initializer=Noise(1)) for _ in range(2)]
        return keras.Sequential([keras.Input((8,)), *dense])

    one, other = build(), build()
    initialize(one, seed=0)
    initialize(other, seed=0)
    np.testing.assert_array_equal(one.layers[0].bias, other.layers[0].bias)
    assert not np.array_equal(one.layers[0].bias, one.layers[1].bias)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="Argument `model` must be built"):
        initialize(layers.Dense(3))
    with pytest.raises(TypeError, match="Argument `model` must be a Keras layer or model"):
        initialize("model")
    layer = layers.Dense(3)
    layer.build((None, 3))
    for seed in (1.5, True, "1"):
        with pytest.raises(TypeError, match="Argument `seed` must be an integer"):
            initialize(layer, seed=seed)
    with pytest.raises(TypeError, match="Argument `how` must be an initializer"):
        initialize(layer, None)


def test_progress_on_a_terminal_only(monkeypatch, capsys):
    layer = layers.Dense(3)
    layer.build((None, 3))
    initialize(layer, seed=0)
    assert capsys.readouterr().out == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    initialize(layer, seed=0)
    assert terminal.getvalue() == ""  # it did not take a second
    initialize(layer, seed=0, verbose=True)
    assert "\x1b[?25h" in terminal.getvalue()  # rich drew, and showed the cursor again


@pytest.mark.skipif(BACKEND != "jax", reason="JAX compiles per shape")
def test_no_compilation(caplog):
    import jax

    model = convnet()  # an LSTM's bias would be made by JAX
    with jax.log_compiles(), caplog.at_level("WARNING"):
        initialize(model, seed=0)
    assert "Compiling" not in caplog.text


@pytest.mark.skipif(BACKEND != "jax", reason="Keras shards on JAX only")
def test_placement_stays():
    import jax

    layer = layers.Dense(8)
    layer.build((None, 8))
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    layer.kernel._value = jax.device_put(layer.kernel.value, sharding)
    committed = layer.bias.value.committed
    initialize(layer, seed=0)
    assert layer.kernel.value.sharding == sharding
    assert layer.bias.value.committed == committed


def test_every_layer_of_keras_applications_blocks_is_walked():
    model = nested_attention()
    assert len(Tree(model).layers) > len(model.layers)
    assert keras_glorot.initialize is initialize


GOLDEN_KERNELS = ["f27d3ec6", "d81b3032", "783ae311", "9f6a0641"]
GOLDEN_OTHERS = [0.031400751, 0.098182186, 0.97843027]


def test_auto_gain_with_a_seed_generator():
    # The seed is an object in the config then, and has to come through it.
    initializer = keras_glorot.GlorotUniform("auto", seed=keras.random.SeedGenerator(1))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh")])
    table = keras_glorot.initialize(model, initializer)
    assert table.rows[0]["done"] == "GlorotUniform(gain=1.667)"
