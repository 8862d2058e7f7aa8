"""From a NumPy array to a tensor of TensorFlow, JAX or PyTorch, where it must live.

Inside a program that the backend traces there is no array: the program itself draws, by
the backend's operations, the bits that `sampling` has the contract of.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import keras
import numpy as np

from keras_glorot import sampling
from keras_glorot.sampling import Bounds

__all__ = [
    "assign",
    "is_symbolic",
    "is_tracing",
    "meta_tensor",
    "outside_traces",
    "to_array",
    "to_sharded_tensor",
    "to_tensor",
    "traced_draw",
    "untouched",
    "writable",
]

_Result = TypeVar("_Result")


def to_tensor(array: np.ndarray) -> Any:
    """Hands an array over to the backend, with as few copies as it allows.

    The tensor may go on living in the array's memory, which must be aligned to 64 bytes
    and which the caller must not touch again.
    """
    backend, dtype = keras.backend.backend(), array.dtype
    if array.size and backend == "tensorflow":
        import tensorflow as tf

        # In a graph the array becomes a constant of it; a GPU takes a copy anyway.
        if tf.executing_eagerly() and not tf.config.list_logical_devices("GPU"):
            from_dlpack = tf.experimental.dlpack.from_dlpack
            if dtype.kind != "V":
                return from_dlpack(array.__dlpack__())
            # NumPy has no bfloat16, and so no DLPack for it.
            bits = from_dlpack(array.view(np.uint16).__dlpack__())
            return tf.bitcast(bits, tf.bfloat16)
    elif backend == "jax":
        import jax

        return jax.device_put(array)
    elif backend == "torch":
        import torch

        if dtype.kind == "V":
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return keras.ops.convert_to_tensor(tensor)  # moves it to Keras's device
    return keras.ops.convert_to_tensor(array)


def to_array(variable: keras.Variable) -> np.ndarray:
    """The values of a variable, to be read only: no copy if the host's memory has them."""
    tensor: Any = keras.ops.convert_to_tensor(variable)
    if keras.backend.backend() == "torch":
        tensor = keras.ops.convert_to_numpy(tensor)
    return np.asarray(tensor)


def assign(variable: keras.Variable, value: Any) -> None:
    """Gives a variable a value, a NumPy array or a tensor, on the device that it has."""
    if keras.backend.backend() == "jax":
        import jax

        old: Any = variable.value  # Keras keeps to a device only if it chose it itself
        value = jax.device_put(value, old.sharding if old.committed else None)
    elif isinstance(value, np.ndarray) and value.ctypes.data % 64 == 0:
        value = to_tensor(value)  # TensorFlow aborts on memory that is aligned worse
    with writable([variable]):
        variable.assign(value)


def writable(
    variables: Iterable[keras.Variable],
) -> contextlib.AbstractContextManager[Any]:
    """Where they can be assigned: those that PyTorch made in inference mode only there."""
    if keras.backend.backend() == "torch":
        import torch

        values: list[Any] = [variable.value for variable in variables]
        if any(value.is_inference() for value in values):
            return torch.inference_mode()
    return contextlib.nullcontext()


def to_sharded_tensor(
    shape: tuple[int, ...], layout: Any, draw_region: Callable[[Bounds], np.ndarray]
) -> Any:
    """Assembles a JAX array from the regions that its devices hold, each drawn once.

    Args:
        shape: The whole array's shape.
        layout: A `keras.distribution.TensorLayout` or a `jax.sharding.Sharding`.
        draw_region: Called with a start and a stop for each axis.
    """
    backend = keras.backend.backend()
    if backend != "jax":
        raise ValueError(
            f"Argument `layout` must be left out on the {backend} backend: only JAX "
            f"spreads a kernel over devices while it is drawn. Received: layout={layout}"
        )
    import jax

    sharding = _jax_sharding(layout)
    devices_of: dict[Bounds, list] = {}
    index: Any
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
        )
        devices_of.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, (first, *others) in devices_of.items():
        array = draw_region(bounds)
        # Only one device may live in the array's memory: a donated buffer is written to.
        # (`may_alias=False` does not keep `device_put` from it.)
        arrays += [jax.device_put(array.copy(), other) for other in others]
        arrays.append(jax.device_put(array, first))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _jax_sharding(layout: Any) -> Any:
    import jax

    sharding: Any = getattr(layout, "backend_layout", layout)
    if not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(
            "Argument `layout` must be a `keras.distribution.TensorLayout` or a JAX "
            f"sharding. Received: layout={layout} (of type {type(layout)})"
        )
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, jax.sharding.AbstractMesh) and not is_tracing():
        # Keras opens the concrete mesh as the scope's, and hands over the abstract one.
        spec = getattr(sharding, "spec")  # noqa: B009 - not every sharding has one
        return jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
    return sharding


def meta_tensor(shape: tuple[int, ...], dtype: str) -> Any:
    """A torch tensor with a shape and no values, if such are made here; else None."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    if torch.empty(0).is_meta:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return None


def is_symbolic(tensor: Any) -> bool:
    """Whether a tensor has no value yet, because the backend is tracing."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.is_symbolic_tensor(tensor)
        case "jax":
            from jax.core import Tracer

            return isinstance(tensor, Tracer)
    return False


def outside_traces(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls a function where no trace, device scope or scope of Keras is open.

    All of these are open in one thread only, and the call is made in another one. Where no
    thread can be had, it is made in this one.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            call = pool.submit(function, *arguments)
        except RuntimeError:  # no more threads, or the interpreter is shutting down
            call = None
    return function(*arguments) if call is None else call.result()


def untouched(function: Callable) -> Callable:
    """Keeps AutoGraph and Dynamo from rewriting a function when they trace its caller.

    In a program of `torch.compile` the function is called as it is, between two graphs.
    """
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.autograph.experimental.do_not_convert(function)
        case "torch":
            import torch

            return torch.compiler.disable(function)
    return function


def is_tracing() -> bool:
    """Whether the backend makes a program here, in which an array would be a constant."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return not tf.executing_eagerly()
        case "jax":
            import jax

            try:  # 100 times faster than to make an array and look at it
                from jax._src.core import trace_state_clean
            except ImportError:
                return is_symbolic(jax.numpy.zeros(()))
            return not trace_state_clean()
    return False


def traced_draw(
    form: str,
    shape: tuple[int, ...],
    scale: float,
    dtype: str,
    seed_words: Sequence[int] | Any,
    layout: Any = None,
) -> Any:
    """Has the program that is being traced draw a tensor: `sampling.draw`'s bits.

    Only a float64 truncated normal may differ, in its last digits: XLA fuses products
    with sums.

    Args:
        form, shape, scale, dtype: As in `sampling.draw`.
        seed_words: Python integers, or the symbol of a `SeedGenerator`'s state.
        layout: On JAX, how the tensor is to be spread over devices.
    """
    if keras.backend.backend() == "tensorflow":
        return _tensorflow_draw(form, shape, scale, dtype, seed_words)
    drawn = _jax_draw(form, shape, scale, dtype, seed_words)
    if layout is not None:
        import jax

        drawn = jax.lax.with_sharding_constraint(drawn, _jax_sharding(layout))
    return drawn


# TensorFlow ------------------------------------------------------------------------------

# Elements of a truncated normal that are in memory as words, indices and positions. Its
# operations write an array each: in one piece, five times the result.
_TENSORFLOW_PIECE = 1 << 20


def _tensorflow_draw(form, shape, scale, dtype, seed_words) -> Any:
    import tensorflow as tf

    if isinstance(seed_words, tuple):
        low, high = sampling.stream_key(form, shape, dtype, seed_words)
        key = tf.constant(low | high << 32, tf.uint64)
    else:
        low, high = sampling.static_key(form, shape, dtype)
        counter = tf.bitcast(tf.cast(seed_words, tf.int64), tf.uint64)
        words = _tensorflow_words([low | high << 32], counter, 2, tf.uint32)
        key = tf.bitcast(words, tf.uint64)
    size, piece = math.prod(shape), _TENSORFLOW_PIECE
    per_block, word = (2, tf.int64) if dtype == "float64" else (4, tf.int32)

    def values(start, count):
        counter = tf.stack([start // per_block, key])
        words = _tensorflow_words([key], counter, count, word)
        return tf.cast(_tensorflow_values(words, form, scale), dtype)

    if form == "uniform" or size <= piece:
        return tf.reshape(values(tf.constant(0, tf.uint64), size), shape)
    pieces = tf.TensorArray(dtype, size // piece, element_shape=[piece])

    def add_piece(i, pieces):
        return i + 1, pieces.write(i, values(tf.cast(i, tf.uint64) * piece, piece))

    _, pieces = tf.while_loop(
        lambda i, _: i < size // piece, add_piece, (0, pieces), parallel_iterations=1
    )
    drawn, rest = pieces.concat(), size % piece
    if rest:
        last = values(tf.constant(size - rest, tf.uint64), rest)
        drawn = tf.concat([drawn, last], 0)
    return tf.reshape(drawn, shape)


def _tensorflow_words(key, counter, count, dtype) -> Any:
    import tensorflow as tf

    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[count], key=key, counter=counter, alg=1, dtype=dtype
    )


def _tensorflow_values(words, form, scale) -> Any:
    import tensorflow as tf

    shift_right, both = tf.bitwise.right_shift, tf.bitwise.bitwise_and
    if words.dtype == tf.int64:
        odd = tf.bitwise.bitwise_or(shift_right(words, 10), 1)
        x = tf.cast(odd, tf.float64) * 2.0**-53
        if form == "truncated_normal":
            x = sampling.truncated_normal_quantile(x)
        return x * scale
    if form == "truncated_normal":
        knots = tf.constant(sampling.knots())
        sign = shift_right(words, 31)
        magnitude = tf.bitwise.bitwise_xor(words, sign)
        segment, position = shift_right(magnitude, 19), both(magnitude, (1 << 19) - 1)
        low = tf.gather(knots, segment)
        rise = tf.gather(knots, segment + 1) - low
        # rise * position // 2**19 without a product of more than 32 bits.
        value = shift_right(rise * both(position, 511), 9)
        value = shift_right(value + rise * shift_right(position, 9), 10) + low
        words = tf.bitwise.bitwise_xor(tf.bitwise.left_shift(value, 1), sign)
        scale = 2 * scale
    odd = tf.bitwise.bitwise_or(words, 1)
    return tf.cast(odd, tf.float32) * np.float32(scale / 2**31)


# JAX -------------------------------------------------------------------------------------
# Each element makes its block anew and takes one word of it. That is four times the work,
# and still the fastest that XLA has: all is one loop that writes nothing but the result,
# and that it divides among devices, as each of them needs it.


def _jax_draw(form, shape, scale, dtype, seed_words) -> Any:
    from jax import lax
    from jax import numpy as jnp

    if isinstance(seed_words, tuple):
        key = sampling.stream_key(form, shape, dtype, seed_words)
        # Or XLA computes what it can of the tensor while it compiles.
        key = lax.optimization_barrier(tuple(jnp.uint32(word) for word in key))
    else:
        seed, count = seed_words.astype(jnp.uint32)
        zero = jnp.uint32(0)
        static = sampling.static_key(form, shape, dtype)
        static = tuple(jnp.uint32(word) for word in static)
        key = _jax_philox((seed, zero, count, zero), static)[:2]
    low, high = _jax_indices(shape or (1,))
    bits = 1 if dtype == "float64" else 2  # of the index: the place in the block
    counter = (low >> bits | high << (32 - bits), high >> bits, *key)
    words = _jax_philox(counter, key)
    if dtype == "float64":
        second = low & 1 == 1
        first_half = jnp.where(second, words[2], words[0]).astype(jnp.uint64)
        second_half = jnp.where(second, words[3], words[1]).astype(jnp.uint64)
        signed = lax.bitcast_convert_type(first_half | second_half << 32, jnp.int64)
        x = (signed >> 10 | 1).astype(jnp.float64) * 2.0**-53
        if form == "truncated_normal":
            x = sampling.truncated_normal_quantile(x)
        return (x * scale).reshape(shape)
    odd_place, late = low & 1 == 1, low & 2 == 2
    word = jnp.where(
        late,
        jnp.where(odd_place, words[3], words[2]),
        jnp.where(odd_place, words[1], words[0]),
    )
    if form == "truncated_normal":
        word = _jax_interpolate(word)
        scale = 2 * scale
    odd = lax.bitcast_convert_type(word | 1, jnp.int32)
    x = odd.astype(jnp.float32) * np.float32(scale / 2**31)
    return x.astype(dtype).reshape(shape)


def _jax_indices(shape: tuple[int, ...]) -> Any:
    """The low and the high word of each element's number in row-major order."""
    from jax import lax
    from jax import numpy as jnp

    low = high = jnp.uint32(0)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        coordinate = lax.broadcasted_iota(jnp.uint32, shape, axis)
        step = coordinate * np.uint32(stride & 0xFFFFFFFF)
        low = low + step
        if math.prod(shape) > 1 << 32:
            carry = (low < step).astype(jnp.uint32)
            step = _jax_high_product(coordinate, stride & 0xFFFFFFFF)
            high = high + step + coordinate * np.uint32(stride >> 32) + carry
    return low, high


def _jax_philox(counter, key) -> Any:
    from jax import numpy as jnp

    m0, m1 = 0xD2511F53, 0xCD9E8D57
    c0, c1, c2, c3 = counter
    k0, k1 = (jnp.asarray(word, jnp.uint32) for word in key)
    for _ in range(10):
        c0, c1, c2, c3 = (
            _jax_high_product(c2, m1) ^ c1 ^ k0,
            c2 * np.uint32(m1),
            _jax_high_product(c0, m0) ^ c3 ^ k1,
            c0 * np.uint32(m0),
        )
        k0, k1 = k0 + np.uint32(0x9E3779B9), k1 + np.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def _jax_high_product(a: Any, b: int) -> Any:
    """The high word of a product, by 64-bit integers, which JAX hides by default.

    Not `lax.mulhi`: JAX 0.10 can't compile it in a program for several devices.
    """
    import jax
    from jax import lax

    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(True):
            product = lax.convert_element_type(a, np.uint64) * np.uint64(b)
            return lax.convert_element_type(product >> np.uint64(32), np.uint32)
    # JAX 0.6 can't do that inside a program: from the products of halves.
    low, high = np.uint32(b & 0xFFFF), np.uint32(b >> 16)
    a_low, a_high = a & 0xFFFF, a >> 16
    cross = a_low * high
    middle = (a_low * low >> 16) + (cross & 0xFFFF) + a_high * low
    return a_high * high + (cross >> 16) + (middle >> 16)


def _jax_interpolate(words: Any) -> Any:
    """`sampling.integer_quantile`, without its work in place."""
    from jax import numpy as jnp

    knots = jnp.asarray(sampling.knots()).astype(jnp.uint32)
    sign = jnp.uint32(0) - (words >> 31)
    magnitude = words ^ sign
    segment, position = magnitude >> 19, magnitude & ((1 << 19) - 1)
    low = knots.at[segment].get(mode="promise_in_bounds")
    rise = knots.at[segment + 1].get(mode="promise_in_bounds") - low
    value = (rise * (position & 511) >> 9) + rise * (position >> 9)
    return ((value >> 10) + low) << 1 ^ sign
