"""The draw of a program that TensorFlow or JAX traces: it has no array to start from.

The program makes the bits that `stream` has the contract of. Each element makes its block
anew and takes one word of it. That is four times the work, and still the fastest that XLA
has: all is one loop that writes nothing but the result, and that XLA divides among devices,
as each of them needs it. A program of TensorFlow has that loop compiled by XLA as well: as
a graph of single operations it would write an array after each.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._drawing import stream

__all__ = ["called_draw", "traced_draw"]

cast: Any = keras.ops.cast
where: Any = keras.ops.where


def traced_draw(
    form: Any,
    shape: tuple[int, ...],
    scale: float,
    dtype: str,
    seed_words: Sequence[int] | Any,
    layout: Any = None,
) -> Any:
    """Has the program that is being traced draw a tensor: `stream.draw`'s bits.

    Only a float64 truncated normal may differ, in its last digits: XLA fuses products
    with sums.

    Args:
        form, shape, scale, dtype: As in `stream.draw`.
        seed_words: Python integers, or the symbol of a `SeedGenerator`'s state.
        layout: On JAX, how the tensor is to be spread over devices.
    """

    def values(*key: Any) -> Any:
        zero = _unknown_zero()
        key = tuple(word + zero for word in key)
        low, high = _indices(shape, zero)
        if dtype == "float64":
            return _float64_uniform(low, high, key)
        return cast(_float32_values(form, low, high, scale, key), dtype)

    key = _key(form, shape, dtype, seed_words)
    key = [keras.ops.convert_to_tensor(word, "uint32") for word in key]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        values = tf.function(values, autograph=False, jit_compile=True)
    drawn = values(*key)
    if dtype == "float64":  # not in what TensorFlow compiles: its bits stay
        if form == "truncated_normal":
            drawn = stream.truncated_normal_quantile(drawn)
        drawn = drawn * scale
    return drawn if layout is None else _spread(drawn, layout)


def called_draw(
    draw: Callable[[Sequence[int]], np.ndarray],
    shape: tuple[int, ...],
    dtype: str,
    seed_words: Sequence[int] | Any,
    layout: Any = None,
) -> Any:
    """Has the program that is being traced call a function of the host each time it runs.

    Args:
        draw: From seed words to an array.
        shape, dtype: The array's.
        seed_words: Python integers, or the symbol of a `SeedGenerator`'s state.
        layout: On JAX, how the tensor is to be spread over devices.
    """
    states = [] if isinstance(seed_words, tuple) else [seed_words]

    def call(*states: Any) -> np.ndarray:
        words = [stream.state_words(np.asarray(state)) for state in states]
        return draw(*words or [seed_words]).astype(held, copy=False)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        held = np.dtype(dtype)
        tensor = tf.numpy_function(call, states, tf.as_dtype(dtype))
        tensor.set_shape(shape)
        return tensor
    import jax

    held = jax.dtypes.canonicalize_dtype(dtype)
    result = jax.ShapeDtypeStruct(shape, held)
    tensor = jax.pure_callback(call, result, *states, vmap_method="sequential")
    return tensor if layout is None else _spread(tensor, layout)


def _key(form: Any, shape: tuple[int, ...], dtype: str, seed_words: Any) -> Any:
    """The tensor's key: two integers, or two symbols."""
    if isinstance(seed_words, tuple):
        return stream.stream_key(form, shape, dtype, seed_words)
    static = stream.static_key(form, shape, dtype)
    digits = [half for word in (seed_words[0], seed_words[1]) for half in _halves(word)]
    return _philox(digits, tuple(np.uint32(word) for word in static))[:2]


def _float32_values(form: Any, low: Any, high: Any, scale: float, key: Any) -> Any:
    words = _words(low, high, 2, key)
    odd, late = _has_bit(low, 0), _has_bit(low, 1)
    word = where(late, where(odd, words[3], words[2]), where(odd, words[1], words[0]))
    if form == "truncated_normal":
        word = _interpolate(word)
        scale = 2 * scale
    odd_integer = cast(word | np.uint32(1), "int32")
    return cast(odd_integer, "float32") * np.float32(scale / 2**31)


def _float64_uniform(low: Any, high: Any, key: Any) -> Any:
    """Uniform on [-1, 1]."""
    words = _words(low, high, 1, key)
    second = _has_bit(low, 0)
    first_half = cast(where(second, words[2], words[0]), "uint64")
    second_half = cast(where(second, words[3], words[1]), "uint64")
    word = cast(first_half | second_half * np.uint64(1 << 32), "int64")
    return cast(word // np.int64(1 << 10) | np.int64(1), "float64") * 2.0**-53


def _words(low: Any, high: Any, bits: int, key: Any) -> Any:
    """The block of each element, whose number's last bits are its place in the block."""
    block_low = low // np.uint32(1 << bits) | high * np.uint32(1 << (32 - bits))
    return _philox((block_low, high // np.uint32(1 << bits), *key), key)


def _has_bit(word: Any, place: int) -> Any:
    return keras.ops.equal(word & np.uint32(1 << place), np.uint32(1 << place))


def _philox(counter: Sequence[Any], key: Any) -> Any:
    """`stream.philox` of arrays of counters."""
    m0, m1 = 0xD2511F53, 0xCD9E8D57
    c0, c1, c2, c3 = counter
    k0, k1 = key
    with np.errstate(over="ignore"):  # words wrap
        for _ in range(10):
            c0, c1, c2, c3 = (
                _high_product(c2, m1) ^ c1 ^ k0,
                c2 * np.uint32(m1),
                _high_product(c0, m0) ^ c3 ^ k1,
                c0 * np.uint32(m0),
            )
            k0, k1 = k0 + np.uint32(0x9E3779B9), k1 + np.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def _interpolate(words: Any) -> Any:
    """`stream.integer_quantile`, without its work in place."""
    sign = words // np.uint32(1 << 31) * np.uint32(0xFFFFFFFF)
    magnitude = words ^ sign
    segment = cast(magnitude // np.uint32(1 << 19), "int32")
    position = magnitude & np.uint32((1 << 19) - 1)
    knots = stream.knots().astype(np.uint32)
    low = _take(knots, segment)
    rise = _take(knots, segment + np.int32(1)) - low
    # rise * position // 2**19 without a product of more than 32 bits.
    value = rise * (position & np.uint32(511)) // np.uint32(1 << 9)
    value = (value + rise * (position // np.uint32(1 << 9))) // np.uint32(1 << 10) + low
    return value * np.uint32(2) ^ sign


# What TensorFlow and JAX say in different words ------------------------------------------


def _unknown_zero() -> Any:
    """A 0 of which the compiler knows nothing.

    Whatever depends on it is left to the program. Of the rest the compiler would make
    constants, which takes it a minute for 1e8 values.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.optimization_barrier(jax.numpy.uint32(0))
    import tensorflow as tf

    # TensorFlow has no public name for the barrier.
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    # XLA stops at the barrier, TensorFlow itself at an operation that it calls stateful.
    zero = tf.raw_ops.Empty(shape=[], dtype=tf.uint32, init=True)
    hidden: Any = gen_xla_ops.xla_optimization_barrier([zero])
    return hidden[0]


def _halves(word: Any) -> tuple[Any, Any]:
    """The low and the high digit of a word of a `SeedGenerator`'s state."""
    if keras.backend.backend() == "jax":  # it has 32 bits there
        return cast(word, "uint32"), np.uint32(0)
    return cast(word, "uint32"), cast(word // np.int64(1 << 32), "uint32")


def _spread(tensor: Any, layout: Any) -> Any:
    import jax

    return jax.lax.with_sharding_constraint(tensor, backends.jax_sharding(layout))


def _take(table: np.ndarray, indices: Any) -> Any:
    if keras.backend.backend() == "jax":
        import jax

        array = jax.numpy.asarray(table)
        return array.at[indices].get(mode="promise_in_bounds")
    import tensorflow as tf

    return tf.gather(tf.constant(table), indices)


def _indices(shape: tuple[int, ...], zero: Any) -> tuple[Any, Any]:
    """The low and the high word of each element's number in row-major order.

    Args:
        shape: The tensor's shape.
        zero: From `_unknown_zero`.
    """
    size = math.prod(shape)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Of one long range TensorFlow would make a constant.
        rows, columns = -(-size // (1 << 15)), 1 << 15
        row = tf.cast(tf.range(rows), tf.uint32)[:, None] + zero
        column = tf.cast(tf.range(columns), tf.uint32)

        def in_order(grid: Any) -> Any:
            flat = tf.reshape(tf.broadcast_to(grid, [rows, columns]), [-1])
            return tf.reshape(flat[:size], shape)

        low = in_order(row * np.uint32(columns) + column)
        if size <= 1 << 32:
            return low, zero
        return low, in_order(row // np.uint32((1 << 32) // columns))
    from jax import lax
    from jax import numpy as jnp

    low = high = zero
    for axis in range(len(shape)):  # axis by axis: so XLA can divide it among devices
        stride = math.prod(shape[axis + 1 :])
        coordinate = lax.broadcasted_iota(jnp.uint32, shape, axis)
        step = coordinate * np.uint32(stride & 0xFFFFFFFF)
        low = low + step
        if size > 1 << 32:
            carry = (low < step).astype(jnp.uint32)
            step = _high_product(coordinate, stride & 0xFFFFFFFF)
            high = high + step + coordinate * np.uint32(stride >> 32) + carry
    return low, high


def _high_product(a: Any, b: int) -> Any:
    """The high word of a product of two words."""
    if isinstance(a, np.generic):
        return np.uint32(int(a) * b >> 32)
    if keras.backend.backend() == "tensorflow":
        product = cast(a, "uint64") * np.uint64(b)
        return cast(product // np.uint64(1 << 32), "uint32")
    # Not `lax.mulhi`: JAX 0.10 can't compile it in a program for several devices.
    import jax
    from jax import lax

    if hasattr(jax, "enable_x64"):  # JAX hides 64-bit integers by default
        with jax.enable_x64(True):
            product = lax.convert_element_type(a, np.uint64) * np.uint64(b)
            return lax.convert_element_type(product >> np.uint64(32), np.uint32)
    # JAX 0.6 can't do that inside a program: from the products of halves.
    low, high = np.uint32(b & 0xFFFF), np.uint32(b >> 16)
    a_low, a_high = a & 0xFFFF, a >> 16
    cross = a_low * high
    middle = (a_low * low >> 16) + (cross & 0xFFFF) + a_high * low
    return a_high * high + (cross >> 16) + (middle >> 16)
