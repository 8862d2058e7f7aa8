"""Right fans in every layer, whichever way Keras comes to build it.

The right numbers are written out by hand here; test_connections.py counts them.
"""

import math
import warnings

import keras
import numpy as np
import pytest

import keras_glorot
from keras_glorot import (
    Fans,
    GlorotNormal,
    GlorotUniform,
    compute_fans,
    keras_bridge,
    layer_fans,
    register_fans,
)
from keras_glorot import (
    layers as glorot_layers,
)
from keras_glorot.variables import describe

layers = keras.layers
BACKEND = keras.backend.backend()

# How many standard errors a drawn std may be off. 5: once in two million.
STANDARD_ERRORS = 5


def recorded(monkeypatch):
    """Has every draw noted as `(shape, layer, fans)`, in the order they happen."""
    draws = []
    ask = glorot_layers.kernel_fans

    def note(shape, layer=None, variable=None):
        answer = ask(shape, layer, variable)
        draws.append((tuple(shape), layer, answer))
        return answer

    monkeypatch.setattr(keras_glorot.initializers, "kernel_fans", note)
    return draws


def assert_drawn(variable, fan_in, fan_out, gain=1.0):
    """The std of a uniformly drawn weight is Glorot's for these fans."""
    values = keras.ops.convert_to_numpy(variable).astype("float64")
    # A sample variance has the relative variance (kurtosis - 1) / n; the kurtosis of a
    # uniform distribution is 9/5, and a std is off by half as much as a variance.
    tolerance = STANDARD_ERRORS * math.sqrt(0.8 / values.size) / 2
    ratio = np.sqrt(np.mean(values**2)) / (gain * math.sqrt(2 / (fan_in + fan_out)))
    assert abs(ratio - 1) < tolerance, f"{variable.path}: std is {ratio} of the right one"


# What the issue names, with the std that stock Keras gives as a part of the right one.
IMAGE = (8, 8, 512)


def one_of_each():
    """Layers, their input shape and their kernels' fans. Stock Keras: 0.06 to 0.25."""
    init = GlorotUniform(seed=1)
    separable = {"depthwise_initializer": init, "pointwise_initializer": init}
    attention = {"kernel_initializer": init}
    return {
        "DepthwiseConv2D": (
            layers.DepthwiseConv2D(3, depthwise_initializer=init),
            (8, 8, 512),
            {"kernel": (9, 9)},
        ),
        "grouped Conv2D": (
            layers.Conv2D(512, 3, groups=32, kernel_initializer=init),
            (8, 8, 512),
            {"kernel": (9 * 16, 9 * 16)},
        ),
        "Conv2DTranspose": (
            layers.Conv2DTranspose(16, 3, strides=2, kernel_initializer=init),
            (4, 4, 64),
            {"kernel": (9 * 64, 9 * 16)},
        ),
        "SeparableConv2D": (
            layers.SeparableConv2D(64, 3, depth_multiplier=2, **separable),
            (8, 8, 128),
            {"depthwise_kernel": (9, 18), "pointwise_kernel": (256, 64)},
        ),
        "SeparableConv2D of one": (  # both kernels have the shape (1, 1, 4096, 1)
            layers.SeparableConv2D(1, 1, **separable),
            (2, 2, 4096),
            {"depthwise_kernel": (1, 1), "pointwise_kernel": (4096, 1)},
        ),
        "MultiHeadAttention": (
            SelfAttention(layers.MultiHeadAttention(8, 32, **attention)),
            (4, 256),
            {
                "query/kernel": (256, 256),
                "key/kernel": (256, 256),
                "value/kernel": (256, 256),
                "attention_output/kernel": (256, 256),
            },
        ),
        "GroupQueryAttention": (
            SelfAttention(layers.GroupQueryAttention(32, 8, 2, **attention)),
            (4, 256),
            {
                "query/kernel": (256, 256),
                "key/kernel": (256, 64),
                "value/kernel": (256, 64),
                "attention_output/kernel": (256, 256),
            },
        ),
        "experts": (
            layers.EinsumDense("abc,bcd->abd", (4, 64), kernel_initializer=init),
            (4, 128),
            {"kernel": (128, 64)},
        ),
        "Bidirectional LSTM": (
            layers.Bidirectional(
                layers.LSTM(16, kernel_initializer="xavier_uniform", name="lstm")
            ),
            (3, 64),
            {
                "forward_lstm/lstm_cell/kernel": (64, 64),
                "backward_lstm/lstm_cell/kernel": (64, 64),
            },
        ),
        "StackedRNNCells": (
            layers.RNN([layers.GRUCell(16, kernel_initializer=init, name=n) for n in "ab"]),
            (3, 64),
            {"a/kernel": (64, 48), "b/kernel": (16, 48)},
        ),
        "TimeDistributed": (
            layers.TimeDistributed(layers.DepthwiseConv1D(3, depthwise_initializer=init)),
            (2, 8, 512),
            {"kernel": (3, 3)},
        ),
        "SpectralNormalization": (
            layers.SpectralNormalization(
                layers.Conv2D(64, 3, groups=4, kernel_initializer=init)
            ),
            (8, 8, 64),
            {"kernel": (9 * 16, 9 * 16)},
        ),
    }


@keras.saving.register_keras_serializable("keras_glorot_tests")
class SelfAttention(layers.Layer):
    """Attention from one input, so that it fits into any kind of model."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


class Late(keras.Model):
    """A subclassed model without `build`: Keras makes its weights by calling it."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        outputs = [part(x) for part in self.parts]
        rows = [keras.ops.reshape(y, (-1, math.prod(y.shape[1:]))) for y in outputs]
        return keras.ops.mean(keras.ops.concatenate(rows, 1), axis=1, keepdims=True)


def functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def sequential(layer, shape):
    model = keras.Sequential([layer])
    model.build((None, *shape))
    return model


def sequential_called(layer, shape):
    model = keras.Sequential([layer])
    model(np.zeros((2, *shape), "float32"))
    return model


def nested(layer, shape):
    return functional(keras.Sequential([functional(layer, shape)]), shape)


def late_called(layer, shape):
    model = Late(layer)
    model(np.zeros((2, *shape), "float32"))
    return model


def late_in_functional(layer, shape):
    return functional(Late(layer), shape)


def late_evaluated(layer, shape):
    """`fit` and `evaluate` build a model while no name scope is open."""
    model = Late(layer)
    model.compile(loss="mse", run_eagerly=True)
    x = np.zeros((2, *shape), "float32")
    model.evaluate(x, np.zeros((2, 1), "float32"), verbose=0)
    return model


WAYS = [
    functional,
    sequential,
    sequential_called,
    nested,
    late_called,
    late_in_functional,
    late_evaluated,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_drawn_std_is_right(way):
    """The std asked for by the layer, in every kind of model."""
    for name, (layer, shape, kernels) in one_of_each().items():
        model = way(layer, shape)
        for suffix, pair in kernels.items():
            end = "/" + suffix
            (weight,) = (w for w in describe(model) if f"/{w.path}".endswith(end))
            assert_drawn(weight.variable, *pair)
            reported = layer_fans(model)[weight.path]
            assert reported == pair, f"{name}: {weight.path}"


def test_layers_of_a_late_model_share_one_initializer(monkeypatch):
    """Equal shapes, one object: only the variable tells whose turn it is."""
    draws = recorded(monkeypatch)
    init = GlorotNormal()
    model = Late(
        layers.Conv2D(64, 3, groups=64, kernel_initializer=init),
        layers.DepthwiseConv2D(3, depth_multiplier=1, depthwise_initializer=init),
        layers.Conv2DTranspose(1, 3, kernel_initializer=init),
    )
    model.compile("sgd", "mse")
    model.fit(np.zeros((2, 8, 8, 64)), np.zeros((2, 1)), verbose=0)
    conv, depthwise, transposed = model.parts
    final = {layer: (shape, pair) for shape, layer, pair in draws[-3:]}
    assert final == {
        conv: ((3, 3, 1, 64), (9, 9)),
        depthwise: ((3, 3, 64, 1), (9, 9)),
        transposed: ((3, 3, 1, 64), (9 * 64, 9)),
    }


def test_late_weights_that_the_symbolic_call_does_not_read(monkeypatch):
    """A head for training alone; a kernel that its parent reads for it."""
    draws = recorded(monkeypatch)

    class Tied(layers.Layer):
        """Reads the kernel of a layer that is never called."""

        def __init__(self, source):
            super().__init__()
            self.source = source

        def build(self, shape):
            self.source.build((*shape[:-1], 8))

        def call(self, x):
            return keras.ops.matmul(x, self.source.kernel[0])

    init = GlorotUniform()
    unused = layers.DepthwiseConv1D(5, depthwise_initializer=init)
    used = layers.DepthwiseConv1D(3, depthwise_initializer=init)
    source = layers.Conv1DTranspose(4, 1, kernel_initializer=init)

    class Heads(layers.Layer):
        def __init__(self):
            super().__init__()
            self.heads = [used, unused]

        def build(self, shape):
            for head in self.heads:
                head.build(shape)

        def call(self, x):
            return self.heads[0](x)

    model = Late(Heads(), Tied(source))
    model.compile("sgd", "mse", run_eagerly=True)
    model.evaluate(np.zeros((2, 8, 4)), np.zeros((2, 1)), verbose=0)
    final = {layer: pair for _, layer, pair in draws[-3:]}
    assert final == {used: (3, 3), unused: (5, 5), source: (8, 4)}


def test_variables_that_were_never_filled_mislead_nobody():
    """Models are also built without values, to look at them; Keras keeps a list."""
    init = GlorotUniform()
    with keras.StatelessScope(initialize_variables=False):
        layer = layers.DepthwiseConv2D(3, depthwise_initializer=init)
        left_over = late_in_functional(layer, (8, 8, 512))
    try:
        layer = layers.Conv2DTranspose(512, 3, kernel_initializer=init)
        layer.build((None, 8, 8, 1))  # of the same shape
        assert_drawn(layer.kernel, 9, 9 * 512)
        assert left_over.built
        assert_drawn(GlorotUniform()((9, 512)), 9, 512)
    finally:
        keras.utils.clear_session()


def test_twenty_separable_layers_keep_the_signal():
    """Stock Keras leaves 6e-16 of it."""
    inputs = x = keras.Input((16, 16, 64))
    for seed in range(20):
        x = layers.SeparableConv2D(
            64,
            3,
            padding="same",
            depthwise_initializer=GlorotUniform(seed=seed),
            pointwise_initializer=GlorotNormal(seed=seed),
        )(x)
    noise = np.random.default_rng(0).normal(size=(4, 16, 16, 64)).astype("float32")
    outputs = keras.Model(inputs, x)(noise)
    assert 0.3 < keras.ops.convert_to_numpy(outputs).std() < 3


# Built in unusual surroundings


def check_depthwise(layer, fan_in=9, fan_out=9):
    assert_drawn(layer.kernel, fan_in, fan_out)


def depthwise(**options):
    return layers.DepthwiseConv2D(3, depthwise_initializer="xavier_uniform", **options)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's")
@pytest.mark.parametrize("late", [False, True])
def test_built_inside_a_tf_function(late):
    import tensorflow as tf

    layer = depthwise()
    model = Late(layer) if late else layer
    tf.function(model)(tf.zeros((2, 8, 8, 512)))
    check_depthwise(layer)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's")
@pytest.mark.parametrize("late", [False, True])
def test_built_under_a_mirrored_strategy(late):
    import tensorflow as tf

    x = np.zeros((2, 8, 8, 512), "float32")
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        layer = depthwise()
        model = Late(layer) if late else sequential(layer, x.shape[1:])
        model.compile("sgd", "mse")
    model.evaluate(x, np.zeros((2, 1) if late else (2, 6, 6, 512)), verbose=0)
    check_depthwise(layer)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")
@pytest.mark.parametrize("late", [False, True])
def test_built_under_keras_distribution(late):
    devices = keras.distribution.list_devices()[:1]
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*kernel"] = (None, None, "model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout_map)
    )
    try:
        layer = depthwise()
        (late_called if late else sequential)(layer, (8, 8, 512))
        check_depthwise(layer)
    finally:
        keras.distribution.set_distribution(None)


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_built_with_a_dtype_policy(policy):
    layer = depthwise(dtype=policy)
    layer.build((None, 8, 8, 512))
    check_depthwise(layer)


def test_built_in_a_plain_name_scope_and_in_another_thread():
    from concurrent.futures import ThreadPoolExecutor

    layer, other = depthwise(), depthwise()
    with keras.name_scope("block"):
        layer.build((None, 8, 8, 512))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(other.build, (None, 8, 8, 512)).result()
    check_depthwise(layer)
    check_depthwise(other)


def test_outside_of_layers_the_shape_decides():
    init = GlorotUniform(seed=1)
    assert_drawn(keras.Variable(init, shape=(3, 3, 512, 1)), 9 * 512, 9)
    assert_drawn(init((3, 3, 512, 1)), 9 * 512, 9)

    class Kept(keras.metrics.Metric):
        def __init__(self):
            super().__init__()
            self.kept = self.add_variable((64, 32), init)

    class Holder(layers.Layer):
        def build(self, shape):
            self.metric = Kept()  # its scope is inside the layer's

    layer = Holder()
    layer.build((None, 4))
    assert_drawn(layer.metric.kept, 64, 32)


def test_a_layer_that_makes_variables_without_add_weight():
    class Own(layers.DepthwiseConv2D):
        def build(self, shape):
            super().build(shape)
            self.extra = keras.Variable(GlorotUniform(), shape=(64, 32), name="extra")

    layer = Own(3, depthwise_initializer=GlorotUniform())
    layer.build((None, 8, 8, 512))
    check_depthwise(layer)
    assert_drawn(layer.extra, 64, 32)


# What decides


def test_explicit_axes_win():
    init = GlorotUniform(seed=1, input_axes=[0, 1, 2], output_axes=[0, 1, 3])
    layer = layers.DepthwiseConv2D(3, depthwise_initializer=init)
    layer.build((None, 8, 8, 512))
    check_depthwise(layer, 9 * 512, 9)


AUTO_GAINS = {
    "Dense": (lambda **init: layers.Dense(512, "tanh", **init), 512, 5 / 3),
    "without activation": (lambda **init: layers.Dense(512, **init), 512, 1),
    "softmax": (lambda **init: layers.Dense(512, "softmax", **init), 512, 1),
    "Conv1D": (
        lambda **init: layers.Conv1D(64, 3, activation="relu", **init),
        64,
        math.sqrt(2),
    ),
    "LSTM": (lambda **init: layers.LSTM(64, **init), 64, 5 / 3),
    "EinsumDense": (
        lambda **init: layers.EinsumDense("abc,cd->abd", (None, 64), "relu", **init),
        64,
        math.sqrt(2),
    ),
    "MultiHeadAttention": (
        lambda **init: SelfAttention(layers.MultiHeadAttention(2, 32, **init)),
        64,
        1,
    ),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", AUTO_GAINS)
def test_auto_gain_is_that_of_the_layers_activation(kind, late):
    make, size, gain = AUTO_GAINS[kind]
    layer = make(kernel_initializer=GlorotUniform(gain="auto", seed=1))
    shape = (size,) if kind in ("Dense", "without activation", "softmax") else (5, size)
    model = (late_called if late else sequential)(layer, shape)
    for weight in describe(model):
        if weight.path.endswith("/kernel"):
            assert_drawn(weight.variable, *weight.fans, gain=gain)


@pytest.mark.parametrize("late", [False, True])
def test_auto_gain_of_separable_layers_belongs_to_the_last_kernel(late):
    init = GlorotUniform(gain="auto", seed=1)
    layer = layers.SeparableConv2D(
        1,
        1,
        activation="tanh",
        depthwise_initializer=init,
        pointwise_initializer=init,
    )
    (late_called if late else sequential)(layer, (2, 2, 4096))
    assert_drawn(layer.depthwise_kernel, 1, 1)
    assert_drawn(layer.pointwise_kernel, 4096, 1, gain=5 / 3)


# Rules of your own


class Experts(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def build(self, shape):
        init = GlorotUniform(seed=1)
        self.experts = self.add_weight(shape=(8, 64, 32), initializer=init, name="experts")
        self.gate = self.add_weight(shape=(64, 8), initializer=init, name="gate")
        self.bias = self.add_weight(shape=(32,), initializer=init, name="bias")

    def call(self, x):
        return keras.ops.einsum("bi,eio->bo", x, self.experts) + self.bias


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(glorot_layers, "_RULES", dict(glorot_layers._RULES))


@pytest.mark.usefixtures("rules")
def test_register_fans():
    @register_fans(Experts)
    def rule(layer, shape):
        assert isinstance(layer, Experts)
        return compute_fans(shape, [1], [2]) if len(shape) == 3 else None

    class MoreExperts(Experts):
        pass

    for layer in (Experts(name="e"), MoreExperts(name="e")):
        layer.build((None, 64))
        assert_drawn(layer.experts, 64, 32)
        assert_drawn(layer.gate, 64, 8)
        assert layer_fans(layer) == {"e/experts": (64, 32), "e/gate": (64, 8)}

    @register_fans(MoreExperts)
    def other(layer, shape):
        return 100, 200  # a pair is enough

    layer = MoreExperts(name="e")
    layer.build((None, 64))
    assert layer_fans(layer)["e/experts"] == Fans(100, 200)
    assert_drawn(layer.experts, 100, 200)
    assert rule(Experts(), (8, 2, 3)) == (2, 3)  # the function itself is unchanged


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("answer", [3, (1, 2, 3), (1.5, 2), "ab", (True, 2), (-1, 2)])
def test_rules_that_answer_wrongly(answer):
    register_fans(Experts)(lambda layer, shape: answer)
    with pytest.raises(TypeError, match=r"rule registered for Experts must return"):
        Experts().build((None, 64))


@pytest.mark.parametrize("layer_class", [layers.Dense(1), int, "Dense", None])
def test_only_layer_classes_have_rules(layer_class):
    with pytest.raises(TypeError, match=r"Argument `layer_class` must be a subclass"):
        register_fans(layer_class)


@pytest.mark.usefixtures("rules")
def test_subclasses_of_keras_layers_inherit_their_rules():
    class Mine(layers.DepthwiseConv2D):
        def build(self, shape):
            # Made before the kernel, and no depthwise kernel.
            self.mix = self.add_weight(
                shape=(64, 32), initializer=GlorotUniform(), name="mix"
            )
            super().build(shape)

    layer = Mine(3, depthwise_initializer=GlorotUniform(), name="mine")
    layer.build((None, 8, 8, 512))
    assert_drawn(layer.mix, 64, 32)
    assert_drawn(layer.kernel, 9, 9)
    assert layer_fans(layer) == {"mine/mix": (64, 32), "mine/kernel": (9, 9)}


# layer_fans


def test_layer_fans_of_a_nested_model():
    def block(name):
        inputs = keras.Input((8, 8, 4))
        x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="conv")(inputs)
        return keras.Model(inputs, x, name=name)

    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((8, 8, 4))
    outputs = shared(layers.Conv2D(4, 3, groups=2, name="grouped")(inputs))
    x = layers.Concatenate(1)([block("one")(inputs), block("two")(shared(inputs))])
    model = keras.Model(inputs, [x, outputs])
    found = layer_fans(model)
    # Keras gives both blocks' kernels the same path, "conv/kernel".
    assert sorted(found) == [
        "grouped/kernel",
        "one/conv/kernel",
        "shared/kernel",
        "two/conv/kernel",
    ]
    assert found["one/conv/kernel"] == found["two/conv/kernel"] == (9, 18)
    assert found["grouped/kernel"] == (18, 18)
    assert found["shared/kernel"] == (4, 4)


def test_layer_fans_of_a_trained_model_leaves_out_its_optimizer():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(2, name="last")], name="model"
    )
    model.compile("adam", "mse", metrics=["mae"])
    model.train_on_batch(np.zeros((2, 3)), np.zeros((2, 2)))
    assert layer_fans(model) == {"last/kernel": (3, 2)}


def test_layer_fans_of_embeddings_and_vectors():
    layer = layers.Embedding(100, 8, name="words")
    layer.build()
    assert layer_fans(layer) == {"words/embeddings": (100, 8)}
    layer = layers.LayerNormalization()
    layer.build((None, 8))
    assert layer_fans(layer) == {}


def make_quantizable(name):
    if name == "Dense":
        return layers.Dense(7, name="layer"), (None, 16), (16, 7)
    layer = layers.EinsumDense("abc,cde->abde", (None, 2, 5), name="layer")
    return layer, (None, 3, 16), (16, 10)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("name", ["Dense", "EinsumDense"])
def test_quantized_kernels_count_as_what_they_stand_for(name, mode):
    layer, shape, right = make_quantizable(name)
    layer.build(shape)
    try:
        layer.quantize(mode)
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"not in this version of Keras: {error}")
    assert layer_fans(layer)["layer/kernel"] == right


def test_lora_factors_count_for_themselves():
    dense, shape, right = make_quantizable("Dense")
    dense.build(shape)
    dense.enable_lora(4, a_initializer=GlorotUniform(seed=1))
    assert layer_fans(dense) == {
        "layer/kernel": right,
        "layer/lora_kernel_a": (16, 4),
        "layer/lora_kernel_b": (4, 7),
    }
    einsum, shape, right = make_quantizable("EinsumDense")
    einsum.build(shape)
    einsum.enable_lora(3)
    assert layer_fans(einsum) == {
        "layer/kernel": right,
        "layer/lora_kernel_a": (16, 6),
        "layer/lora_kernel_b": (3, 5),
    }
    conv = layers.Conv2D(6, 3, groups=2, name="layer")
    conv.build((None, 8, 8, 64))
    conv.enable_lora(4, a_initializer=GlorotUniform(seed=1))
    assert layer_fans(conv) == {
        "layer/kernel": (9 * 32, 9 * 3),
        "layer/lora_kernel_a": (9 * 32, 9 * 4),
        "layer/lora_kernel_b": (4, 6),
    }
    assert_drawn(conv.lora_kernel_a, 9 * 32, 9 * 4)


def test_layer_fans_says_what_it_needs():
    with pytest.raises(TypeError, match=r"Argument `layer` must be a Keras layer"):
        layer_fans("dense")
    with pytest.raises(ValueError, match=r"Argument `layer` must be built"):
        layer_fans(layers.Dense(2))


# Keras's internals


def test_keras_has_the_names_that_the_bridge_relies_on():
    keras_bridge._is_keras_as_expected.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keras_bridge._is_keras_as_expected()


def test_without_these_names_the_shape_decides_and_one_warning_says_so(monkeypatch):
    keras_bridge._is_keras_as_expected.cache_clear()
    monkeypatch.setattr(keras_bridge, "get_global_attribute", lambda name: None)
    layer = depthwise(name="layer")
    try:
        with pytest.warns(UserWarning, match=r"fan_in and fan_out from the weight's sh"):
            layer.build((None, 8, 8, 512))
        check_depthwise(layer, 9 * 512, 9)
        depthwise().build((None, 8, 8, 4))  # a second warning would be an error
        assert layer_fans(layer) == {"layer/kernel": (9 * 512, 9)}
    finally:
        keras_bridge._is_keras_as_expected.cache_clear()


def test_nothing_keeps_late_models_alive():
    import gc
    import weakref

    model = late_called(depthwise(), (4, 4, 2))
    reference = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert reference() is None
