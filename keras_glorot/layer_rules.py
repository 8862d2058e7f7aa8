"""Rules of Keras's layer classes: the fans of their kernels, and their activations."""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import keras
import numpy as np

from keras_glorot._drawing.matrices import Matrices
from keras_glorot._keras.tree import downstream_operations
from keras_glorot.fans import Fans, compute_fans, standardize_shape

__all__ = [
    "CONVOLUTIONS",
    "SEPARABLE",
    "TRANSPOSED",
    "Activation",
    "activation_name",
    "fans_by_rule",
    "following_activation",
    "has_registered_rule",
    "is_bias",
    "is_normalization",
    "is_relu_like",
    "kernel_activation",
    "kernel_fans",
    "kernel_matrices",
    "layer_activation",
    "register_fans",
    "unit_axis",
    "window_rank",
]

# A string stands for an activation that can't be called: Keras does not know it.
Activation = Callable[[Any], Any] | str
Rule = Callable[[Any, tuple[int, ...]], tuple[int, int] | None]
# A rule for Keras's layers tells more than the fans: a user's alone returns `Fans`.
_Rule = Callable[[Any, tuple[int, ...]], Fans | Matrices | None]

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSED = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
# Zero, or nearly zero, for about half of all inputs.
_RELU_LIKE = {
    *("relu", "relu6", "leaky_relu", "gelu", "silu", "hard_silu", "mish", "elu"),
    *("ReLU", "LeakyReLU", "ELU"),  # layers
}


def register_fans(layer_class: type[keras.Layer]) -> Callable[[Rule], Rule]:
    """A decorator: registers your rule for the fans of your own layer's kernels.

    The rule is called as `rule(layer, shape)` for each weight of rank 2 or more that such a
    layer holds itself. It returns `(fan_in, fan_out)`, or None to leave this weight to the
    shape rule of `compute_fans`. Subclasses without a rule of their own inherit it. Tell
    several kernels of a layer apart by their shapes: the rule is also called while the
    layer is being built, when attributes can still be missing.

    Args:
        layer_class: A subclass of `keras.Layer`.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Raises:
        TypeError: If `layer_class` is not a subclass of `keras.Layer`; later, when the
            rule is asked, if it returns anything else.

    Example:

    >>> class MixtureOfExperts(keras.layers.Layer):
    ...     "Its kernel has the shape (experts, inputs, outputs)."
    >>> @register_fans(MixtureOfExperts)
    ... def experts_fans(layer, shape):
    ...     return compute_fans(shape, input_axes=[1], output_axes=[2])

    Without decoration: `register_fans(MixtureOfExperts)(experts_fans)`.

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), section 4.2
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(
            "Argument `layer_class` must be a subclass of `keras.Layer`, as in "
            f"`@register_fans(MyLayer)`. Received: layer_class={layer_class}"
        )

    def register(rule: Rule) -> Rule:
        def checked_rule(layer: keras.Layer, shape: tuple[int, ...]) -> Fans | None:
            fans = rule(layer, shape) if len(shape) >= 2 else None
            try:
                return None if fans is None else Fans(*standardize_shape(fans))
            except (TypeError, ValueError):
                raise TypeError(
                    f"The rule registered for {layer_class.__name__} must return None or "
                    "(fan_in, fan_out), two non-negative integers. "
                    f"Received: {fans} for shape={shape}"
                ) from None

        _RULES[layer_class] = checked_rule
        return rule

    return register


def kernel_fans(
    shape: tuple[int, ...],
    layer: keras.Layer | None = None,
    variable: keras.Variable | None = None,
) -> Fans:
    """Fans of one weight: by the rule of its layer's class, else by its shape.

    `variable` is the weight itself, where it exists already.
    """
    return fans_by_rule(shape, layer, variable) or compute_fans(shape)


def fans_by_rule(
    shape: tuple[int, ...], layer: keras.Layer | None, variable: keras.Variable | None
) -> Fans | None:
    """Fans by the rule of the layer's class; None where there is none or it passes."""
    found = _by_rule(shape, layer, variable)
    return found.fans if isinstance(found, Matrices) else found


def kernel_matrices(
    shape: tuple[int, ...],
    layer: keras.Layer | None = None,
    variable: keras.Variable | None = None,
    axes: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Matrices:
    """The matrices that one weight is made of: by axes, by its layer, else by its shape."""
    found = _by_rule(shape, layer, variable)
    matrices = found if isinstance(found, Matrices) else Matrices.from_shape(shape)
    if axes is not None:
        matrices = Matrices.from_axes(shape, *axes)
    elif isinstance(found, Fans):
        matrices = Matrices.from_fans(shape, found)
    elif _is_recurrent(layer, variable) and shape[-1] % shape[-2] == 0:
        matrices = matrices._replace(parts=shape[-1] // shape[-2])
    # There a causal convolution sees the present.
    return matrices._replace(last_tap=getattr(layer, "padding", None) == "causal")


def _by_rule(
    shape: tuple[int, ...], layer: keras.Layer | None, variable: keras.Variable | None
) -> Fans | Matrices | None:
    if layer is None or is_bias(layer, variable):
        return None
    rule = next((_RULES[each] for each in type(layer).__mro__ if each in _RULES), None)
    is_separable = rule is _depthwise_conv and isinstance(layer, SEPARABLE)
    if rule is None or (is_separable and not _is_depthwise_half(layer, variable)):
        return None  # its shape tells, as of a pointwise kernel
    return rule(layer, tuple(shape))


def has_registered_rule(layer: keras.Layer | None, variable: keras.Variable) -> bool:
    """Whether a rule of the user, by `register_fans`, gives fans for this weight."""
    return isinstance(_by_rule(tuple(variable.shape), layer, variable), Fans)


def kernel_activation(
    layer: keras.Layer | None, variable: keras.Variable | None = None
) -> Activation | None:
    """The activation of the layer itself behind this weight, or None."""
    if isinstance(layer, SEPARABLE) and _is_depthwise_half(layer, variable):
        return None  # the pointwise kernel comes next
    return _standardize_activation(getattr(layer, "activation", None))


def _standardize_activation(activation: Any) -> Activation | None:
    """A layer of the user may keep anything in its attribute `activation`."""
    if isinstance(activation, keras.Layer):
        return layer_activation(activation) or type(activation).__name__
    if activation is None or callable(activation):
        return activation
    try:
        return keras.activations.get(activation)
    except (ValueError, TypeError):
        return str(activation)


def following_activation(
    layer: keras.Layer | None, variable: keras.Variable, layer_ids: Container[int]
) -> Activation | None:
    """The activation that a kernel's output goes through; None where there is none.

    That of the layer itself or, where this is linear and the graph is known, that of the
    layers that follow it directly, if they agree. `layer_ids` are the ids of the model's
    layers: a layer can be part of other models too.
    """
    own = kernel_activation(layer, variable)
    if layer is None or own not in (None, keras.activations.linear):
        return own
    if own is None and getattr(layer, "activation", None) is not None:
        return None  # it belongs to another kernel of this layer
    activations = [
        layer_activation(operation)
        for operation in downstream_operations(layer)
        if id(operation) in layer_ids
    ]
    agree = all(activation == activations[0] for activation in activations)
    return activations[0] if activations and agree else None


def window_rank(layer: keras.Layer | None, shape: tuple[int, ...]) -> int:
    """How many leading axes of a kernel are the window of a convolution."""
    window = getattr(layer, "kernel_size", None)
    is_window = isinstance(window, tuple) and shape[:-2] == window
    return len(shape) - 2 if is_window else 0


def unit_axis(layer: keras.Layer | None) -> int:
    """The axis of a kernel, counted from the end, along which units differ."""
    return -2 if isinstance(layer, TRANSPOSED) else -1


def activation_name(activation: Activation) -> str:
    """As a sentence names it: by the function, or by the class of its layer."""
    if isinstance(activation, str):
        return activation
    owner = getattr(activation, "__self__", None)
    function = getattr(activation, "func", activation)
    named = type(owner) if isinstance(owner, keras.Layer) else function
    return getattr(named, "__name__", type(named).__name__)


def is_relu_like(activation: Activation | None) -> bool:
    """Whether Glorot's assumption, linear around zero, fails as it does for ReLU."""
    return activation is not None and activation_name(activation) in _RELU_LIKE


def is_normalization(layer: keras.Layer) -> bool:
    """By the name: many packages have a `LayerNorm` or `RMSNorm` of their own."""
    name = type(layer).__name__.lower()
    return name.endswith(("norm", "normalization")) and name != "normalization"


def layer_activation(layer: Any) -> Activation | None:
    match layer:
        case keras.layers.Activation():
            return layer.activation
        case keras.layers.ReLU(negative_slope=0, threshold=0, max_value=None):
            return keras.activations.relu
        case keras.layers.PReLU(alpha_initializer=keras.initializers.Constant(value=start)):
            return _leaky_relu(float(np.mean(start)))
        case keras.layers.PReLU():
            return keras.activations.relu  # its slopes start at zero, or nearly so
        case keras.layers.ReLU() | keras.layers.LeakyReLU() | keras.layers.ELU():
            return layer.call
        case keras.layers.Softmax():
            return keras.activations.softmax
    return None


@functools.cache
def _leaky_relu(slope: float) -> Activation:
    """One function for one slope, so that layers can be compared."""
    return functools.partial(keras.activations.leaky_relu, negative_slope=slope)


# Rules by layer class, inherited by subclasses. Keras's layers for which the shape rule
# is right (Dense, recurrent cells and their input kernels with all gates as outputs,
# Embedding, ...) need none. A rule looks at the shape before it answers: subclasses add
# weights of their own, and LoRA adds factors.


def _grouped_conv(layer: Any, shape: tuple[int, ...]) -> Matrices | None:
    if shape[:-2] != tuple(layer.kernel_size) or shape[-1] != layer.filters:
        return None
    # Keras has divided the inputs already.
    return Matrices.from_shape(shape)._replace(parts=layer.groups)


def _transposed_conv(layer: Any, shape: tuple[int, ...]) -> Matrices | None:
    if shape[:-2] != tuple(layer.kernel_size) or shape[-2] != layer.filters:
        return None
    *window, outputs, inputs = range(len(shape))
    return Matrices(shape, (inputs,), (outputs,), tuple(window))


def _depthwise_conv(layer: Any, shape: tuple[int, ...]) -> Matrices | None:
    if shape[:-2] != tuple(layer.kernel_size) or shape[-1] != layer.depth_multiplier:
        return None
    *window, _, multiplied = range(len(shape))
    return Matrices(shape, (), (multiplied,), tuple(window))


def _einsum(layer: Any, shape: tuple[int, ...]) -> Matrices | None:
    kernel = layer.equation.split("->")[0].split(",")[1]
    if len(kernel) != len(shape):
        return None
    return Matrices.from_letters(shape, layer.equation)


_RULES: dict[type, _Rule] = {
    keras.layers.Conv1D: _grouped_conv,
    keras.layers.Conv2D: _grouped_conv,
    keras.layers.Conv3D: _grouped_conv,
    keras.layers.Conv1DTranspose: _transposed_conv,
    keras.layers.Conv2DTranspose: _transposed_conv,
    keras.layers.Conv3DTranspose: _transposed_conv,
    keras.layers.DepthwiseConv1D: _depthwise_conv,
    keras.layers.DepthwiseConv2D: _depthwise_conv,
    keras.layers.SeparableConv1D: _depthwise_conv,
    keras.layers.SeparableConv2D: _depthwise_conv,
    keras.layers.EinsumDense: _einsum,
}


def is_bias(layer: keras.Layer | None, variable: keras.Variable | None) -> bool:
    if variable is None:
        return False
    return variable.name == "bias" or variable is getattr(layer, "bias", None)


def _is_depthwise_half(layer: keras.Layer, variable: keras.Variable | None) -> bool:
    # The shapes can be equal, so they don't tell. The depthwise kernel is made first:
    # while it is drawn there is none yet, and no variable either.
    return getattr(layer, "depthwise_kernel", None) is variable


def _is_recurrent(layer: keras.Layer | None, variable: keras.Variable | None) -> bool:
    """Whether a weight is, or is going to be, the recurrent kernel of a cell."""
    is_it = getattr(layer, "recurrent_kernel", None) is variable
    is_kernel_made = getattr(layer, "kernel", None) is not None  # it is, before this one
    return is_it and is_kernel_made and hasattr(layer, "recurrent_initializer")
