"""The only place that touches what Keras does not export."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_glorot.sampling import Bounds

__all__ = [
    "custom_objects_in_scope",
    "is_on_meta_device",
    "is_shape_inference",
    "seed_words",
    "to_sharded_tensor",
    "to_tensor",
]


def custom_objects_in_scope() -> dict[str, Any]:
    """The objects of the innermost `custom_object_scope`, which a new one would hide."""
    try:
        from keras.src.backend.common import global_state

        return global_state.get_global_attribute("custom_objects_scope_dict") or {}
    except (ImportError, AttributeError):
        return {}


def seed_words(seed: "int | keras.random.SeedGenerator") -> tuple[int, ...] | None:
    """The numbers that a seed stands for; a `SeedGenerator` advances.

    None where a generator's state is only a symbol, because the backend is tracing.
    """
    if isinstance(seed, int):
        return (seed,)
    state = seed.next()
    if _is_symbolic(state):
        return None
    return tuple(np.asarray(keras.ops.convert_to_numpy(state)).tolist())


def is_shape_inference() -> bool:
    """Whether Keras calls a model for its shapes alone, so that no value is looked at.

    A weight that is still to be filled is then asked of its initializer at every use.
    """
    try:
        from keras.src.backend.common.symbolic_scope import in_symbolic_scope
    except ImportError:
        return False
    return in_symbolic_scope()


def is_on_meta_device() -> bool:
    """Whether torch tensors made here have a shape and no values."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    return torch.empty(0).is_meta or keras.ops.zeros(()).is_meta


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


def to_sharded_tensor(
    shape: tuple[int, ...], layout: Any, draw_region: Callable[[Bounds], np.ndarray]
) -> Any:
    """Assembles a JAX array from the regions that its devices hold, each drawn once.

    Args:
        shape: The whole array's shape.
        layout: A `keras.distribution.TensorLayout` or a `jax.sharding.Sharding`.
        draw_region: Called with a start and a stop for each axis.
    """
    import jax

    sharding = getattr(layout, "backend_layout", layout)
    mesh = getattr(sharding, "mesh", None)
    if isinstance(mesh, jax.sharding.AbstractMesh):
        # Keras opens the concrete mesh as the scope's, and hands over the abstract one.
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    devices_of: dict[Bounds, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
        )
        devices_of.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, (first, *others) in devices_of.items():
        array = draw_region(bounds)
        # Only one device may live in the array's memory: a donated buffer is written to.
        arrays += [jax.device_put(array, other, may_alias=False) for other in others]
        arrays.append(jax.device_put(array, first))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _is_symbolic(tensor: Any) -> bool:
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.is_symbolic_tensor(tensor)
        case "jax":
            from jax.core import Tracer

            return isinstance(tensor, Tracer)
    return False
