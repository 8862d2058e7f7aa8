"""Rules that count connections, built in and registered, and `layer_fans`."""

import inspect
import itertools
import math
from collections import Counter
from typing import Any

import keras
import numpy as np
import pytest
from drawn import assert_drawn

from keras_glorot import (
    Fans,
    GlorotNormal,
    GlorotUniform,
    audit,
    compute_fans,
    initialize,
    layer_fans,
    register_fans,
)
from keras_glorot import layer_rules as glorot_layers

layers: Any = keras.layers  # Keras declares many arguments as `str`
BACKEND = keras.backend.backend()


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


@pytest.mark.usefixtures("rules")
def test_a_rule_registered_for_a_class_of_keras_is_the_users():
    register_fans(layers.Dense)(lambda layer, shape: (3, 5))
    register_fans(layers.Conv1D)(lambda layer, shape: (3, 5))
    init = GlorotUniform(input_axes=[-2], output_axes=[-1])
    for layer in (
        layers.Dense(4, kernel_initializer=init, name="layer"),
        layers.Conv1D(4, 3, kernel_initializer=init, name="layer"),
    ):
        layer.build((None, 8, 4))
        assert layer_fans(layer) == {"layer/kernel": (3, 5)}


@pytest.mark.usefixtures("rules")
def test_a_rule_registered_for_separable_layers_is_asked_for_both_kernels():
    register_fans(layers.SeparableConv1D)(lambda layer, shape: (3, 5))
    layer = layers.SeparableConv1D(4, 3)
    layer.build((None, 8, 4))
    assert set(layer_fans(layer).values()) == {(3, 5)}


# Axes that the layer's initializer declares


def declaring_initializers(**axes):
    """Ours, and Keras's since 3.15."""
    yield GlorotUniform(seed=1, **axes)
    yield GlorotNormal(seed=1, **axes)
    if "input_axes" in inspect.signature(keras.initializers.GlorotUniform).parameters:
        yield keras.initializers.GlorotUniform(seed=1, **axes)


class Declaring(layers.Layer):
    """Its initializer is an argument for kernels by name, or found by rebuilding alone."""

    def __init__(self, shape, initializer, name):
        super().__init__(name="layer")
        self.shape, self.weight_name = shape, name
        setattr(self, {"kernel": "kernel_initializer"}.get(name, "start"), initializer)
        self.initializer = initializer

    def build(self, shape):
        self.w = self.add_weight(
            shape=self.shape, initializer=self.initializer, name=self.weight_name
        )

    def call(self, x):
        return x


def generated_contraction(rng):
    """A kernel's shape and axes, and its fans, counted.

    Counted one input after the other, with a kernel of ones: nothing here multiplies sizes.
    """
    letters = iter("abcdefgh")
    counts = {"batch": (0, 1), "input": (1, 2), "output": (0, 2), "window": (0, 2)}
    roles = {
        role: [next(letters) for _ in range(rng.integers(least, most + 1))]
        for role, (least, most) in counts.items()
    }
    kernel = [
        str(letter) for letter in rng.permutation([*itertools.chain(*roles.values())])
    ]
    sizes = {letter: int(rng.integers(2, 5)) for letter in kernel}
    axes = {
        f"{role}_axes": [
            axis - len(kernel) if rng.random() < 0.5 else axis
            for axis, letter in enumerate(kernel)
            if letter in roles[role] + roles["window"]
        ]
        for role in ("input", "output")
    }
    shape = tuple(sizes[letter] for letter in kernel)
    # Windows slide: an output position sums over those of its inputs.
    inputs = roles["batch"] + roles["input"]
    outputs = roles["batch"] + roles["output"]
    window = tuple(sizes[letter] for letter in roles["window"])
    reach = tuple(2 * size - 1 for size in window)
    x_shape = (*reach, *(sizes[letter] for letter in inputs))
    positions = "".join("xyz"[: len(window)])
    left = "".join([positions, *inputs, *roles["window"]])
    equation = f"{left},{''.join(kernel)}->{positions}{''.join(outputs)}"
    rows, columns = Counter(), 0
    for index in np.ndindex(x_shape):
        x = np.zeros(x_shape)
        x[index] = 1
        for axis, size in enumerate(window):
            x = np.lib.stride_tricks.sliding_window_view(x, size, axis)
        reached = np.flatnonzero(np.einsum(equation, x, np.ones(shape)))
        rows.update(reached.tolist())
        columns = max(columns, reached.size)
    return shape, axes, (max(rows.values()), columns)


@pytest.mark.parametrize(
    "number",
    [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 25))],
)
def test_declared_axes_are_the_fans(number):
    shape, axes, counted = generated_contraction(np.random.default_rng(number))
    std = math.sqrt(2 / sum(counted))
    for name in ("kernel", "experts"):
        for init in declaring_initializers(**axes):
            layer = Declaring(shape, init, name)
            layer.build((None, 1))
            (fans,) = layer_fans(layer).values()
            assert fans == counted
            (row,) = audit(layer)
            assert row["expected_std"] == pytest.approx(std)
            assert not audit(layer).findings
            for other in ("xavier_uniform", "glorot_normal"):
                (row,) = initialize(layer, other, seed=number)
                assert (row["fan_in"], row["fan_out"]) == counted
                assert row["std"] == pytest.approx(std)
                assert not audit(layer).findings


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
    model.compile("adam", "mse", run_eagerly=True, metrics=["mae"])
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
