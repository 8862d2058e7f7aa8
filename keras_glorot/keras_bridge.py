"""The only place that touches what Keras does not export."""

from typing import Any

import keras
import numpy as np

__all__ = ["custom_objects_in_scope", "seed_words"]


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


def _is_symbolic(tensor: Any) -> bool:
    match keras.backend.backend():
        case "tensorflow":
            import tensorflow as tf

            return tf.is_symbolic_tensor(tensor)
        case "jax":
            from jax.core import Tracer

            return isinstance(tensor, Tracer)
    return False
