"""Whose weight is being drawn: found however and wherever Keras builds a layer."""

import subprocess
import sys
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from drawn import assert_drawn
from models import Late, late_called, late_in_functional, sequential

import keras_glorot
from keras_glorot import GlorotNormal, GlorotUniform, layer_fans
from keras_glorot import layer_rules as glorot_layers
from keras_glorot._keras import call_site

layers: Any = keras.layers  # Keras declares many arguments as `str`
BACKEND = keras.backend.backend()


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


def test_layers_of_a_late_model_share_one_initializer(monkeypatch):
    """Equal shapes, one object: only the variable tells whose turn it is."""
    draws = recorded(monkeypatch)
    init = GlorotNormal()
    model = Late(
        layers.Conv2D(64, 3, groups=64, kernel_initializer=init),
        layers.DepthwiseConv2D(3, depth_multiplier=1, depthwise_initializer=init),
        layers.Conv2DTranspose(1, 3, kernel_initializer=init),
    )
    model.compile("sgd", "mse", run_eagerly=True)
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


# Keras's internals


def test_keras_has_the_names_that_a_call_site_needs():
    call_site._is_keras_as_expected.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call_site._is_keras_as_expected()


FLOATX = ["float16", "bfloat16", "float64"]


@pytest.mark.parametrize("floatx", FLOATX)
def test_keras_has_these_names_whatever_floatx(floatx):
    keras.config.set_floatx(floatx)
    try:
        test_keras_has_the_names_that_a_call_site_needs()
    finally:
        keras.config.set_floatx("float32")


@pytest.mark.slow
@pytest.mark.parametrize("floatx", FLOATX)
def test_fans_of_a_process_with_another_floatx(floatx):
    code = (
        f"import keras; keras.config.set_floatx({floatx!r}); import keras_glorot\n"
        "layer = keras.layers.DepthwiseConv2D(\n"
        "    3, depthwise_initializer='xavier_uniform', name='layer'\n"
        ")\n"
        "layer.build((None, 8, 8, 64))\n"
        "print(keras_glorot.layer_fans(layer))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "can't tell" not in done.stderr
    assert done.stdout == "{'layer/kernel': Fans(fan_in=9, fan_out=9)}\n"


def test_without_these_names_the_shape_decides_and_one_warning_says_so(monkeypatch):
    call_site._is_keras_as_expected.cache_clear()
    monkeypatch.setattr(call_site, "get_global_attribute", lambda name: None)
    layer = depthwise(name="layer")
    try:
        with pytest.warns(UserWarning, match=r"fan_in and fan_out from the weight's sh"):
            layer.build((None, 8, 8, 512))
        check_depthwise(layer, 9 * 512, 9)
        depthwise().build((None, 8, 8, 4))  # a second warning would be an error
        assert layer_fans(layer) == {"layer/kernel": (9 * 512, 9)}
    finally:
        call_site._is_keras_as_expected.cache_clear()


def test_nothing_keeps_late_models_alive():
    import gc
    import weakref

    model = late_called(depthwise(), (4, 4, 2))
    reference = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert reference() is None
