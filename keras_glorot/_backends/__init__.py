"""From a NumPy array to a tensor of TensorFlow, JAX or PyTorch, where it must live."""

import contextlib
import hashlib
import importlib
import random
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import keras
import numpy as np

from keras_glorot._backends.signals import Differentiator, Run
from keras_glorot._backends.values import Values
from keras_glorot._drawing.stream import Bounds

__all__ = [
    "assign",
    "check_same",
    "compiled_methods",
    "current_trace",
    "differentiator",
    "held_value",
    "is_symbolic",
    "is_tracing",
    "jax_sharding",
    "map_parts",
    "meta_tensor",
    "new_value",
    "outside_traces",
    "process_count",
    "shares_new_variables",
    "to_array",
    "to_sharded_tensor",
    "to_tensor",
    "unmoved_generators",
    "untouched",
    "values",
    "with_all_processes",
    "without_compilation",
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


def values(variable: keras.Variable) -> Values:
    """The values of a variable, read part by part: nothing of them stays on the host."""
    if keras.backend.backend() != "jax":
        return Values.of(to_array(variable))
    array: Any = keras.ops.convert_to_tensor(variable)
    if _is_whole_everywhere(array):
        return Values(array.shape, array.dtype, _parts(array, array.addressable_shards))
    # Each part once, from the first of the devices that hold it.
    firsts = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return Values(array.shape, array.dtype, _parts(array, firsts), _stack_processes)


def _is_whole_everywhere(array: Any) -> bool:
    """Whether each process that has a part of a JAX array has all of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return True
    held: dict[int, set[Bounds]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        held.setdefault(device.process_index, set()).add(_bounds(index, array.shape))
    return len(set(map(frozenset, held.values()))) == 1


def _parts(array: Any, shards: list[Any]) -> Callable[[], Iterable[Any]]:
    """Reads shards, each region once."""
    regions = {_bounds(shard.index, array.shape): shard.data for shard in shards}
    return lambda: ((bounds, _on_host(data)) for bounds, data in regions.items())


def _on_host(data: Any) -> np.ndarray:
    """The values of a JAX array on one device, to be read only.

    JAX keeps the host's copy in the array: here in a second one of the same buffer.
    """
    import jax

    view = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
    return np.asarray(view)


def _bounds(index: Any, shape: Iterable[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _stack_processes(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, as bits: JAX would make floats of doubles."""
    from jax.experimental import multihost_utils

    bits = np.frombuffer(array.tobytes(), np.uint8)
    stacked = np.asarray(multihost_utils.process_allgather(bits))
    return stacked.view(array.dtype).reshape(-1, *array.shape)


def held_value(variable: keras.Variable) -> Any:
    """What `assign` takes to give a variable back the value that it has now."""
    match keras.backend.backend():
        case "jax":
            return variable.value
        case "torch":  # which assigns to the same memory
            return to_array(variable).copy()
    return to_array(variable)


def assign(variable: keras.Variable, value: Any) -> None:
    """Gives a variable a value, a NumPy array or a tensor, on the device that it has."""
    if keras.backend.backend() == "jax":
        import jax

        old: Any = variable.value  # Keras keeps to a device only if it chose it itself
        if old.is_fully_addressable or not _is_local(value):
            value = jax.device_put(value, old.sharding if old.committed else None)
        else:  # `device_put` would compare all values with those of the other processes
            check_same(variable, value)
            array = np.asarray(value).astype(old.dtype, copy=False)
            value = new_value(variable, lambda bounds: array[_index(bounds)].copy())
    elif isinstance(value, np.ndarray) and value.ctypes.data % 64 == 0:
        value = to_tensor(value)  # TensorFlow aborts on memory that is aligned worse
    with writable([variable]):
        variable.assign(value)


def check_same(variable: keras.Variable, value: Any) -> None:
    """Raises an error if a variable that spans processes gets another value in each."""
    if keras.backend.backend() != "jax" or not _is_local(value):
        return
    array: Any = variable.value
    if not array.is_fully_addressable and not _is_same(np.asarray(value)):
        raise ValueError(
            f"The new value of {variable.path} must be the same in each process: give "
            "what makes it a seed. Received: values that differ from process to process"
        )


def _is_same(array: np.ndarray) -> bool:
    """Whether all processes have the same array."""
    bits: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(bits).digest()
    digests = _stack_processes(np.frombuffer(digest, np.uint8))
    return bool((digests == digests[0]).all())


def _is_local(value: Any) -> bool:
    return getattr(value, "is_fully_addressable", True)


def _index(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(*each) for each in bounds)


def new_value(variable: keras.Variable, draw_region: Callable[[Bounds], np.ndarray]) -> Any:
    """A value for a variable, spread as it is: JAX's devices draw their own parts."""
    shape = tuple(variable.shape)
    if keras.backend.backend() == "jax":
        sharding = getattr(variable.value, "sharding", None)
        if sharding is not None and len(sharding.device_set) > 1:
            return to_sharded_tensor(shape, sharding, draw_region)
    return draw_region(tuple((0, size) for size in shape))


def map_parts(
    variable: keras.Variable, function: Callable[[np.ndarray], np.ndarray]
) -> Any:
    """A value for a variable: a function of each element, computed part by part."""
    if keras.backend.backend() == "jax":
        array: Any = variable.value
        parts = {
            _bounds(shard.index, array.shape): shard.data
            for shard in array.addressable_shards
        }
        return new_value(variable, lambda bounds: function(_on_host(parts[bounds])))
    return function(to_array(variable))


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

    sharding = jax_sharding(layout)
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


def jax_sharding(layout: Any) -> Any:
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


def with_all_processes(tensors: Any) -> tuple[Any, Any]:
    """Arguments of a program of JAX, and where each of its results is to be.

    If one of them spans processes, the program runs in all of these: what only this one
    has must be the same in each, and all results come back to each.

    Raises:
        ValueError: If the processes have different values.
    """
    import jax

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
        if not _is_local(tensor):
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


def process_count() -> int:
    """How many processes run this program together."""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            # "/job:worker/replica:0/task:1/device:CPU:0", without a job in one process.
            names = [device.name for device in tf.config.list_logical_devices()]
            return len({name.rpartition("/device:")[0] for name in names})
        case "jax":
            import jax

            return jax.process_count()
        case "torch":
            from torch import distributed

            if distributed.is_available() and distributed.is_initialized():
                return distributed.get_world_size()
    return 1


def shares_new_variables() -> bool:
    """Whether a new variable gets the same value in all processes, whatever they draw."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.has_strategy()


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


@contextlib.contextmanager
def unmoved_generators() -> Iterator[None]:
    """Puts back the backend's global generators of random numbers: JAX has none."""
    match keras.backend.backend():
        case "tensorflow":
            with _unmoved_tensorflow_generators():
                yield
        case "torch":
            import torch

            # Devices that are not in use yet have nothing to put back.
            in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
            devices = range(torch.cuda.device_count() if in_use else 0)
            with torch.random.fork_rng(list(devices)):
                yield
        case _:
            yield


@contextlib.contextmanager
def _unmoved_tensorflow_generators() -> Iterator[None]:
    """For operations without a seed of their own, after `set_random_seed`.

    Each gets a seed, and a kernel for it that also has a state. So seeds inside come from
    another generator: the kernels of the seeds to come stay as they are.
    """
    try:
        from tensorflow.python.eager.context import context

        holder: Any = vars(context())
        generator = holder["_rng"]
    except (ImportError, KeyError):  # nobody has set a seed
        yield
        return
    holder["_rng"] = random.Random(0)
    try:
        yield
    finally:
        holder["_rng"] = generator


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


def current_trace() -> Any:
    """What stays equal until the backend enters another trace, or leaves this one.

    A traced loop, a vectorized function, a derivative on JAX, a compiled program and a call
    that is made again on the way back (remat) are traces of their own. Without the private
    names here fewer traces are told apart.
    """
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            try:  # what is called again on the way back is recorded by no tape now
                from tensorflow.python.eager.record import could_possibly_record
            except ImportError:
                return tf.executing_eagerly()
            return tf.executing_eagerly(), could_possibly_record()
        case "jax":
            try:
                from jax.extend.core import get_opaque_trace_state
            except ImportError:  # before JAX 0.10
                from jax.core import get_opaque_trace_state
            return get_opaque_trace_state(convention="keras_glorot")
        case "torch":
            try:
                from torch._C._autograd import _top_saved_tensors_default_hooks
                from torch._C._functorch import maybe_current_level
                from torch.autograd.forward_ad import _current_level
            except ImportError:
                return None
            hooks = _top_saved_tensors_default_hooks(True)
            return maybe_current_level(), _current_level, hooks
    return None


def compiled_methods(owner: Any) -> dict[str, Callable]:
    """By name, the Python functions in what an object holds of `tf.function` or `jax.jit`.

    Those of its class and its own attributes, but not of the classes of Keras.
    """
    kinds: tuple[type, ...] = ()
    name = ""
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            kinds, name = (tf.types.experimental.PolymorphicFunction,), "python_function"
        case "jax":
            import jax

            kinds, name = (type(jax.jit(len)),), "__wrapped__"
    if not kinds:
        return {}
    methods = {}
    for kind in reversed(type(owner).__mro__):
        if not kind.__module__.startswith("keras."):
            for key, value in vars(kind).items():
                methods.pop(key, None)
                if isinstance(value, kinds):
                    methods[key] = types.MethodType(getattr(value, name), owner)
    for key, value in vars(owner).items():
        if isinstance(value, kinds):
            methods[key] = getattr(value, name)
    return methods


def without_compilation() -> contextlib.AbstractContextManager[Any]:
    """Where `torch.compile` leaves Python functions as they are."""
    if keras.backend.backend() == "torch":
        import torch

        if hasattr(torch.compiler, "set_stance"):  # since 2.6
            return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def differentiator(run: Run) -> Differentiator:
    """What runs and differentiates `run`; on JAX compiled once for all calls.

    `run(tap, *arguments)` is a context that gives the objective and extras. Eager backends
    differentiate in the context: there they may call layers again.

    Returns:
        A function of the arguments: the signals of all taps, and the extras as arrays.
    """
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax", "torch"):
        raise RuntimeError("Gradients need KERAS_BACKEND to be tensorflow, jax or torch.")
    return importlib.import_module(f"{__name__}.{backend}").differentiator(run)
