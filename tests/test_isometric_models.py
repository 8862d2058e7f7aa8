"""Isometric starts of models of many kinds: what the column `pairs` says is true.

The truth is found by calls alone. Where a kernel makes pairs, the next kernel sees
f(z) - f(-z), which changes its sign with the kernel. That holds for every activation, and
for a maximum of several positions. For a unit without a partner it does not.
"""

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_glorot import audit, initialize, propagate
from keras_glorot._keras.tree import Tree
from keras_glorot._models.survey import Survey
from keras_glorot.layer_rules import is_normalization

KERNELS = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def ids(*shape):
    return np.random.default_rng(0).integers(0, 20, shape)


def unet():
    x = inputs = keras.Input((8, 8, 3))
    skips = []
    for filters in (6, 8):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    for filters, skip in zip((8, 6), skips[::-1], strict=True):
        x = layers.Conv2DTranspose(filters, 2, 2, activation="gelu")(x)
        x = layers.Concatenate()([x, skip])
        x = layers.Conv2D(filters, 3, padding="same", activation="elu")(x)
    return keras.Model(inputs, layers.Conv2D(2, 1)(x)), noise(4, 8, 8, 3), 6


def two_inputs():
    a, b = keras.Input((10,)), keras.Input((8, 8, 3))
    y = layers.Dense(16, "relu")(a)
    z = layers.Flatten()(layers.Conv2D(8, 3, strides=2, activation="relu")(b))
    x = layers.Concatenate()([y, z])
    for _ in range(3):
        x = layers.Dense(24, "gelu")(x)
    model = keras.Model([a, b], [layers.Dense(3)(x), layers.Dense(1, "sigmoid")(x)])
    return model, [noise(4, 10), noise(4, 8, 8, 3)], 5


def siamese():
    half = [layers.Dense(16, "relu") for _ in range(3)]
    half = keras.Sequential([keras.Input((12,)), *half])
    a, b = keras.Input((12,)), keras.Input((12,))
    x = layers.Dense(8, "relu")(layers.Concatenate()([half(a), half(b)]))
    return keras.Model([a, b], layers.Dense(2)(x)), [noise(4, 12), 1 + noise(4, 12)], 4


def autoencoder():
    x = inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, 2, "same", activation="relu")(x)
    x = layers.Dense(64, "relu")(layers.Flatten()(x))
    x = layers.Reshape((4, 4, 4))(layers.Dense(64, "relu")(x))
    x = layers.Conv2DTranspose(8, 3, 2, "same", activation="relu")(x)
    return keras.Model(inputs, layers.Conv2D(4, 3)(x)), noise(4, 8, 8, 4), 4


class Experts(keras.Model):
    """A gate, and three small models."""

    def __init__(self):
        super().__init__()
        self.experts = [
            keras.Sequential([layers.Dense(32, "relu"), layers.Dense(16)]) for _ in range(3)
        ]
        self.gate, self.head = layers.Dense(3, "softmax"), layers.Dense(4)

    def call(self, x):
        gates = self.gate(x)
        parts = [each(x) * gates[:, i : i + 1] for i, each in enumerate(self.experts)]
        return self.head(sum(parts) + x)


def experts():
    model, x = Experts(), noise(4, 16)
    model(x)
    return model, x, 3


def recurrent():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8)(inputs)
    x = layers.Bidirectional(layers.LSTM(8))(x)
    x = layers.Dense(16, "relu")(layers.Dense(16, "silu")(x))
    return keras.Model(inputs, layers.Dense(2)(x)), ids(4, 6), 2


def words():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.SpatialDropout1D(0.2)(layers.Embedding(20, 8)(inputs))
    x = layers.Conv1D(16, 3, padding="causal", activation="relu")(x)
    x = layers.Dense(8, "relu")(layers.GlobalMaxPooling1D()(x))
    return keras.Model(inputs, layers.Dense(2, "softmax")(x)), ids(4, 6), 2


def nested():
    def block():
        parts = [layers.Dense(12), layers.ReLU(), layers.Dense(12, "relu")]
        return keras.Sequential([keras.Input((12,)), *parts])

    inner, inputs = block(), keras.Input((12,))
    outer = keras.Model(inputs, block()(inner(inner(inputs))))
    inputs = keras.Input((12,))
    return keras.Model(inputs, layers.Dense(3)(outer(inputs))), noise(4, 12), 3


def mixer():
    x = inputs = keras.Input((6, 8))
    for _ in range(2):
        y = layers.Dense(12, "gelu")(layers.Permute((2, 1))(x))
        x = layers.Add()([x, layers.Permute((2, 1))(layers.Dense(6)(y))])
        x = layers.Add()([x, layers.Dense(8)(layers.Dense(16, "gelu")(x))])
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))), noise(4, 6, 8), 4


def wavenet():
    inputs = keras.Input((16, 4))
    x, skips = layers.Conv1D(8, 2, padding="causal")(inputs), []
    for rate in (1, 2, 4):
        options = {"padding": "causal", "dilation_rate": rate}
        y = layers.Conv1D(8, 2, activation="tanh", **options)(x)
        y *= layers.Conv1D(8, 2, activation="sigmoid", **options)(x)
        skips.append(layers.Conv1D(8, 1)(y))
        x = layers.Add()([x, layers.Conv1D(8, 1)(y)])
    x = layers.Conv1D(8, 1, activation="relu")(layers.ReLU()(layers.Add()(skips)))
    return keras.Model(inputs, layers.Conv1D(4, 1)(x)), noise(4, 16, 4), 1


def volumes():
    parts = [
        layers.Conv3DTranspose(8, 3, 2, padding="same", activation="relu"),
        layers.Conv3D(8, 3, activation="silu"),
        layers.Conv3DTranspose(4, 2, activation="gelu"),
        layers.Conv3D(2, 1),
    ]
    return keras.Sequential([keras.Input((3, 3, 3, 4)), *parts]), noise(4, 3, 3, 3, 4), 3


class Operations(keras.Model):
    """What others do by layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(16), layers.Dense(16)
        self.third, self.last = layers.Dense(8), layers.Dense(3)

    def call(self, x):
        x = ops.concatenate([ops.relu(self.first(x)), ops.leaky_relu(-self.second(x))])
        x = ops.swapaxes(ops.reshape(x, (-1, 4, 8)), 1, 2)
        return self.last(ops.silu(self.third(ops.reshape(x, (-1, 32)) / 2)))


def operations():
    model, x = Operations(), noise(4, 10)
    model(x)
    return model, x, 1


class Squeeze(layers.Layer):
    """Squeeze and excitation."""

    def __init__(self, filters):
        super().__init__()
        self.pool = layers.GlobalAveragePooling2D(keepdims=True)
        self.down = layers.Conv2D(filters // 2, 1, activation="relu")
        self.up = layers.Conv2D(filters, 1, activation="sigmoid")

    def build(self, shape):
        self.down.build((None, 1, 1, shape[-1]))
        self.up.build((None, 1, 1, self.down.filters))

    def call(self, x):
        return x * self.up(self.down(self.pool(x)))


def gated_images():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    for _ in range(3):
        y = Squeeze(8)(layers.Conv2D(8, 3, padding="same", activation="relu")(x))
        x -= layers.Conv2D(8, 1)(y)
    x = ops.mean(layers.ReLU()(layers.Conv2D(6, 1)(x)), axis=(1, 2))
    return keras.Model(inputs, layers.Dense(3)(x)), noise(4, 8, 8, 3), 4


def loops():
    parts = [
        layers.TimeDistributed(layers.Conv2D(8, 3, activation="relu")),
        layers.TimeDistributed(layers.Flatten()),
        layers.Dense(12, "relu"),
        layers.Conv1D(8, 3, activation="gelu"),
        layers.Bidirectional(layers.GRU(6, return_sequences=True)),
        layers.Dense(8, "relu"),
        layers.SimpleRNN(4),
        layers.Dense(2),
    ]
    return keras.Sequential([keras.Input((5, 6, 6, 2)), *parts]), noise(4, 5, 6, 6, 2), 1


def groups():
    x = inputs = keras.Input((8, 8, 4))
    for _ in range(3):
        x = layers.Conv2D(16, 3, padding="same", groups=2)(x)
        x = layers.ReLU()(layers.GroupNormalization(4)(x))
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(8, 1, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(4)(x)), noise(4, 8, 8, 4), 1


def inception():
    x = inputs = keras.Input((8, 8, 4))
    for _ in range(2):
        options = {"padding": "same", "activation": "relu"}
        branches = [
            layers.Conv2D(6, 1, **options)(x),
            layers.Conv2D(6, 3, **options)(layers.Conv2D(4, 1, **options)(x)),
            layers.Conv2D(4, 1, **options)(layers.AveragePooling2D(3, 1, "same")(x)),
        ]
        x = layers.Concatenate()(branches)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))), noise(4, 8, 8, 4), 8


def highway():
    inputs = keras.Input((16,))
    x = layers.Dense(16)(inputs)
    for _ in range(3):
        closed = keras.initializers.Constant(-2.0)
        gate = layers.Dense(16, "sigmoid", bias_initializer=closed)(x)
        x = gate * layers.Dense(16, "relu")(x) + (1 - gate) * x
    x = layers.Maximum()([layers.Dense(8)(x), layers.Dense(8)(x)])
    return keras.Model(inputs, layers.Dense(2)(x)), noise(4, 16), 0


def pixels():
    """Units become positions."""
    x = inputs = keras.Input((6, 6, 3))
    for _ in range(2):
        x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    x = ops.transpose(ops.reshape(x, (-1, 6, 6, 4, 2, 2)), (0, 1, 4, 2, 5, 3))
    x = layers.Conv2D(3, 3, padding="same")(ops.reshape(x, (-1, 12, 12, 4)))
    return keras.Model(inputs, x), noise(4, 6, 6, 3), 1


def exits():
    """Each layer has a head of its own; the first kernel is normalized in each call."""
    x = inputs = keras.Input((10,))
    x = layers.SpectralNormalization(layers.Dense(16, "relu"))(x)
    heads = [layers.Dense(3)(x)]
    for _ in range(3):
        x = layers.Dense(16, "relu")(layers.Dropout(0.1)(x))
        heads.append(layers.Dense(3, "softmax")(x))
    return keras.Model(inputs, heads), noise(4, 10), 4


MODELS = [
    unet,
    two_inputs,
    siamese,
    autoencoder,
    experts,
    recurrent,
    words,
    nested,
    mixer,
    wavenet,
    volumes,
    operations,
    gated_images,
    loops,
    groups,
    inception,
    highway,
    pixels,
    exits,
]
TEXT = {"vocabulary_size": 20, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
BERT = {**TEXT, "num_heads": 2, "max_sequence_length": 16}
LLAMA = {**TEXT, "num_query_heads": 4, "num_key_value_heads": 2}
IMAGE = {"image_shape": (32, 32, 3)}
# The arguments of KerasHub's models, and how many kernels make pairs.
HUB = {
    "BertBackbone": (BERT, 2),
    "GPT2Backbone": (BERT, 2),
    "BartBackbone": (BERT, 4),
    "FNetBackbone": ({**TEXT, "max_sequence_length": 16}, 2),
    "LlamaBackbone": (LLAMA, 0),
    "MixtralBackbone": ({**LLAMA, "num_experts": 4, "top_k": 2}, 0),
    "ViTBackbone": (
        {**IMAGE, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16}
        | {"mlp_dim": 32},
        2,
    ),
    "AlbertBackbone": ({**BERT, "embedding_dim": 8}, 1),
    "GPTNeoXBackbone": (BERT, 2),
    "DebertaV3Backbone": (BERT, 2),
    "XLNetBackbone": ({**TEXT, "num_heads": 2}, 2),
    "OPTBackbone": (BERT, 2),
    "BloomBackbone": ({**TEXT, "num_heads": 2}, 2),
    "FalconBackbone": ({**TEXT, "num_attention_heads": 2}, 2),
    "Phi3Backbone": (LLAMA, 0),
    "WhisperBackbone": (
        {**TEXT, "num_heads": 2, "num_mels": 8, "max_encoder_sequence_length": 16}
        | {"max_decoder_sequence_length": 16},
        4,
    ),
    "DenseNetBackbone": ({**IMAGE, "stackwise_num_repeats": [2, 2], "growth_rate": 8}, 0),
    "VGGBackbone": (
        {**IMAGE, "stackwise_num_repeats": [1, 2], "stackwise_num_filters": [8, 16]},
        2,
    ),
}


def hub(name):
    arguments, count = HUB[name]
    keras_hub = pytest.importorskip("keras_hub")
    model = getattr(keras_hub.models, name)(**arguments)
    if not isinstance(model.input, dict):
        return model, noise(4, 32, 32, 3), count
    x = {key: np.ones((4, 12), "int32") for key in model.input}
    x |= {key: ids(4, 12) for key in x if key.endswith("token_ids")}
    x |= {key: 0 * x[key] for key in x if "segment" in key}
    x |= {key: noise(4, 12, 8) for key in x if "features" in key}
    return model, x, count


def before_activations(model, x):
    """The layer, and its output without its activation, of each call with a kernel."""
    found = []

    def watched(layer, call):
        def wrapped(*args, **kwargs):
            activation = layer.activation
            layer.activation = keras.activations.linear
            try:
                output = call(*args, **kwargs)
            finally:
                layer.activation = activation
            found.append((layer, ops.convert_to_numpy(output)))
            return activation(output)

        return wrapped

    kinds = [layer for layer in Tree(model).layers if isinstance(layer, KERNELS)]
    for layer in kinds:
        attributes: Any = vars(layer)
        attributes["call"] = watched(layer, layer.call)
    try:
        model(x, training=False)
    finally:
        for layer in kinds:
            attributes = vars(layer)
            del attributes["call"]
    return found


def is_odd(model, x, weight):
    """Whether the output of the next kernel, but for a constant, has this one's sign."""
    kernel = ops.convert_to_numpy(weight.variable)
    outputs = []
    for factor in (1, -1, 0):
        weight.variable.assign(factor * kernel)
        outputs.append(before_activations(model, x))
    weight.variable.assign(kernel)
    for (layer, same), (_, opposite), (_, none) in zip(*outputs, strict=True):
        if layer is not weight.owner and not np.array_equal(same, none):
            return np.abs(same + opposite - 2 * none).max() < 1e-3 * np.ptp(same - none)
    return False


def ends(model, x):
    """The last std over the first, and the same of the gradient on its way back."""
    rows = [row for row in propagate(model, x) if row["std"] and row["gradient_std"]]
    first, last = rows[0], rows[-1]
    return last["std"] / first["std"], first["gradient_std"] / last["gradient_std"]


def check(model, x, count):
    initialize(model, seed=0)
    before = ends(model, x)
    rows = initialize(model, "isometric", seed=0).rows
    pairs = {row["path"]: row["pairs"] for row in rows if row["pairs"]}
    assert list(pairs.values()).count("yes") == count
    for weight in Survey(model).weights:
        if pairs.get(weight.path) == "yes":
            assert is_odd(model, x, weight), weight.path
    assert not [each for each in audit(model).findings if each.severity == "warning"]
    # No further from 1 than twice as far as after `initialize(model)`.
    worst = max(abs(math.log(end)) for end in before)
    for end in ends(model, x):
        assert abs(math.log(end)) < worst + math.log(2)


@pytest.mark.parametrize("make", MODELS)
def test_pairs_are_where_the_table_says(make):
    check(*make())


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_pairs_in_keras_hub(name):
    check(*hub(name))


class Nothing(layers.Layer):
    """In place of a normalization layer."""

    def call(self, x, mask=None):
        return x


@pytest.mark.slow
def test_pairs_in_mobilenet_without_normalization():
    def build(layer):
        if is_normalization(layer):
            return Nothing(name=layer.name)
        return type(layer).from_config(layer.get_config())

    model = keras.applications.MobileNetV2(
        weights=None, input_shape=(32, 32, 3), classes=10
    )
    model = keras.models.clone_model(model, clone_function=build)
    check(model, noise(2, 32, 32, 3), 18)
