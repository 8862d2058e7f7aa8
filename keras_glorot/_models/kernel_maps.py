"""How the kernels of Keras's layers map one tensor to another: which axes meet which."""

import string
from typing import Any, NamedTuple

import keras

from keras_glorot._drawing.matrices import Matrices
from keras_glorot._keras.graph import Graph, Step
from keras_glorot.layer_rules import CONVOLUTIONS, SEPARABLE, TRANSPOSED, kernel_matrices

__all__ = ["Map", "channel_axis", "depthwise_kernel", "kernel_map"]

Axes = tuple[int, ...]

_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


class Map(NamedTuple):
    """A kernel between two tensors.

    Attributes:
        variable: The kernel.
        matrices: Which of its axes are inputs, outputs and window.
        inputs, outputs: The axes of the tensors that its inputs and outputs stand on.
        strides: Those of its window, where they leave out positions of the input.
    """

    variable: keras.Variable
    matrices: Matrices
    inputs: Axes
    outputs: Axes
    strides: Axes = ()

    @property
    def taps(self) -> tuple[slice, ...]:
        """The part of the window that is not zero."""
        return self.matrices.taps(self.strides)


def kernel_map(step: Step, graph: Graph) -> Map | None:
    """The map of a layer; None of a layer that has none, or is not known."""
    layer = step.operation
    if not step.inputs or not step.outputs or _is_changed(layer):
        return None
    rank = len(graph.tensors[step.inputs[0]].shape)
    channels = (channel_axis(layer, rank),)
    if isinstance(layer, keras.layers.Dense):
        return _map(layer, "kernel", (rank - 1,), (rank - 1,))
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_map(layer, rank)
    if isinstance(layer, CONVOLUTIONS):
        return _map(layer, "kernel", channels, channels, layer.strides)
    if isinstance(layer, SEPARABLE):
        return _map(layer, "pointwise_kernel", channels, channels)
    if isinstance(layer, TRANSPOSED):
        return _map(layer, "kernel", channels, channels)
    return None


def depthwise_kernel(layer: Any) -> keras.Variable | None:
    """The kernel of a layer that maps each channel by itself, at least at first."""
    if not isinstance(layer, SEPARABLE + _DEPTHWISE) or _is_changed(layer):
        return None
    return _weight(layer, "depthwise_kernel" if isinstance(layer, SEPARABLE) else "kernel")


def channel_axis(layer: Any, rank: int) -> int:
    """The axis of an image on which its channels stand."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def _is_changed(layer: Any) -> bool:
    """Whether a subclass of one of Keras's layers computes something of its own."""
    return not type(layer).call.__module__.startswith("keras.")


def _weight(layer: Any, name: str) -> Any:
    # With LoRA on, the attribute of this name is a sum.
    return next(each for each in layer.weights if each.name == name)


def _map(layer: Any, name: str, inputs: Axes, outputs: Axes, strides: Axes = ()) -> Map:
    variable = _weight(layer, name)
    matrices = kernel_matrices(tuple(variable.shape), layer, variable)
    return Map(variable, matrices, inputs, outputs, strides)


def _einsum_map(layer: Any, rank: int) -> Map | None:
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    others = [each for each in string.ascii_uppercase if each not in layer.equation]
    rest = "".join(others)[: rank - len(inputs.replace("...", ""))]
    inputs, output = inputs.replace("...", rest), output.replace("...", rest)
    variable = _weight(layer, "kernel")
    matrices = kernel_matrices(tuple(variable.shape), layer, variable)
    if matrices.batch or matrices.window or not matrices.inputs or not matrices.outputs:
        return None  # a kernel for each expert
    ins = tuple(inputs.find(kernel[axis]) for axis in matrices.inputs)
    outs = tuple(output.find(kernel[axis]) for axis in matrices.outputs)
    return None if -1 in ins + outs else Map(variable, matrices, ins, outs)
