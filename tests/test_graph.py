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
    before = [
        (len(layer._inbound_nodes), len(layer._outbound_nodes), set(vars(layer)))
        for layer in Tree(model).layers
    ]
    name = layers.Dense(1).name
    trace_of(model)
    assert [
        (len(layer._inbound_nodes), len(layer._outbound_nodes), set(vars(layer)))
        for layer in Tree(model).layers
    ] == before
    number = int(name.rpartition("_")[2]) if name != "dense" else 0
    assert layers.Dense(1).name == f"dense_{number + 1}"
