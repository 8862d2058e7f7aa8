"""What feeds each kernel and what it feeds: by the graph, or by the calls of one pass."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import Late

from keras_glorot._models.kernels import flow_of_calls, flow_of_model
from keras_glorot._models.passes import Batch, record
from keras_glorot._models.survey import Survey


def flow_of(model, *shape):
    x = np.random.default_rng(0).normal(size=shape or (4, *model.input_shape[1:]))
    return flow_of_model(Survey(model), Batch.check(x.astype("float32")), True)


def sources(flow):
    """By name of the layer: what feeds it, and through what."""
    return {
        kernel.layer.name: {
            flow.kernels[i].layer.name: set(kinds) for i, kinds in kernel.sources.items()
        }
        for kernel in flow.kernels
    }


def layers_that(flow, test):
    return {kernel.layer.name for kernel in flow.kernels if test(kernel.layer)}


class Block(layers.Layer):
    """A residual block with a bare sum."""

    def __init__(self, units, name):
        super().__init__(name=name)
        self.wide = layers.Dense(2 * units, "relu", name=f"{name}_wide")
        self.narrow = layers.Dense(units, name=f"{name}_narrow")

    def call(self, x):
        return x + self.narrow(self.wide(x))


class OnValues(layers.Layer):
    """Can't be called without values."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(8, "sigmoid", name="inner")

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            raise TypeError("no values")
        return self.inner(x)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 8)


def test_through_what_a_kernel_feeds_the_next():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Dense(5, "tanh", name="hidden")(layers.Flatten()(x))
    model = keras.Model(inputs, layers.Dense(2, "softmax", name="last")(x))
    flow = flow_of(model)
    assert sources(flow) == {
        "conv": {},
        "hidden": {"conv": {"normalization", "pooling"}},
        "last": {"hidden": set()},
    }
    assert layers_that(flow, flow.is_head) == {"last"}
    assert layers_that(flow, flow.feeds_gate) == {"last"}


def test_every_kernel_before_an_output_is_a_head():
    """As in a variational autoencoder."""
    inputs = keras.Input((8,))
    x = layers.Dense(6, "relu", name="encoder")(inputs)
    mean = layers.Dense(2, name="mean")(x)
    log_var = layers.Dense(2, name="log_var")(x)
    z = layers.Add()([mean, layers.Rescaling(0.5)(log_var)])
    outputs = [mean, log_var, layers.Dense(8, name="decoder")(z)]
    flow = flow_of(keras.Model(inputs, outputs))
    assert layers_that(flow, flow.is_head) == {"mean", "log_var", "decoder"}
    assert sources(flow)["decoder"] == {"mean": {"addition"}, "log_var": {"addition"}}


def test_queries_and_keys_feed_a_softmax_whatever_their_names():
    class Attention(layers.Layer):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (layers.Dense(8, name=name) for name in "abc")

        def call(self, x):
            scores = ops.matmul(self.a(x), ops.swapaxes(self.b(x), 1, 2))
            return ops.matmul(ops.softmax(scores / 3.0), self.c(x))

    inputs = keras.Input((5, 8))
    x = Attention()(inputs)
    x = layers.MultiHeadAttention(2, 4, name="own")(x, x)
    q, v, k = (layers.Dense(8, name=name)(x) for name in "qvk")
    x = layers.Attention()([q, v, k])
    flow = flow_of(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    assert layers_that(flow, flow.feeds_gate) == {"a", "b", "query", "key", "q", "k"}
    assert sources(flow)["attention_output"]["value"] == set()


def test_a_gate_is_one_and_an_activation_made_of_a_sigmoid_is_none():
    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="silu")(inputs)
    x = x * ops.sigmoid(1.702 * x)
    gate = layers.Dense(8, name="gate")(layers.GlobalAveragePooling1D()(x))
    x = x * ops.expand_dims(ops.sigmoid(gate), 1)
    flow = flow_of(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    assert layers_that(flow, flow.feeds_gate) == {"gate"}


def test_bare_sums_and_the_ends_of_their_branches():
    inputs = keras.Input((8,))
    x = Block(8, "two")(Block(8, "one")(inputs))
    flow = flow_of(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    assert [layer.name for layer in flow.ends()] == ["one_narrow", "two_narrow"]


def test_the_branch_is_the_term_with_more_kernels_before_it():
    inputs = keras.Input((8,))
    x = layers.Dense(8, name="inner")(inputs)
    branch = layers.Dense(8, name="end")(layers.Dense(8, name="middle")(x))
    shortcut = layers.Dense(8, name="shortcut")(x)
    x = layers.Add()([branch, shortcut])
    x = layers.Add()([x, layers.BatchNormalization()(layers.Dense(8, name="own")(x))])
    flow = flow_of(keras.Model(inputs, layers.Dense(3, name="last")(x)))
    assert [[flow.kernels[i].layer.name for i in ends] for ends in flow.sums] == [
        ["end"],
        [],  # its normalization gives it a scale
    ]


@pytest.mark.parametrize("added", [True, False])
def test_a_learned_table_that_is_added_to_the_first_kernel(added):
    class Positions(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=shape[1:], name="table")

        def call(self, x):
            return x + self.table if added else x

    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="next")(
        Positions(name="positions")(layers.Dense(8, name="stem")(inputs))
    )
    flow = flow_of(keras.Model(inputs, x))
    assert getattr(flow.stem, "name", None) == ("stem" if added else None)


class Tied(layers.Layer):
    """Has one kernel of its own, and one of another layer."""

    def __init__(self, other):
        super().__init__(name="tied")
        self.other = other

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 8), name="kernel")

    def call(self, x):
        x = ops.relu(ops.matmul(x, self.kernel))
        return ops.matmul(x, ops.transpose(self.other.kernel))


def test_kernels_that_a_layer_multiplies_by_itself():
    """Also one that can't be told: no other kernel behind it is taken for its input."""
    one = layers.Dense(8, name="one")
    inputs = keras.Input((8,))
    x = layers.Dense(2, name="last")(Tied(one)(layers.Dense(8, name="two")(one(inputs))))
    flow = flow_of(keras.Model(inputs, x))
    names = [getattr(kernel.layer, "name", None) for kernel in flow.kernels]
    assert names == ["one", "two", "tied", None, "last"]
    assert [dict(kernel.sources) for kernel in flow.kernels] == [
        {},
        {0: set()},
        {1: set()},
        {2: set()},
        {3: set()},
    ]


def test_each_call_of_a_shared_layer_has_its_row():
    shared = layers.Dense(8, name="shared")
    a, b = keras.Input((8,)), keras.Input((8,))
    last = layers.Dense(2, name="last")
    x = last(layers.Concatenate()([shared(a), shared(shared(b))]))
    model = keras.Model([a, b], x)
    batch = Batch.check([np.ones((4, 8), "float32")] * 2)
    calls = record(Survey(model), batch).calls
    flow = flow_of_calls(Survey(model), batch, calls)
    rows = flow.rows([call.layer for call in calls[:-1]])
    assert {calls[row].layer for row in rows} == {shared, last}
    assert len(set(rows)) == 4
    for kernel, row in zip(flow.kernels, rows, strict=True):
        if kernel.layer is shared and kernel.sources:  # after the other call on `b`
            assert row > min(row for row in rows if calls[row].layer is shared)


def test_threads_may_look_at_one_model():
    inputs = keras.Input((8,))
    x = Block(8, "two")(Block(8, "one")(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="last")(x))
    with ThreadPoolExecutor(4) as pool:
        flows = list(pool.map(lambda _: flow_of(model), range(40)))
    assert {len(flow.sums) for flow in flows} == {2}


def test_a_model_that_needs_values_is_known_by_its_calls():
    model = Late(layers.Dense(8, "relu", name="first"), OnValues())
    model(np.zeros((4, 8), "float32"))
    flow = flow_of(model, 4, 8)
    assert layers_that(flow, flow.is_head) == {"first", "inner"}
    assert layers_that(flow, flow.feeds_gate) == {"inner"}
