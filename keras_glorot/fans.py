"""How many inputs an output sums over (fan_in), how many outputs an input reaches.

Counted from a shape, or from axes of it. The rules of layers whose shape alone does not
tell are in `layer_rules.py`.
"""

import math
import operator
from collections.abc import Mapping, Sequence, Set
from typing import Literal, NamedTuple, get_args

__all__ = [
    "MODES",
    "Fans",
    "Mode",
    "axes_of",
    "compute_fans",
    "fan_of",
    "standardize_axes",
    "standardize_shape",
]

Mode = Literal["fan_avg", "fan_in", "fan_out"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Python would make integers of these, but no order or no number is meant.
_NO_SEQUENCES = (str, bytes, bytearray, memoryview, Set, Mapping)


class Fans(NamedTuple):
    """The two connection counts of a kernel.

    Attributes:
        fan_in: How many weighted inputs are summed into one output.
        fan_out: How many outputs one input reaches.

    Example:

    >>> fans = Fans(fan_in=128, fan_out=256)
    >>> sum(fans)  # Glorot's variance is 2 over this
    384
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
        inputs, outputs = axes_of(sizes, *pair)
        return Fans(
            math.prod(sizes[axis] for axis in inputs),
            math.prod(sizes[axis] for axis in outputs),
        )
    if len(sizes) < 2:
        size = math.prod(sizes)
        return Fans(size, size)
    *window, inputs, outputs = sizes
    return Fans(math.prod(window) * inputs, math.prod(window) * outputs)


def fan_of(fans: Fans, mode: str) -> float:
    """The count that a std is made of, in the words of Keras's `VarianceScaling`."""
    return sum(fans) / 2 if mode == "fan_avg" else getattr(fans, mode)


def standardize_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple of plain ints."""
    if isinstance(shape, list | tuple) and any(size is None for size in shape):
        raise ValueError(
            "Argument `shape` must be fully defined: a kernel can't be drawn before "
            f"all its sizes are known. Received: shape={shape}"
        )
    sizes = _as_integers("shape", shape)
    if min(sizes, default=0) < 0:
        raise ValueError(
            f"Argument `shape` must have non-negative entries. Received: shape={shape}"
        )
    return sizes


def standardize_axes(
    input_axes: Sequence[int] | None, output_axes: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Both lists of axes as tuples, or None where neither was given.

    Here is said whatever can be said without a shape, so that a mistake is reported where
    the initializer is written and not where some layer is built.
    """
    if input_axes is None and output_axes is None:
        return None
    if input_axes is None or output_axes is None:
        raise ValueError(
            "Arguments `input_axes` and `output_axes` must be given together or not at "
            f"all. Received: input_axes={input_axes}, output_axes={output_axes}"
        )
    return _as_integers("input_axes", input_axes), _as_integers("output_axes", output_axes)


def axes_of(
    sizes: tuple[int, ...], input_axes: Sequence[int], output_axes: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both lists of axes, counted from the start."""
    return (
        _resolve_axes("input_axes", input_axes, sizes),
        _resolve_axes("output_axes", output_axes, sizes),
    )


def _resolve_axes(
    name: str, axes: Sequence[int], sizes: tuple[int, ...]
) -> tuple[int, ...]:
    numbers = range(len(sizes))
    resolved = {numbers[axis] for axis in axes if -len(sizes) <= axis < len(sizes)}
    if len(resolved) < len(axes):
        raise ValueError(
            f"Argument `{name}` must hold different axes of the kernel, which has "
            f"{len(sizes)}. Received: {name}={list(axes)} for shape={sizes}"
        )
    return tuple(numbers[axis] for axis in axes)


def _as_integers(name: str, entries: Sequence[int]) -> tuple[int, ...]:
    try:
        if isinstance(entries, _NO_SEQUENCES) or bool in map(type, entries):
            raise TypeError
        return tuple(map(operator.index, entries))
    except TypeError:
        raise TypeError(
            f"Argument `{name}` must be a sequence of integers, such as (0, 1). "
            f"Received: {name}={entries}"
        ) from None
