"""How many inputs an output sums over (fan_in), how many outputs an input reaches.

`compute_fans` counts from a shape; below it stand the rules of the Keras layers in
which the shape alone does not tell, and what asks them.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from keras_glorot.keras_bridge import owned_variables

__all__ = ["Fans", "compute_fans", "layer_fans", "register_fans"]


Rule = Callable[[Any, tuple[int, ...]], tuple[int, int] | None]


class Fans(NamedTuple):
    """The two connection counts of a kernel.

    Attributes:
        fan_in: How many weighted inputs are summed into one output.
        fan_out: How many outputs one input reaches.
    """

    fan_in: int
    fan_out: int


def compute_fans(
    shape: Sequence[int],
    input_axes: Sequence[int] | None = None,
    output_axes: Sequence[int] | None = None,
) -> Fans:
    """Computes `(fan_in, fan_out)` of a kernel from its shape.

    With explicit axes, `fan_in` is the product of the sizes of `input_axes`, `fan_out`
    that of `output_axes`. An axis in both belongs to the receptive field; an axis in
    neither is a batch axis (experts, depthwise channels) and counts for nothing.

    Without them this is Keras's rule: `()` has fans (1, 1), `(n,)` has (n, n),
    `(n, m)` has (n, m), and `(*window, n, m)` has (n, m) times the window's size.
    Stride, padding and dilation are ignored, as everywhere.

    Args:
        shape: Sizes of the kernel's axes, non-negative integers.
        input_axes: Axes that one output sums over. Negative ones count from the end.
        output_axes: Axes that one input is spread over.

    Returns:
        A `Fans` named tuple of two integers.

    Raises:
        ValueError: If a size is unknown or negative, or axes are out of range,
            repeated, or given on one side only.
        TypeError: If sizes or axes are not integers.

    Example:

    >>> compute_fans((3, 3, 64, 128))
    Fans(fan_in=576, fan_out=1152)
    >>> compute_fans((8, 64, 32), input_axes=[1], output_axes=[2])  # 8 experts
    Fans(fan_in=64, fan_out=32)

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html)
    """
    sizes = standardize_shape(shape)
    pair = standardize_axes(input_axes, output_axes)
    if pair is not None:
        inputs, outputs = (
            _resolve_axes(axes, sizes, name)
            for axes, name in zip(pair, ("input_axes", "output_axes"), strict=True)
        )
        return Fans(
            math.prod(sizes[axis] for axis in inputs),
            math.prod(sizes[axis] for axis in outputs),
        )
    if len(sizes) < 2:
        size = math.prod(sizes)
        return Fans(size, size)
    *window, inputs, outputs = sizes
    return Fans(math.prod(window) * inputs, math.prod(window) * outputs)


def register_fans(layer_class: type[keras.Layer]) -> Callable[[Rule], Rule]:
    """Decorates the rule that counts the connections of your own layer's kernels.

    The rule is called as `rule(layer, shape)` for each weight of rank 2 or more that
    such a layer holds itself, and returns `(fan_in, fan_out)`, or None to leave this
    weight to the shape rule of `compute_fans`. Subclasses without a rule of their own
    inherit it. Tell several kernels of a layer apart by their shapes: the rule is asked
    afterwards, and also while the layer is being built, when attributes are missing.

    Args:
        layer_class: A subclass of `keras.Layer`.

    Returns:
        A decorator that registers the function and returns it unchanged.

    Raises:
        TypeError: If `layer_class` is not a subclass of `keras.Layer`; later, when the
            rule is asked, if it returns anything else.

    Example:

    >>> @register_fans(MixtureOfExperts)  # its kernel: (experts, inputs, outputs)
    ... def experts_fans(layer, shape):
    ...     return compute_fans(shape, input_axes=[1], output_axes=[2])

    Without decoration: `register_fans(MixtureOfExperts)(experts_fans)`.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise TypeError(
            "Argument `layer_class` must be a subclass of `keras.Layer`, as in "
            f"`@register_fans(MyLayer)`. Received: layer_class={layer_class}"
        )

    def register(rule: Rule) -> Rule:
        def checked(layer, shape, variable):
            fans = rule(layer, shape) if len(shape) >= 2 else None
            try:
                return None if fans is None else Fans(*standardize_shape(fans))
            except (TypeError, ValueError):
                raise TypeError(
                    f"The rule registered for {layer_class.__name__} must return None or "
                    "(fan_in, fan_out), two non-negative integers. "
                    f"Received: {fans} for shape={shape}"
                ) from None

        _RULES[layer_class] = checked
        return rule

    return register


def layer_fans(layer: keras.Layer) -> dict[str, Fans]:
    """Lists `fan_in` and `fan_out` of each kernel in a built layer or model.

    That is each weight of rank 2 or more, and vectors that are einsum kernels; other
    vectors, such as biases, have no connections to count. Quantized kernels count as
    what they stand for, and the factors of a LoRA-enabled layer for themselves.

    Args:
        layer: A built layer or model. Sublayers and nested models are included.

    Returns:
        A dictionary from `variable.path` to `Fans`, in the order of `layer.weights`.
        Nested models may give one path to several variables; all after the first then
        have a number added: `"dense/kernel (2)"`.

    Raises:
        TypeError: If `layer` is not a Keras layer.
        ValueError: If it is not built.

    Example:

    >>> layer = keras.layers.DepthwiseConv2D(3)
    >>> layer.build((None, 32, 32, 512))
    >>> layer_fans(layer)
    {'depthwise_conv2d/kernel': Fans(fan_in=9, fan_out=9)}
    """
    fans_by_path: dict[str, Fans] = {}
    seen = Counter()
    for _, variable, fans in variable_fans(layer):
        if fans is not None:
            seen[variable.path] += 1
            count = seen[variable.path]
            path = variable.path if count == 1 else f"{variable.path} ({count})"
            fans_by_path[path] = fans
    return fans_by_path


def variable_fans(
    layer: keras.Layer, argument: str = "layer"
) -> list[tuple[keras.Layer | None, keras.Variable, Fans | None]]:
    """Each weight in a layer or model with its owner and, if it is a kernel, fans.

    `argument` is the name of what the user gave, for errors.
    """
    if not isinstance(layer, keras.Layer):
        raise TypeError(
            f"Argument `{argument}` must be a Keras layer or model. "
            f"Received: {argument}={layer}"
        )
    if not layer.built:
        raise ValueError(
            f"Argument `{argument}` must be built: before that it has no weights. Call it "
            "on data or call its `build(input_shape)` first. "
            f"Received: {argument}={layer}"
        )
    found = []
    for owner, variable in owned_variables(layer):
        weight: Any = variable
        if owner is not None and owner.quantization_mode is not None:
            # Two four-bit weights share a byte; the property of the same name unpacks.
            weight = getattr(owner, variable.name, variable)
        fans = _fans_by_rule(weight.shape, owner, variable)
        if fans is None and len(weight.shape) >= 2:
            fans = compute_fans(weight.shape)
        found.append((owner, variable, fans))
    return found


def kernel_fans(
    shape: Sequence[int],
    layer: keras.Layer | None = None,
    variable: keras.Variable | None = None,
) -> Fans:
    """Fans of one weight: by the rule of its layer's class, else by its shape.

    `variable` is the weight itself, where it exists already.
    """
    return _fans_by_rule(shape, layer, variable) or compute_fans(shape)


def _fans_by_rule(shape, layer, variable) -> Fans | None:
    if layer is None:
        return None
    for layer_class in type(layer).__mro__:
        if layer_class in _RULES:
            return _RULES[layer_class](layer, tuple(shape), variable)
    return None


def kernel_activation(
    layer: keras.Layer | None, variable: keras.Variable | None = None
) -> Any:
    """What stands behind the weight being drawn, for `gain="auto"`; None if nothing."""
    if isinstance(layer, _SEPARABLE) and _is_depthwise_half(layer, variable):
        return None  # what follows it is the pointwise kernel
    return getattr(layer, "activation", None)


def standardize_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of plain ints, or an error that says what is wrong."""
    try:
        entries = tuple(shape)
    except TypeError:
        raise TypeError(
            "Argument `shape` must be a sequence of integers, such as (64, 32). "
            f"Received: shape={shape}"
        ) from None
    if any(entry is None for entry in entries):
        raise ValueError(
            "Argument `shape` must be fully defined: a kernel can't be drawn before "
            f"all its sizes are known. Received: shape={entries}"
        )
    sizes = _as_integers(entries, "shape", shape)
    if any(size < 0 for size in sizes):
        raise ValueError(
            f"Argument `shape` must have non-negative entries. Received: shape={entries}"
        )
    return sizes


def standardize_axes(
    input_axes: Sequence[int] | None, output_axes: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Both axes lists as tuples, or None where neither was given.

    What can be said without a shape is said here, so that a mistake is reported where
    the initializer is written and not where some layer is built.
    """
    if input_axes is None and output_axes is None:
        return None
    if input_axes is None or output_axes is None:
        raise ValueError(
            "Arguments `input_axes` and `output_axes` must be given together or not at "
            f"all. Received: input_axes={input_axes}, output_axes={output_axes}"
        )
    pair = []
    for name, axes in (("input_axes", input_axes), ("output_axes", output_axes)):
        if isinstance(axes, str) or not isinstance(axes, Sequence):
            raise TypeError(
                f"Argument `{name}` must be a list of integers, such as [0]. "
                f"Received: {name}={axes}"
            )
        axes = _as_integers(axes, name, axes)
        if len(set(axes)) != len(axes):
            raise ValueError(
                f"Argument `{name}` must not repeat an axis. Received: {name}={axes}"
            )
        pair.append(axes)
    return pair[0], pair[1]


def _resolve_axes(
    axes: tuple[int, ...], sizes: tuple[int, ...], name: str
) -> tuple[int, ...]:
    """Axes counted from the start, each within the rank and none twice."""
    rank = len(sizes)
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(
            f"Argument `{name}` must lie within the kernel's {rank} axes. "
            f"Received: {name}={list(axes)} for shape={sizes}"
        )
    resolved = tuple(axis % rank for axis in axes)
    if len(set(resolved)) != len(resolved):
        raise ValueError(
            f"Argument `{name}` must not repeat an axis. "
            f"Received: {name}={list(axes)} for shape={sizes}"
        )
    return resolved


def _as_integers(entries: Sequence, name: str, received: object) -> tuple[int, ...]:
    # `operator.index` takes NumPy integers and refuses floats; bool is an int in
    # Python, but never a size or an axis.
    try:
        if any(isinstance(entry, bool) for entry in entries):
            raise TypeError
        return tuple(operator.index(entry) for entry in entries)
    except TypeError:
        raise TypeError(
            f"Argument `{name}` must hold integers only. Received: {name}={received}"
        ) from None


# Rules by layer class, inherited by subclasses. Keras's layers for which the shape rule
# is right (Dense, recurrent cells and their input kernels with all gates as outputs,
# Embedding, ...) need none. A rule looks at the shape before it answers: subclasses add
# weights of their own, and LoRA adds factors.


def _grouped(layer, shape, variable):
    if shape[:-2] != tuple(layer.kernel_size) or shape[-1] != layer.filters:
        return None
    fan_in, fan_out = compute_fans(shape)  # Keras has divided the inputs already
    return Fans(fan_in, fan_out // layer.groups)


def _transposed(layer, shape, variable):
    if shape[:-2] != tuple(layer.kernel_size) or shape[-2] != layer.filters:
        return None
    fan_out, fan_in = compute_fans(shape)  # (*window, outputs, inputs)
    return Fans(fan_in, fan_out)


def _depthwise(layer, shape, variable):
    if shape[:-2] != tuple(layer.kernel_size) or shape[-1] != layer.depth_multiplier:
        return None
    window = math.prod(shape[:-2])  # (*window, channels, multiplier)
    return Fans(window, window * layer.depth_multiplier)


def _separable(layer, shape, variable):
    if not _is_depthwise_half(layer, variable):
        return None
    return _depthwise(layer, shape, variable)


def _einsum(layer, shape, variable):
    operands, outputs = layer.equation.split("->")
    inputs, kernel = operands.split(",")
    is_bias = variable is not None and variable is getattr(layer, "bias", None)
    if is_bias or len(kernel) != len(shape):
        return None
    # A letter in all three is a batch: there is a kernel for each of its values.
    sizes = list(zip(kernel, shape, strict=True))
    return Fans(
        math.prod(size for letter, size in sizes if letter not in outputs),
        math.prod(size for letter, size in sizes if letter not in inputs),
    )


def _is_depthwise_half(layer: keras.Layer, variable: keras.Variable | None) -> bool:
    # The shapes can be equal, so they don't tell. The depthwise kernel is made first:
    # while it is drawn there is none yet, and no variable either.
    return getattr(layer, "depthwise_kernel", None) is variable


_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)

_RULES: dict[type, Callable[[Any, tuple[int, ...], Any], Fans | None]] = {
    keras.layers.Conv1D: _grouped,
    keras.layers.Conv2D: _grouped,
    keras.layers.Conv3D: _grouped,
    keras.layers.Conv1DTranspose: _transposed,
    keras.layers.Conv2DTranspose: _transposed,
    keras.layers.Conv3DTranspose: _transposed,
    keras.layers.DepthwiseConv1D: _depthwise,
    keras.layers.DepthwiseConv2D: _depthwise,
    **dict.fromkeys(_SEPARABLE, _separable),
    keras.layers.EinsumDense: _einsum,
}
