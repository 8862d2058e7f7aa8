"""`audit` finds every fault that is there, and none that is not."""

import json
import math
from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
from models import BY_KIND, convolutional, dense, lstm, mobile
from planted_faults import ARCHITECTURES, FAULTS, audit_fault, false_findings

import keras_glorot
from keras_glorot import (
    GlorotNormal,
    GlorotOrthogonal,
    GlorotUniform,
    as_default,
    audit,
    calculate_gain,
    calibrate,
    initialize,
)
from keras_glorot._drawing import distributions
from keras_glorot._drawing.stream import draw
from keras_glorot._keras.tree import Tree
from keras_glorot.recipes import Start, Starts
from keras_glorot.tables.view import View

layers: Any = keras.layers  # Keras declares many arguments as `str`


def warnings(table):
    return [finding for finding in table.findings if finding.severity != "info"]


def paths_with(code, model):
    return [finding.path for finding in audit(model).findings if finding.code == code]


def kernel(model):
    for _, variable in Tree(model).owned_weights:
        if variable.name == "kernel" and math.prod(variable.shape) > 300:
            return variable
    raise LookupError


def change(variable, function):
    values = np.array(keras.ops.convert_to_numpy(variable))
    function(values)
    variable.assign(values)


@pytest.mark.parametrize("make", BY_KIND)
@pytest.mark.parametrize("seeds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_no_finding_on_a_right_model(make, seeds):
    """100 seeds x 10 models: at six sigmas one finding in 10,000 such runs is chance."""
    model = make(kernel_initializer="xavier_uniform")  # JAX compiles Keras's own
    for seed in range(seeds):
        for kind in (GlorotUniform, GlorotNormal):
            initialize(model, kind(gain="auto"), seed=seed)
            assert not audit(model).findings


@pytest.mark.parametrize("kind", ["xavier_uniform", "xavier_normal"])
@pytest.mark.parametrize("make", BY_KIND)
def test_no_warning_on_a_right_model_as_built(make, kind):
    keras.utils.set_random_seed(0)
    assert not warnings(audit(make(kernel_initializer=kind)))


def test_what_stock_keras_gets_wrong():
    options = {"kernel_initializer": keras.initializers.GlorotNormal(seed=0)}
    assert len(paths_with("std", mobile(**options))) == 2
    wide = layers.Conv2D(256, 3, groups=32)
    wide.build((None, 8, 8, 256))
    (finding,) = audit(wide).findings
    assert "did not divide fan_out by the groups" in finding.advice
    depthwise = layers.DepthwiseConv2D(3)
    depthwise.build((None, 8, 8, 512))
    (finding,) = audit(depthwise).findings
    assert "channels of a depthwise kernel" in finding.advice
    assert audit(depthwise).rows[0]["ratio"] == pytest.approx(0.0625, rel=0.03)


@pytest.mark.parametrize(
    ("equation", "shape", "cause"),
    [
        ("abc,cde->abde", (4, 4, 16), "attention heads"),
        ("bei,eio->beo", (4, 24), "experts"),
    ],
)
def test_fans_by_shape_alone_are_named(equation, shape, cause):
    """As Keras before 3.15 drew them, and everyone's own `Initializer` still does."""
    layer = layers.EinsumDense(equation, shape)
    layer.build((None, 4, 32))
    fan_in, fan_out = layer.kernel.shape[-2], layer.kernel.shape[-1]
    window = math.prod(layer.kernel.shape[:-2])
    limit = math.sqrt(6 / (window * (fan_in + fan_out)))
    rng = np.random.default_rng(0)
    layer.kernel.assign(rng.uniform(-limit, limit, layer.kernel.shape))
    (finding,) = audit(layer).findings
    assert cause in finding.advice
    assert finding.severity == "warning"


LORA = [
    (layers.EinsumDense("abc,cde->abde", (4, 16, 32)), (None, 4, 512), ["std"]),
    (layers.Dense(64), (None, 512), []),
    (layers.Conv2D(64, 3), (None, 8, 8, 64), []),
    (layers.Embedding(4000, 64), (None, 8), ["embedding"]),
]


@pytest.mark.parametrize(("layer", "shape", "codes"), LORA)
def test_the_advice_for_a_factor_of_lora(layer, shape, codes):
    """Stock Keras looks at its shape alone; the advice, followed, leaves no finding."""

    def findings(**options):
        fresh = type(layer).from_config(layer.get_config())
        fresh.build(shape)
        fresh.enable_lora(8, **options)
        factor = keras.ops.convert_to_numpy(fresh.weights[-2])
        found = [each for each in audit(fresh).findings if "lora" in each.path]
        return found, factor.std()

    found, std = findings()
    assert [finding.code for finding in found] == codes
    assert all("`enable_lora(rank, a_initializer=" in each.advice for each in found)
    advised: Any = "xavier_uniform"
    if codes == ["embedding"]:
        advised = keras.initializers.RandomNormal(stddev=1.0)
    found, advised_std = findings(a_initializer=advised)
    assert not found
    if codes == ["std"]:
        assert std == pytest.approx(0.0156, rel=0.02)  # He's std is √16 times that
        assert advised_std == pytest.approx(math.sqrt(2 / (512 + 16 * 8)), rel=0.02)


def test_the_expected_std_is_what_the_initializer_would_give():
    x = keras.Input((64,))
    init = keras.initializers
    model = keras.Sequential(
        [
            x,
            layers.Dense(32, kernel_initializer=init.TruncatedNormal(stddev=0.02)),
            layers.Dense(
                64, kernel_initializer=init.VarianceScaling(3.0, "fan_out", "uniform")
            ),
            layers.Dense(64, kernel_initializer=init.Orthogonal(2.0)),
            layers.Dense(16, kernel_initializer=init.RandomUniform(-0.1, 0.3)),
            layers.Dense(16, kernel_initializer=GlorotNormal(gain=3.0)),
        ]
    )
    reported = [r["expected_std"] for r in audit(model) if r["path"].endswith("kernel")]
    computed = [
        0.02 * 0.8796256610342398,
        math.sqrt(3 / 64),
        2 / 8,
        0.4 / math.sqrt(12),
        3 / 4,
    ]
    np.testing.assert_allclose(reported, computed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "code", "severity"),
    [
        (lambda w: w.__imul__(w.dtype.type(0.7)), "std", "info"),
        (lambda w: w.__imul__(w.dtype.type(2.0)), "std", "info"),
        (lambda w: w.__iadd__(w.dtype.type(0.12)), "mean", "warning"),
        (lambda w: w.__setitem__((0, 0), 1), "bounds", "warning"),
        (lambda w: w.__setitem__((2, 3), math.nan), "not-finite", "error"),
        (lambda w: w.__setitem__((2, 3), -math.inf), "not-finite", "error"),
        (lambda w: w.fill(0), "constant-kernel", "error"),
        (lambda w: w.fill(0.3), "constant-kernel", "error"),
    ],
    ids=["small", "large", "mean", "bounds", "nan", "inf", "zero", "constant"],
)
def test_planted_faults_are_found(fault, code, severity, dtype):
    model = dense(dtype=dtype)
    initialize(model, seed=0)
    change(kernel(model), fault)
    (finding,) = audit(model).findings
    assert finding.path.endswith("/kernel")
    assert finding.path in kernel(model).path
    assert (finding.code, finding.severity) == (code, severity)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_have_no_std(value):
    """Not 0, as those of a constant kernel."""
    model = dense()
    change(kernel(model), lambda w: w.fill(value))
    table = audit(model)
    (row,) = (row for row in table if row["path"] == table.findings[0].path)
    assert math.isnan(row["std"])
    rows = json.loads(table.to_json())["rows"]
    assert rows[table.rows.index(row)]["std"] is None


def test_twins_are_found():
    seeded = keras.initializers.GlorotUniform(seed=3)
    heads = keras.Input((5, 32))
    model = keras.Model(
        heads, layers.MultiHeadAttention(4, 8, kernel_initializer=seeded)(heads, heads)
    )
    heads = [path.split("/")[-2] for path in paths_with("twin", model)]
    assert heads[:2] == ["key", "value"]
    parts = [layers.Dense(units, kernel_initializer=seeded) for units in (64, 16)]
    model = keras.Sequential([keras.Input((16,)), *parts])
    assert len(paths_with("twin", model)) == 1  # in another shape
    model = lstm()
    initialize(model, seed=0)
    assert not audit(model).findings
    shared = layers.Dense(8)
    x = keras.Input((8,))
    assert not paths_with("twin", keras.Model(x, shared(shared(x))))


def test_glorot_where_it_does_not_belong():
    glorot = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(40, 8, embeddings_initializer=glorot(1)),
            layers.LSTM(12, recurrent_initializer=glorot(2)),
            layers.Dense(64, "relu"),
            layers.Dense(64),
            layers.LeakyReLU(),
            layers.Dense(64, "tanh"),
        ]
    )
    initialize(model, seed=0)
    (embedding,) = paths_with("embedding", model)
    assert embedding.endswith("/embeddings")
    (recurrent,) = paths_with("recurrent", model)
    assert recurrent.endswith("/recurrent_kernel")
    gains = [f.severity for f in audit(model).findings if f.code == "relu-gain"]
    assert gains == ["info", "info"]
    advice = [f.advice for f in audit(model).findings if f.code == "relu-gain"]
    leaky = calculate_gain("leaky_relu", 0.3)  # of the layer; not that of the function
    assert advice == [
        "Use `GlorotUniform(gain='relu')` or `HeNormal`.",
        f"Use `GlorotUniform(gain={leaky:.4g})`.",
    ]
    initialize(model, GlorotUniform(gain="auto"), seed=0)
    assert not paths_with("relu-gain", model)


def test_zero_kernels_that_are_meant_are_only_mentioned():
    layer = layers.Dense(8, kernel_initializer="zeros")
    layer.build((None, 8))
    (finding,) = audit(layer).findings
    assert finding.severity == "info"


def test_all_stock_models_are_right_in_our_scope():
    with as_default():
        assert not warnings(audit(keras.applications.MobileNetV2(weights=None, alpha=0.35)))


class Opaque(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(
            shape=(8, 8), initializer=lambda s, dtype: keras.ops.ones(s)
        )

    def get_config(self):
        raise NotImplementedError


def test_what_is_not_known_is_shown_and_not_judged():
    layer = Opaque()
    layer.build((None, 8))
    (row,) = audit(layer)
    assert (row["initializer"], row["expected_std"], row["std"]) == ("<lambda>", None, 0)
    layer = layers.Dense(8)
    layer.build((None, 8))
    layer.quantize("int8")
    assert not audit(layer).findings


@pytest.mark.parametrize("size", [0, 1])
def test_kernels_with_few_or_no_values(size):
    layer = layers.Dense(1)
    layer.build((None, size))
    table = audit(layer)
    assert not table.findings
    json.loads(table.to_json())


def test_reads_only():
    model = convolutional()
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    table = audit(model)
    assert len(table) == len(model.weights)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(new))


def test_sound_kernels_need_no_graph_of_the_model(monkeypatch):
    """It is traced for an orthogonal or a wrong kernel only."""
    model = dense(kernel_initializer="xavier_uniform")
    monkeypatch.setattr("keras_glorot.tools.audit.isometric", None)
    assert warnings(audit(model)) == []


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="Argument `model` must be built"):
        audit(layers.Dense(3))
    with pytest.raises(TypeError, match="Argument `model` must be a Keras layer or model"):
        audit(3)


# Model: how many kernels have the wrong std, and how many stand before a ReLU with gain 1.
STOCK = {
    "MobileNetV2": (17, 0),
    "Xception": (34, 0),
    "ConvNeXtTiny": (18, 18),
    "EfficientNetB0": (0, 0),  # its own initializer looks at fan_out, which is right
    "ResNet50": (0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_models(name):
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None)
    wrong, plain = (len(paths_with(code, model)) for code in ("std", "relu-gain"))
    assert (wrong, plain) == STOCK[name]
    initialize(model, seed=0)
    assert not warnings(audit(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # KerasHub's imports are not ours to mend
def test_kerashub_backbones():
    keras_hub = pytest.importorskip("keras_hub")
    common = {"num_layers": 2, "num_heads": 4, "hidden_dim": 64}
    backbones = (
        keras_hub.models.BertBackbone(
            vocabulary_size=500, intermediate_dim=128, max_sequence_length=32, **common
        ),
        keras_hub.models.ViTBackbone(
            image_shape=(32, 32, 3), patch_size=8, mlp_dim=128, **common
        ),
    )
    for backbone in backbones:
        assert len(keras_glorot.layer_fans(backbone)) > 10
        keras_glorot.initialize(backbone, seed=1)
        assert not paths_with("std", backbone)


def fresh(make=dense, **options):
    model = make(**options)
    initialize(model, seed=0)
    return model


def assign(variable, values):
    variable.assign(np.broadcast_to(values, variable.shape))


def found(code, model):
    return code in {finding.code for finding in audit(model).findings}


# Planted into a fresh model, each must be found where it was planted: a few here, all
# with `make slow`. `benchmarks/evidence/audit_mutations.py` writes the table.
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(each, marks=[] if i % 8 == 0 else pytest.mark.slow, id=each.what)
        for i, each in enumerate(FAULTS)
    ],
)
def test_all_planted_faults_are_found(fault):
    codes, is_found = audit_fault(fault)
    assert is_found, codes


@pytest.mark.parametrize("make", ARCHITECTURES)
@pytest.mark.parametrize("seeds", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_no_false_findings(make, seeds):
    """At one in 500 million tensors, one false finding in 10,000 such runs is chance."""
    assert not false_findings(make, seeds)


@pytest.mark.parametrize(
    ("name", "value", "code", "severity"),
    [
        ("moving_variance", -1.0, "negative-variance", "error"),
        ("gamma", 0.0, "constant", "warning"),
        ("bias", 90.0, "constant", "warning"),
        ("beta", math.nan, "not-finite", "error"),
    ],
)
def test_constants_are_compared(name, value, code, severity):
    model = fresh(convolutional)
    variable = next(v for v in model.weights if v.name == name)
    assign(variable, value)
    findings = {finding.code: finding for finding in audit(model).findings}
    assert findings[code].severity == severity
    assert findings[code].path.endswith(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_constants_are_compared_as_rounded(dtype):
    tenth = keras.initializers.Constant(0.1)
    layer = layers.Dense(4, bias_initializer=tenth, dtype=dtype)
    layer.build((None, 300))
    assert not audit(layer).findings
    assign(layer.bias, 0.102)
    assert found("constant", layer)


def test_all_units_alike_are_an_error():
    model = fresh()
    change(kernel(model), lambda w: w.__setitem__(..., w[:, :1]))
    severities = {f.code: f.severity for f in audit(model).findings}
    assert severities["repeated-slice"] == "error"
    model = fresh()
    change(kernel(model), lambda w: w.__setitem__(..., w[:1]))  # inputs, not units
    severities = {f.code: f.severity for f in audit(model).findings}
    assert severities["repeated-slice"] == "warning"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 40), (3, 200), (1, 1), (300, 1)])
def test_few_values_are_equal_by_chance(shape, dtype):
    """In bfloat16, two columns of two values are equal in one model of some hundreds."""
    layer = layers.Dense(shape[1], kernel_initializer="xavier_uniform", dtype=dtype)
    layer.build((None, shape[0]))
    for seed in range(50):
        initialize(layer, seed=seed)
        assert not audit(layer).findings


def test_close_stds_do_not_make_a_false_finding():
    """The declared std and Glorot's differ by 2 %: both fit, the bounds of one only."""
    scaling = keras.initializers.VarianceScaling(2.0, "fan_out", "truncated_normal")
    config = keras.initializers.serialize(scaling)
    for seed in range(60):
        keras.utils.set_random_seed(seed)
        layer = layers.Conv2D(240, 1, kernel_initializer=config)
        layer.build((None, 4, 4, 10))
        assert not [f for f in audit(layer).findings if f.severity != "info"]


def test_a_scale_that_explains_the_values_comes_before_a_form():
    """Keras's kernel has 0.82 of the right std: of uniform values, never of normal ones."""
    found = Counter()
    for seed in range(40):
        init = keras.initializers.GlorotUniform(seed=seed)
        layer = layers.Conv2D(8, 3, groups=2, kernel_initializer=init)
        layer.build((None, 8, 8, 8))
        for finding in audit(layer).findings:
            found[finding.code] += 1
            assert "did not divide fan_out by the groups" in finding.advice
    assert found.keys() == {"std"}
    assert found["std"] > 20  # of the others, chance says nothing


def test_positive_values_are_no_orthogonal_matrix():
    """Their mean square is right, and of an orthogonal matrix that alone is its std."""
    model = dense(kernel_initializer="xavier_uniform")
    change(kernel(model), lambda w: np.abs(w, out=w))
    assert found("std", model)
    assert not found("mean", model)


@pytest.mark.parametrize("sizes", [(300, 1), (2, 200), (200, 2), (1, 200)])
def test_vectors_are_orthogonal_matrices(sizes):
    """Of a head with one unit, say: single values reach far beyond uniform ones."""
    size, units = sizes
    parts = [layers.Dense(units, "relu"), layers.Dense(size, "gelu"), layers.Dense(units)]
    model = keras.Sequential([keras.Input((size,)), *parts])
    for seed in range(10):
        initialize(model, GlorotOrthogonal("auto"), seed=seed)
        assert not warnings(audit(model))
    change(parts[0].kernel, lambda w: w.__setitem__((0, 0), 12 * w.std()))
    assert warnings(audit(model))


@pytest.mark.parametrize(
    "fault",
    [
        lambda w: np.sign(w) * w.std(),
        lambda w: w * (np.arange(w.size).reshape(w.shape) % 2) * math.sqrt(2),
    ],
    ids=["signs", "half zeros"],
)
def test_normal_values_have_a_form_too(fault):
    """Of 38,400 values the kurtosis is 3 within 0.3: twelve standard errors."""
    normal = keras.initializers.RandomNormal(stddev=0.05, seed=0)
    layer = layers.Dense(128, kernel_initializer=normal)
    layer.build((None, 300))
    assert not audit(layer).findings
    layer.kernel.assign(fault(keras.ops.convert_to_numpy(layer.kernel)))
    assert found("form", layer)


def test_values_of_two_sizes_only(monkeypatch):
    """A form of which even one sample has the std."""
    form = distributions.Form(1.0, 1.0, 1.0, None, 0.0, "two values")
    monkeypatch.setitem(distributions._FORMS, "signs", form)

    def signs(survey):
        drawn = Start("signs", distributions.Distribution.from_std("signs", 0.1))
        kernels = [each for each in survey.weights if each.is_kernel]
        return Starts({id(each.variable): drawn for each in kernels})

    layer = layers.Dense(40)
    layer.build((None, 40))
    layer.kernel.assign(0.1 * np.sign(keras.ops.convert_to_numpy(layer.kernel)))
    assert not audit(layer, signs).findings
    change(layer.kernel, lambda w: w.__imul__(w.dtype.type(1.1)))
    assert [finding.code for finding in audit(layer, signs).findings] == ["std"]


def test_values_finer_than_the_dtype_are_equal_by_chance():
    """In bfloat16, three numbers are within six stds of the mean."""
    near_one = keras.initializers.RandomNormal(1.0, 1e-3, seed=0)
    layer = layers.Dense(64, kernel_initializer=near_one, dtype="bfloat16")
    layer.build((None, 48))
    assert [finding.code for finding in audit(layer).findings] == [
        "std"
    ]  # nearly all are 1


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only there")
def test_a_truncated_normal_of_torch_has_no_hard_bound():
    """Keras gives up after four tries to draw a value within two stds."""
    keras.utils.set_random_seed(0)
    initializer = keras.initializers.TruncatedNormal(stddev=1.0)
    layer = layers.Dense(1500, kernel_initializer=initializer)
    layer.build((None, 1500))
    assert abs(keras.ops.convert_to_numpy(layer.kernel)).max() > 2
    assert not found("bounds", layer)
    change(layer.kernel, lambda w: w.__setitem__((0, 0), 12 * w.std()))
    assert found("bounds", layer)


def test_a_normal_kernel_has_a_bound_too():
    normal = keras.initializers.RandomNormal(stddev=0.05, seed=0)
    layer = layers.Dense(100, kernel_initializer=normal)
    layer.build((None, 100))
    assert not audit(layer).findings
    change(layer.kernel, lambda w: w.__setitem__((0, 0), 0.5))
    assert found("bounds", layer)


def test_trained_models_get_one_sentence():
    model = fresh(convolutional)
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 9, 9, 3), "float32")
    model.fit(x, rng.random((32, 4), "float32"), verbose=0)
    (finding,) = audit(model).findings
    assert (finding.code, finding.severity) == ("trained", "info")
    weight = kernel(model)
    change(weight, lambda w: w.__setitem__((..., 2), 0))
    change(model.layers[1].moving_variance, lambda v: v.__setitem__(0, math.nan))
    codes = [finding.code for finding in audit(model).findings]
    assert sorted(codes) == ["not-finite", "trained", "zero-slice"]
    initialize(model, seed=0)
    assert not audit(model).findings


@pytest.mark.parametrize("kept", ["list", "dictionary"])
def test_optimizers_of_a_model_with_its_own_step_are_seen(kept):
    model = fresh()
    optimizer = keras.optimizers.SGD(0.0)
    model.steppers = [optimizer] if kept == "list" else {"generator": optimizer}
    optimizer.build(model.trainable_variables)
    assert not found("trained", model)
    optimizer.apply([0 * weight for weight in model.trainable_variables])
    assert found("trained", model)


def test_a_model_without_an_optimizer_can_look_trained():
    model = fresh()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        values = keras.ops.convert_to_numpy(variable)
        variable.assign(values + rng.normal(0, 0.3, variable.shape))
    (finding,) = audit(model).findings
    assert (finding.code, finding.severity) == ("trained", "info")


def test_what_is_only_wrong_does_not_look_trained():
    model = fresh()
    for variable in model.weights:
        if variable.name == "kernel":
            change(variable, lambda w: w.__imul__(w.dtype.type(3)))
    assert found("std", model)
    assert not found("trained", model)
    layer = layers.DepthwiseConv2D(3)
    layer.build((None, 8, 8, 512))
    assert not found("trained", layer)


class OddActivation(layers.Dense):
    """Keeps something else than a function in its attribute `activation`."""

    def __init__(self, units, odd, **kwargs):
        super().__init__(units, **kwargs)
        self.odd = odd

    def build(self, input_shape):
        self.activation = self.odd
        super().build(input_shape)

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel) + self.bias


def mixes(x):
    return x - keras.ops.mean(x)


def test_a_calibrated_model_without_constants_does_not_look_trained():
    model = keras.Sequential([keras.Input((32,))])
    for _ in range(5):
        model.add(layers.Dense(32, "tanh", use_bias=False))
    initialize(model, seed=0)
    calibrate(model, 5 * np.random.default_rng(0).normal(size=(64, 32)))
    assert {finding.code for finding in audit(model).findings} == {"std"}


@pytest.mark.parametrize(
    ("odd", "is_known"),
    [
        ("gelu_approximate", False),
        ("relu", True),
        (layers.ReLU(), True),
        (layers.Softmax(), True),
        (layers.Dropout(0.5), False),
        (mixes, False),
        (3, False),
        (None, True),
    ],
    ids=["unknown", "name", "ReLU", "Softmax", "layer", "mixing", "number", "none"],
)
def test_activations_that_keras_does_not_know(odd, is_known):
    layer = OddActivation(24, odd)
    layer.build((None, 24))
    assert found("activation", layer) != is_known
    layer = OddActivation(24, odd, kernel_initializer=GlorotUniform("auto", seed=0))
    if is_known:
        layer.build((None, 24))
    else:
        with pytest.warns(UserWarning, match="no gain is known"):
            layer.build((None, 24))
        with pytest.warns(UserWarning, match="no gain is known"):
            initialize(layer, GlorotUniform("auto"))
        np.testing.assert_allclose(
            np.std(keras.ops.convert_to_numpy(layer.kernel)), math.sqrt(1 / 24), rtol=0.2
        )


def test_biases_of_rank_two_are_no_kernels():
    attention = layers.MultiHeadAttention(2, 8, name="attention")
    attention.build((None, 4, 16), (None, 4, 16))
    gru = layers.GRU(4, recurrent_initializer="glorot_uniform", name="gru")
    gru.build((None, 5, 3))
    for layer, kernels in (attention, 4), (gru, 2):
        table = audit(layer)
        shown = View(table).rows if table.findings else []
        with_fans = [row["path"] for row in table if row["fan_in"] is not None]
        assert len(with_fans) == kernels
        assert not [path for path in with_fans if "bias" in path]
        assert not [row for row in shown if "bias" in row["path"]]


def test_a_factor_that_the_std_does_not_tell_is_none():
    """The std is within its 5 %, and chance made it smaller than the factor."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(48)])
    (row,) = [row for row in audit(model) if row["expected_std"]]
    for seed in range(8):
        values = draw("uniform", (64, 48), 1.0, "float32", (seed,))
        model.layers[0].kernel.assign(1.049 * row["expected_std"] / values.std() * values)
        assert not audit(model).findings


def test_one_value_a_little_out_of_bounds():
    """The std of a large kernel says that nothing was scaled."""
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256)])
    initialize(model, seed=0)
    values = np.array(model.layers[0].kernel)
    values[3, 5] = 1.03 * GlorotUniform().limit(values.shape)
    model.layers[0].kernel.assign(values)
    (finding,) = audit(model).findings
    assert finding.code == "bounds"


@pytest.mark.parametrize(
    ("how", "is_saved"),
    [("xavier_uniform", False), ("xavier_normal", False), ("isometric", False),
     (GlorotOrthogonal(), False), (None, False), (None, True)],
)  # fmt: skip
def test_a_calibrated_model_is_sound(how, is_saved, tmp_path):
    """Also in its file: a kernel of the declared form is scaled, not wrong."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3)])
    for units in (64, 48, 64, 64, 64, 64, 64, 16):
        model.add(keras.layers.Dense(units, "tanh"))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(3))
    if how is not None:
        initialize(model, how, seed=1)
    x = 9 * np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    assert any(row["factor"] != 1 for row in calibrate(model, x))
    if is_saved:
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    findings = audit(model).findings
    assert not [each for each in findings if each.severity != "info"]
    assert "std" in {each.code for each in findings}
