"""The argument `how`: which weight gets what, and nothing else changes."""

import math
import re
from typing import Any

import keras
import numpy as np
import pytest
from models import BY_KIND, WITH_STATE, convnet

from keras_glorot import GlorotNormal, GlorotUniform, audit, initialize
from keras_glorot._models.survey import Survey
from keras_glorot.recipes import Start, Starts

layers: Any = keras.layers  # Keras declares many arguments as `str`
initializers: Any = keras.initializers
ALL = ".*"


def values(model):
    """Every variable by the path that the table shows."""
    survey = Survey(model)
    owned = {weight.path: weight.variable for weight in survey.weights}
    states = [(layer, each.state) for layer, each in survey.seed_generators]
    owned |= {survey.path(layer, state): state for layer, state in states}
    return {path: array(variable) for path, variable in owned.items()}


def array(variable):
    return np.array(keras.ops.convert_to_numpy(variable))


def disturb(model, value=7):
    for variable in model.variables:
        variable.assign(keras.ops.full(variable.shape, value, variable.dtype))


def changed(model, how):
    """The paths of what a mapping changed, after all was made equal."""
    disturb(model)
    before = values(model)
    initialize(model, how, seed=0)
    after = values(model)
    return {path for path in before if not np.array_equal(before[path], after[path])}


def std(array):
    return float(np.std(array.astype(np.float64)))


# Which weights an entry draws

VALUES = [None, "xavier_uniform", GlorotNormal(gain=2.0), "he_normal", "ones"]


def mapping(paths, rng):
    """Patterns of which each comes first somewhere: names of layers and of variables."""
    names = sorted({name for path in paths for name in path.split("/")})
    chosen = [str(name) for name in rng.permutation(names)[: rng.integers(1, 4)]]
    patterns = [f"(^|/){re.escape(name)}(/|$)" for name in chosen]
    patterns += [ALL] * int(rng.integers(2))
    firsts = {first(path, patterns) for path in paths}
    return {
        pattern: VALUES[rng.integers(len(VALUES))]
        for pattern in patterns
        if pattern in firsts
    }


def first(path, patterns):
    return next((pattern for pattern in patterns if re.search(pattern, path)), None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [*BY_KIND, *WITH_STATE], ids=lambda make: make.__name__)
def test_each_weight_gets_what_the_first_pattern_says(make, seed):
    """The bits are those of a run that draws the whole model like this."""
    model = make()
    whole = initialize(model, seed=seed).rows
    kernels = {row["path"] for row in whole if row["fan_in"] is not None}
    own = values(model)
    how = mapping(list(own), np.random.default_rng(seed))
    expected = {path: np.full_like(own[path], 7) for path in own}
    for path in own:
        pattern = first(path, how)
        if pattern is None or how[pattern] is None:
            continue
        is_for_kernels = any(re.search(pattern, kernel) for kernel in kernels)
        is_drawn = path in kernels if is_for_kernels else own[path].dtype == np.float32
        expected[path] = own[path]
        if is_drawn:
            initialize(model, {f"^{re.escape(path)}$": how[pattern]}, seed=seed)
            expected[path] = values(model)[path]
            if is_for_kernels:
                initialize(model, how[pattern], seed=seed)
                np.testing.assert_array_equal(values(model)[path], expected[path])
    disturb(model)
    table = initialize(model, how, seed=seed)
    assert not table.findings
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=f"{path} of {how}")
    left = {row["path"]: row["done"] for row in table if "not changed" in row["done"]}
    for path in own:
        pattern = first(path, how)
        reason = "no pattern matches it" if pattern is None else "its pattern has None"
        is_left = pattern is None or how[pattern] is None
        assert left.get(path) == (f"not changed: {reason}" if is_left else None)


def test_only_the_head():
    """Neither statistics nor dropout's seed; optimizer and metrics are reset."""
    model = convnet()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
    model.fit(np.ones((2, 8, 8, 3)), np.ones((2, 4)), verbose=0)
    assert changed(model, {"last": "xavier_normal"}) == {"last/kernel", "last/bias"}
    assert int(array(model.optimizer.iterations)) == 0


def test_only_the_factors_of_lora():
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(40, 32, name="table")(x)
    y = layers.MultiHeadAttention(4, 8, name="attention")(y, y)
    model = keras.Model(x, layers.Dense(32, name="dense")(y))
    attention = model.get_layer("attention")
    parts = [model.get_layer("table"), model.get_layer("dense")]
    for part in [*parts, attention.query_dense, attention.value_dense]:
        part.enable_lora(4)
    kernels = {f"attention/{name}/lora_kernel_a" for name in ("query", "value")}
    kernels.add("dense/lora_kernel_a")
    assert changed(model, {".*lora_kernel_a": "xavier_uniform"}) == kernels
    right = math.sqrt(2 / (32 + 4))  # not that of its shape, (32, 4, 4)
    for part in (attention.query_dense, attention.value_dense):
        assert abs(std(array(part.lora_kernel_a)) / right - 1) < 0.25
    table = {"table/lora_embeddings_a"}
    assert changed(model, {"lora_embeddings_a$": "he_uniform"}) == table
    factors = kernels | table | {re.sub("_a$", "_b", path) for path in kernels | table}
    assert changed(model, {"lora_.*_[ab]$": "xavier_uniform"}) == factors


def test_biases_and_embeddings_by_a_pattern_without_kernels():
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(500, 32, name="embedding")(x)
    model = keras.Model(x, layers.LSTM(100, name="lstm")(y))
    normal, uniform = initializers.RandomNormal(stddev=0.02), GlorotUniform()
    how = {
        "embeddings$": normal,
        "bias$": initializers.RandomUniform(-0.1, 0.1),
        "recurrent_kernel$": uniform,
    }
    table = initialize(model, how, seed=0)
    assert [row["done"] for row in table][:4] == [
        "RandomNormal",
        "not changed: no pattern matches it",
        "GlorotUniform",
        "RandomUniform",
    ]
    after = values(model)
    assert abs(std(after["embedding/embeddings"]) / 0.02 - 1) < 0.05
    assert abs(after["lstm/lstm_cell/bias"]).max() <= 0.1
    assert std(after["lstm/lstm_cell/bias"]) > 0.05


class Tables(layers.Layer):
    """It can't be built again, so its own initializer is not known."""

    def build(self, shape):
        self.positions = self.add_weight(shape=(50, 32), name="positions")

    def call(self, x):
        return x

    def get_config(self):
        raise NotImplementedError


def test_a_pattern_is_enough_where_the_own_initializer_is_not_known():
    layer = Tables(name="tables")
    layer.build((None, 32))
    table = initialize(layer, {"positions": initializers.RandomNormal(stddev=0.02)}, seed=0)
    assert not table.findings
    assert abs(std(array(layer.positions)) / 0.02 - 1) < 0.1


class Assigned(layers.Layer):
    """It puts threes into its weight after that was made."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(50,), name="scale")
        self.scale.assign(np.full(50, 3.0))

    def call(self, x):
        return x * self.scale


def test_a_pattern_comes_before_what_build_assigns():
    model = keras.Sequential([keras.Input((50,)), Assigned(name="assigned")])
    uniform = initializers.RandomUniform(-0.1, 0.1)
    initialize(model, {"scale": uniform}, seed=0)
    assert abs(values(model)["assigned/scale"]).max() <= 0.1
    assert not audit(model, {"scale": uniform}).findings
    initialize(model, seed=0)
    assert (values(model)["assigned/scale"] == 3).all()


def test_quantized_layers_are_left_and_listed():
    layer = layers.Dense(8)
    layer.build((None, 8))
    layer.quantize("int8")
    with pytest.warns(UserWarning, match="its layer is quantized"):
        table = initialize(layer, {ALL: "xavier_uniform"}, seed=0)
    assert len(table.findings) == len(layer.weights)


# Seeds


def test_the_seed_of_an_initializer_in_a_mapping():
    model = convnet()
    initialize(model, GlorotUniform(seed=5))
    whole = values(model)
    disturb(model)
    table = initialize(model, {"first": "zeros", "last": GlorotUniform(seed=5)})
    assert "seed 5" in table.note
    np.testing.assert_array_equal(values(model)["last/kernel"], whole["last/kernel"])


# Recipes


def fading(survey):
    """Each kernel half as large as the one before."""
    kernels = [weight for weight in survey.weights if weight.is_kernel]
    starts = [
        Start.of(kernel, GlorotUniform(gain=2.0**-place))
        for place, kernel in enumerate(kernels)
    ]
    return Starts({id(k.variable): s for k, s in zip(kernels, starts, strict=True)})


def test_a_recipe_of_the_users_own():
    model = convnet()
    names = [row["done"] for row in initialize(model, fading, seed=0) if row["fan_in"]]
    assert names[:2] == ["GlorotUniform", "GlorotUniform(gain=0.5)"]
    whole = values(model)
    disturb(model)
    initialize(model, {"last": fading, "first": None}, seed=0)
    np.testing.assert_array_equal(values(model)["last/kernel"], whole["last/kernel"])
    assert (values(model)["first/kernel"] == 7).all()


def test_functions_of_shape_and_dtype_are_initializers():
    model = convnet()

    def halves(shape, dtype=None):
        return keras.ops.full(shape, 0.5, dtype)

    for function in (halves, lambda *args, **options: halves(*args, **options)):
        initialize(model, {"last/kernel": function}, seed=0)
        assert (values(model)["last/kernel"] == 0.5).all()
        disturb(model)


# Errors, before anything changes


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "must have a pattern"),
        ({"(": "zeros"}, r"regular expressions .*Received: '\(' \(missing \)"),
        ({3: "zeros"}, "regular expressions .*Received: 3"),
        ({b"last": "zeros"}, "regular expressions .*Received: b'last'"),
        ({"lasst/kernel": "zeros"}, "'lasst/kernel' is found in no path.*mean 'last'"),
        ({re.compile("lasst"): "zeros"}, r"'lasst'\) is found in no path.*mean 'last'"),
        ({ALL: "zeros", "last": "ones"}, "'last' matches only what patterns before it"),
        ({"last": "xavier"}, r"Received: how\['last'\]='xavier'"),
        ({"last": 3}, r"Received: how\['last'\]=3"),
        ({"last": {"first": "ones"}}, r"Received: how\['last'\]="),
        ("isometri", "a recipe: 'isometric'.*mean 'isometric'"),
        ("he_norml", "mean 'he_normal'"),
        (lambda survey: None, "must return `keras_glorot.recipes.Starts`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_pattern_and_what_was_meant(how, message):
    model = convnet()
    disturb(model)
    with pytest.raises((ValueError, TypeError), match=message):
        initialize(model, how)
    assert all((value == 7).all() for value in values(model).values())


# `audit` against what `how` draws

GPT2 = {
    "embeddings?$": initializers.RandomNormal(stddev=0.02),
    "(attention_output|project)/kernel": initializers.RandomNormal(
        stddev=0.02 / math.sqrt(2 * 3)
    ),
    ALL: initializers.RandomNormal(stddev=0.02),
}


def gpt2(depth=3):
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(100, 32, name="tokens")(x)
    for i in range(depth):
        z = layers.LayerNormalization(name=f"norm{i}")(y)
        y += layers.MultiHeadAttention(4, 8, name=f"attention{i}")(z, z)
        z = layers.Dense(128, "gelu", name=f"expand{i}")(y)
        y += layers.Dense(32, name=f"project{i}")(z)
    return keras.Model(x, layers.Dense(100, use_bias=False, name="head")(y))


def pretrained():
    """All of it moved; as a file has it, without an optimizer."""
    model = convnet()
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(array(weight) + rng.uniform(0.01, 0.1, weight.shape))
    return model


HEAD = {"^last/": initializers.TruncatedNormal(stddev=0.01)}


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (pretrained, HEAD),
        (gpt2, GPT2),
        (gpt2, "isometric"),
        (gpt2, "pytorch"),
        (convnet, HEAD | {ALL: "pytorch"}),
        (convnet, GlorotNormal("auto", mode="fan_in")),
        (convnet, fading),
    ],
    ids=["head", "gpt2", "isometric", "pytorch", "pytorch but for the head", "auto", "own"],
)
def test_audit_finds_sound_what_initialize_made_and_not_before(make, how):
    model = make()
    severities = {finding.severity for finding in audit(model, how).findings}
    assert severities & {"warning", "error"}
    initialize(model, how, seed=0)
    assert not audit(model, how).findings


@pytest.mark.parametrize("make", [*BY_KIND, *WITH_STATE], ids=lambda make: make.__name__)
def test_audit_finds_sound_what_a_mapping_made(make):
    model = make()
    paths = [row["path"] for row in initialize(model, seed=0)]
    how = mapping(paths, np.random.default_rng(5))
    initialize(model, how, seed=0)
    codes = {finding.code for finding in audit(model, how).findings}
    assert codes <= ({"constant-kernel"} if "ones" in how.values() else set())


def test_a_bound_of_how_is_exact():
    """That of a declared one gives way where all values may be a little larger."""
    layer = keras.layers.Dense(40)
    layer.build((None, 40))
    initialize(layer, seed=0)
    kernel = array(layer.kernel)
    kernel[0, 0] = 1.04 * abs(kernel).max()
    layer.kernel.assign(kernel)
    assert [each.code for each in audit(layer, "xavier_uniform").findings] == ["bounds"]
    assert not audit(layer).findings
    kernel[0, 0] *= 1.3
    layer.kernel.assign(kernel)
    assert [each.code for each in audit(layer).findings] == ["bounds"]


FAULTS = {
    "std": lambda kernel: kernel * 1.5,
    "mean": lambda kernel: kernel + 0.05,
    "form": lambda kernel: np.sign(kernel) * kernel.std(),
    "bounds": lambda kernel: np.where(
        np.arange(kernel.size).reshape(kernel.shape), kernel, 1
    ),
    "zero-slice": lambda kernel: kernel * (np.arange(kernel.shape[-1]) != 3),
    "not-finite": lambda kernel: kernel + np.nan,
    "constant-kernel": np.zeros_like,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_check_is_made_against_how(fault):
    model = gpt2()
    how = {"project1/": initializers.RandomUniform(-0.1, 0.1)}
    initialize(model, how, seed=0)
    kernel = model.get_layer("project1").kernel
    kernel.assign(FAULTS[fault](array(kernel)))
    found = audit(model, how).findings
    assert [(each.code, each.path) for each in found] == [(fault, "project1/kernel")]


@pytest.mark.parametrize("fault", ["pair", "matrix", "size"])
def test_faults_of_the_isometric_start_are_found_against_it(fault):
    model = keras.Sequential(
        [keras.Input((64,)), *(layers.Dense(64, "relu", name=n) for n in "abc")]
    )
    initialize(model, "isometric", seed=0)
    kernel = model.get_layer("b").kernel
    wrong = array(kernel)
    wrong *= 1.2 if fault == "size" else 1
    wrong[:, :2] = -wrong[:, 1::-1] * (2 if fault == "matrix" else 1)
    wrong[3, 5] += fault == "pair"
    kernel.assign(wrong)
    found = audit(model, "isometric").findings
    code = "std" if fault == "size" else "form"
    assert [(each.code, each.path) for each in found] == [(code, "b/kernel")]


def test_what_is_left_is_checked_as_trained():
    model = pretrained()
    initialize(model, HEAD, seed=0)
    table = audit(model, HEAD)
    assert table.note.startswith("1 of 1 kernels have the expected std; 14 variables are")
    model.get_layer("first").kernel.assign(np.full((3, 3, 3, 16), 0.5))
    found = audit(model, HEAD).findings
    assert [(each.code, each.path) for each in found] == [
        ("constant-kernel", "first/kernel")
    ]


def test_a_constant_that_was_asked_for_has_the_expected_std():
    model = convnet()
    initialize(model, {"last/": "zeros"}, seed=0)
    table = audit(model, {"last/": "zeros"})
    assert [finding.severity for finding in table.findings] == ["info"]
    assert table.note.startswith("1 of 1 kernels have the expected std")
    initialize(model, {"last/": "he_normal"}, seed=0)
    table = audit(model, {"last/": "zeros"})
    assert table.note.startswith("0 of 1 kernels have the expected std")


def test_audit_says_what_is_wrong_with_how():
    with pytest.raises(ValueError, match="found in no path"):
        audit(convnet(), {"nowhere": "zeros"})
