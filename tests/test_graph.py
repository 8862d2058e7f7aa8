"""The graph of a model: each step between inputs and outputs, and no trace left."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import WITH_STATE, Late, attention, convnet, gru, nested_twice

from keras_glorot._keras.graph import trace
from keras_glorot._keras.tree import Tree


def trace_of(model, inputs=None):
    return trace(Tree(model), inputs)


def names(graph):
    """The kinds of steps, without those that keep every value."""
    kinds = [type(step.operation).__name__ for step in graph.steps]
    return [kind for kind in kinds if kind not in ("ConvertToTensor", "Cast")]


@keras.saving.register_keras_serializable("keras_glorot_tests")
class Block(layers.Layer):
    """A residual block with a bare sum, and a shape that is asked for."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization()
        self.wide = layers.Dense(2 * units, "relu")
        self.narrow = layers.Dense(units)

    def call(self, x):
        rows = ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1]))
        return rows + self.narrow(self.wide(self.norm(rows)))


class OwnKernel(layers.Layer):
    """Has no sublayers, and multiplies by itself."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        return ops.relu(ops.matmul(x, self.kernel))


class OnTensors(layers.Layer):
    """Takes tensors of the backend alone, as a layer does that calls it directly."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(4)

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            raise TypeError("not a tensor of the backend")
        return self.inner(x)


def test_steps_of_nested_models_and_of_layers_inside_layers():
    kinds = names(trace_of(attention()))
    assert kinds[:3] == ["EinsumDense"] * 3
    assert kinds[4:6] == ["EinsumDense", "Add"]
    assert kinds[6:] == ["LayerNormalization", "Dense", "Dense", "Add"]
    kinds = names(trace_of(gru()))
    assert kinds == ["GRU", "GRU", "Flip", "Concatenate", "Conv1D"]
    assert (
        names(trace_of(Late(layers.Dense(3)), ((keras.KerasTensor((2, 5)),), {})))[0]
        == "Dense"
    )


def test_sums_in_the_call_of_a_layer_are_steps():
    x = keras.Input((5, 8))
    model = keras.Model(x, Block(8)(Block(8)(x)))
    graph = trace_of(model)
    block = ["Reshape", "LayerNormalization", "Dense", "Dense", "Add"]
    assert names(graph) == 2 * block
    first, second = [step for step in graph.steps if type(step.operation).__name__ == "Add"]
    # The first sum reaches the second by the branch and past it.
    assert first.outputs[0] in graph.ancestors(second)
    assert graph.outputs == second.outputs


def test_a_kernel_that_a_layer_uses_itself():
    x = keras.Input((4,))
    graph = trace_of(keras.Model(x, OwnKernel()(x)))
    assert names(graph) == ["Matmul", "Relu"]
    product = graph.makers[graph.steps[-1].inputs[0]]
    assert any(isinstance(each, keras.Variable) for each in product.arguments[0])


class Positions(layers.Layer):
    """Returns rows of a table: values, whatever it is called on."""

    def build(self, shape):
        self.inner = layers.LayerNormalization()
        self.inner.build((16, shape[-1]))
        self.table = self.add_weight(shape=(16, shape[-1]), name="embeddings")

    def call(self, x):
        return self.inner(ops.convert_to_tensor(self.table))[: x.shape[1]]

    def compute_output_shape(self, shape):
        return shape[1:]


class Causal(layers.Layer):
    """Asks for the length of what it is called on, as a causal mask does."""

    def __init__(self, units):
        super().__init__()
        self.inner = layers.Dense(units, "relu")
        self.end = layers.Dense(units)

    def build(self, shape):
        self.inner.build(shape)
        self.end.build((*shape[:-1], self.inner.units))

    def call(self, x):
        mask = ops.cast(ops.arange(ops.shape(x)[1]) < 16, "float32")
        return x + self.end(self.inner(x)) * ops.expand_dims(mask, -1)


def test_layers_that_compute_with_a_length_that_is_not_known():
    x = keras.Input((None, 8))
    graph = trace_of(keras.Model(x, layers.Dense(3)(Causal(8)(x))))
    assert graph.closed == []
    assert names(graph) == ["Dense", "Dense", "Multiply", "Add", "Dense"]


def test_a_layer_that_returns_values_is_one_step():
    """So it is known whose table is added."""
    x = keras.Input((None, 8))
    positions = Positions()
    graph = trace_of(keras.Model(x, Causal(8)(x + positions(x))))
    assert names(graph) == ["Positions", "Add", "Dense", "Dense", "Multiply", "Add"]
    assert graph.closed == [positions]


class Short(Causal):
    """Takes short inputs only, once Keras has built it."""

    limit = 1000

    def call(self, x):
        if isinstance(x.shape[1], int) and x.shape[1] > self.limit:
            raise ValueError("too long")
        return super().call(x)


def test_a_length_that_a_layer_does_not_take():
    x, short = keras.Input((None, 8)), Short(8)
    model = keras.Model(x, short(x))
    short.limit = 16
    graph = trace_of(model)
    assert graph.closed == []
    assert graph.tensors[0].shape[1] <= 16


def test_images_of_unknown_size_can_be_halved():
    x = keras.Input((None, None, 3))
    y = x
    for _ in range(5):
        y = layers.MaxPooling2D()(y)
    y = layers.UpSampling2D(32)(y)
    graph = trace_of(keras.Model(x, layers.Concatenate()([x, Causal(3)(y)])))
    assert names(graph)[-1] == "Concatenate"
    assert graph.closed == []


class Attention(layers.Layer):
    """Returns a value and None as well, as a layer does that can have a cache."""

    def __init__(self):
        super().__init__()
        self.query = layers.EinsumDense("abc,cde->abde", (None, 2, 4))
        self.out = layers.Dense(8)

    def build(self, shape):
        self.query.build(shape)
        self.out.build(shape)

    def call(self, x, cache=None):
        query = self.query(x)
        length = query.shape[1]
        bias = ops.zeros((length, 1, 1)) + query  # a value, and a symbol
        bias += ops.zeros((length - 1 + 1, 1, 1))
        return self.out(ops.reshape(bias, (-1, length, 8))), ops.ones((length,)), cache


class Encoder(layers.Layer):
    """Takes what the layer in it returns apart, as KerasHub's decoders do."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def build(self, shape):
        self.attention.build(shape)

    def call(self, x):
        y, scale, cache = self.attention(x)
        assert cache is None
        return x + y * ops.expand_dims(scale, -1)

    def compute_output_shape(self, shape):
        return shape


def test_layers_that_return_values_and_nothing_beside_tensors():
    x = keras.Input((5, 8))
    model = keras.Model(x, Encoder()(x))
    node = keras.src.layers.layer.Node
    graph = trace_of(model)
    kinds = ["EinsumDense", "Add", "Add", "Reshape", "Dense", "Multiply", "Add"]
    assert names(graph) == kinds
    assert graph.closed == []
    assert keras.src.layers.layer.Node is node


def test_each_call_of_a_shared_layer_is_a_step():
    graph = trace_of(nested_twice())
    assert names(graph) == ["Dense", "Dense", "Dense", "Add"]
    dense = [step for step in graph.steps if type(step.operation).__name__ == "Dense"]
    assert len({id(step.operation) for step in dense}) == 2


def test_every_tensor_has_a_maker_or_is_an_input():
    for make in WITH_STATE:
        graph = trace_of(make())
        for step in graph.steps:
            for number in step.inputs:
                assert number in graph.makers or number in graph.inputs


def test_a_layer_that_calls_the_backend_is_one_step():
    inner = OnTensors()
    model = Late(layers.Dense(4), inner)
    model(np.zeros((3, 4), "float32"))
    graph = trace_of(model, ((keras.KerasTensor((3, 4)),), {}))
    assert graph.closed == [inner]
    assert {"Dense", "OnTensors", "Concatenate"} <= set(names(graph))


def test_a_model_that_was_built_on_no_shape():
    model = Late(layers.Dense(4))
    model.built = True
    with pytest.raises(ValueError, match="known shapes"):
        trace_of(model)


@pytest.mark.parametrize("make", [convnet, attention, gru])
def test_nothing_is_left_behind(make):
    model = make()

    def held(layer):
        nodes = len(layer._inbound_nodes), len(layer._outbound_nodes)
        return *nodes, {name: id(value) for name, value in vars(layer).items()}

    before = [held(layer) for layer in Tree(model).layers]
    name = layers.Dense(1).name
    trace_of(model)
    assert [held(layer) for layer in Tree(model).layers] == before
    number = int(name.rpartition("_")[2]) if name != "dense" else 0
    assert layers.Dense(1).name == f"dense_{number + 1}"
