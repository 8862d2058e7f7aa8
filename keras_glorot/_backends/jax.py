"""JAX's own ways."""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.core import Tracer
from jax.experimental import multihost_utils

from keras_glorot._backends import common
from keras_glorot._backends.signals import (
    Differentiator,
    Run,
    Signal,
    Summary,
    to_numpy,
)
from keras_glorot._backends.traced import Program
from keras_glorot._backends.values import Values
from keras_glorot._drawing.stream import Bounds

_CompiledFunction = type(jax.jit(len))

process_count = jax.process_count
to_tensor = jax.device_put
numpy = jnp


def to_sharded_tensor(
    shape: tuple[int, ...], layout: Any, draw_region: Callable[[Bounds], np.ndarray]
) -> Any:
    sharding = _sharding(layout)
    devices_of: dict[Bounds, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices_of.setdefault(_bounds(index, shape), []).append(device)
    arrays = []
    for bounds, (first, *others) in devices_of.items():
        array = draw_region(bounds)
        # Only one device may live in the array's memory: a donated buffer is written to.
        # (`may_alias=False` does not keep `device_put` from it.)
        arrays += [jax.device_put(array.copy(), other) for other in others]
        arrays.append(jax.device_put(array, first))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _sharding(layout: Any) -> Any:
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


def values(variable: keras.Variable) -> Values:
    array: Any = keras.ops.convert_to_tensor(variable)
    if array.is_fully_addressable or array.is_fully_replicated:
        return Values(array.shape, array.dtype, _parts(array, array.addressable_shards))
    # Each part once, from the first of the devices that hold it.
    firsts = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return Values(array.shape, array.dtype, _parts(array, firsts), _stack_processes)


def _parts(array: Any, shards: list[Any]) -> Callable[[], Iterable[Any]]:
    """Reads shards, each region once."""
    regions = {_bounds(shard.index, array.shape): shard.data for shard in shards}
    return lambda: ((bounds, _on_host(data)) for bounds, data in regions.items())


def _on_host(data: Any) -> np.ndarray:
    """The values of an array on one device, to be read only.

    JAX keeps the host's copy in the array: here in a second one of the same buffer.
    """
    view = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
    return np.asarray(view)


def _bounds(index: Any, shape: Iterable[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def held_value(variable: keras.Variable) -> Any:
    return variable.value


def new_value(variable: keras.Variable, draw_region: Callable[[Bounds], np.ndarray]) -> Any:
    sharding = getattr(variable.value, "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return to_sharded_tensor(tuple(variable.shape), sharding, draw_region)
    return common.new_value(variable, draw_region)


def assign(variable: keras.Variable, value: Any) -> None:
    old: Any = variable.value  # Keras keeps to a device only if it chose it itself
    if old.is_fully_addressable or not _is_local(value):
        value = jax.device_put(value, old.sharding if old.committed else None)
    else:  # `device_put` would compare all values with those of the other processes
        check_same(variable, value)
        array = np.asarray(value).astype(old.dtype, copy=False)
        value = new_value(
            variable, lambda bounds: array[tuple(slice(*each) for each in bounds)].copy()
        )
    variable.assign(value)


def check_same(variable: keras.Variable, value: Any) -> None:
    array: Any = variable.value
    spans = not array.is_fully_addressable
    if spans and _is_local(value) and not _is_same(np.asarray(value)):
        raise ValueError(
            f"The new value of {variable.path} must be the same in each process: give "
            "its initializer a seed. Received: values that differ from process to process"
        )


def _is_same(array: np.ndarray) -> bool:
    """Whether all processes have the same array."""
    bits: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(bits).digest()
    digests = _stack_processes(np.frombuffer(digest, np.uint8))
    return bool((digests == digests[0]).all())


def _is_local(value: Any) -> bool:
    return getattr(value, "is_fully_addressable", True)


def _stack_processes(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, as bits: JAX would make floats of doubles."""
    bits = np.frombuffer(array.tobytes(), np.uint8)
    stacked = np.asarray(multihost_utils.process_allgather(bits))
    return stacked.view(array.dtype).reshape(-1, *array.shape)


def _with_all_processes(tensors: Any) -> tuple[Any, Any]:
    """Arguments of a program, and where each of its results is to be.

    If one of them spans processes, the program runs in all of these: values that only this
    one has must be the same in each, and all results come back to each.

    Raises:
        ValueError: If the processes have different values.
    """
    spanning: list[Any] = [
        tensor
        for tensor in keras.tree.flatten(tensors)
        if isinstance(tensor, jax.Array) and not tensor.is_fully_addressable
    ]
    if not spanning:
        return tensors, None
    everywhere = jax.sharding.NamedSharding(
        spanning[0].sharding.mesh, jax.sharding.PartitionSpec()
    )

    def spread(tensor: Any) -> Any:
        if tensor is None or not _is_local(tensor):
            return tensor
        array = np.asarray(tensor)
        if not _is_same(array):
            raise ValueError(
                "Argument `x` must be the same batch in each process, as must all weights "
                "that do not span them. Received: an array of shape "
                f"{array.shape} that differs from process to process"
            )
        return jax.make_array_from_callback(
            array.shape, everywhere, lambda index: array[index]
        )

    return keras.tree.map_structure(spread, tensors), everywhere


def is_tracing() -> bool:
    try:  # 100 times faster than to make an array and look at it
        from jax._src.core import trace_state_clean
    except ImportError:
        return is_symbolic(jnp.zeros(()))
    return not trace_state_clean()


def is_symbolic(tensor: Any) -> bool:
    return isinstance(tensor, Tracer)


def current_trace() -> Any:
    try:
        from jax.extend.core import get_opaque_trace_state
    except ImportError:  # before JAX 0.10
        from jax.core import get_opaque_trace_state
    return get_opaque_trace_state(convention="keras_glorot")


def python_function(value: Any) -> Callable | None:
    is_compiled = isinstance(value, _CompiledFunction)
    return getattr(value, "__wrapped__", None) if is_compiled else None


class _Program(Program):
    def unknown_zero(self) -> Any:
        return lax.optimization_barrier(jnp.uint32(0))

    def indices(self, shape: tuple[int, ...], zero: Any) -> tuple[Any, Any]:
        size = math.prod(shape)
        low = high = zero
        for axis in range(len(shape)):  # one by one: so XLA can divide it among devices
            stride = math.prod(shape[axis + 1 :])
            coordinate = lax.broadcasted_iota(jnp.uint32, shape, axis)
            step = coordinate * np.uint32(stride & 0xFFFFFFFF)
            low = low + step
            if size > 1 << 32:
                carry = (low < step).astype(jnp.uint32)
                step = self.high_product(coordinate, stride & 0xFFFFFFFF)
                high = high + step + coordinate * np.uint32(stride >> 32) + carry
        return low, high

    def take(self, table: np.ndarray, indices: Any) -> Any:
        return jnp.asarray(table).at[indices].get(mode="promise_in_bounds")

    def halves(self, word: Any) -> tuple[Any, Any]:
        return lax.convert_element_type(word, np.uint32), np.uint32(0)  # it has 32 bits

    def high_product(self, a: Any, b: int) -> Any:
        # Not `lax.mulhi`: JAX 0.10 can't compile it in a program for several devices.
        if isinstance(a, np.generic):
            return super().high_product(a, b)
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

    def host_call(
        self, function: Callable, states: list[Any], shape: tuple[int, ...], dtype: str
    ) -> Any:
        held = jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))

        def call(*states: Any) -> np.ndarray:  # without doubles where JAX has none
            return function(*states).astype(held.dtype, copy=False)

        return jax.pure_callback(call, held, *states, vmap_method="sequential")

    def spread(self, drawn: Any, layout: Any) -> Any:
        return lax.with_sharding_constraint(drawn, _sharding(layout))


program = _Program()


def readable(tensor: Any) -> Any:
    return lax.stop_gradient(tensor).astype(jnp.promote_types(tensor.dtype, jnp.float32))


def differentiator(run: Run) -> Differentiator:
    taps: list[tuple[Signal, Summary | None, Summary, Any]] = []

    def objective(probes: Sequence[Any], *arguments: Any) -> Any:
        """A tensor that a probe is added to has the gradient of the probe."""
        rest, values = iter(probes), []
        taps.clear()

        def tap(tensor, of_value, of_gradient):
            signal = Signal()
            probe = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            taps.append((signal, of_value, of_gradient, probe))
            values.append(tensor if of_value else None)
            return tensor + next(rest, 0), signal

        with run(tap, *arguments) as (target, extras):
            return target, (values, extras)

    def program(*arguments: Any) -> Any:
        jax.eval_shape(objective, (), *arguments)  # tells the shapes of the probes
        probes = [jnp.zeros_like(probe) for *_, probe in taps]
        return jax.grad(objective, has_aux=True)(probes, *arguments)

    @functools.cache
    def compiled(placement: Any) -> Callable:
        # It runs a few times at most: most of the time goes into compiling it.
        options: Any = {"xla_backend_optimization_level": 0}
        return jax.jit(program, compiler_options=options, out_shardings=placement)

    def differentiate(*arguments: Any) -> list[np.ndarray]:
        arguments, placement = _with_all_processes(arguments)
        gradients, (values, extras) = compiled(placement)(*arguments)
        for signal, of_value, of_gradient, _ in taps:  # frees each as it goes
            value, gradient = values.pop(0), gradients.pop(0)
            signal.value = of_value and of_value(to_numpy(value))
            signal.gradient = of_gradient(to_numpy(gradient))
        return list(map(to_numpy, extras))

    return differentiate


@contextlib.contextmanager
def symbols_beside_values() -> Iterator[None]:
    """JAX asks any operand for an array first, and a symbol answers with an error."""
    symbol: Any = keras.KerasTensor
    method = symbol.__jax_array__
    del symbol.__jax_array__
    try:
        yield
    finally:
        symbol.__jax_array__ = method
