"""Keras's global state: one set of counters, generators and scopes for each thread."""

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_glorot import _backends as backends

# `_is_keras_as_expected` notices what is missing, and warns.
try:
    from keras.src.backend.common.global_state import (
        get_global_attribute,
        set_global_attribute,
    )
except ImportError:

    def get_global_attribute(name, default=None, set_to_default=False) -> Any:
        return None

    def set_global_attribute(name, value) -> None:
        pass


__all__ = [
    "get_global_attribute",
    "is_random_seeded",
    "is_shape_inference",
    "set_global_attribute",
    "unmoved_generators",
]


@contextlib.contextmanager
def unmoved_generators() -> Iterator[None]:
    """Puts back whatever global generators of numbers and of names were moved inside.

    They are those of Python, NumPy, the backend and Keras; of Keras's, this thread's.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one
    names = copy.copy(get_global_attribute("object_name_uids"))
    generator = get_global_attribute("global_seed_generator")
    drawn = None if generator is None else backends.held_value(generator.state)
    try:
        with backends.unmoved_generators():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        set_global_attribute("object_name_uids", names)
        # One that was made inside has a seed that the user has not drawn.
        set_global_attribute("global_seed_generator", generator)
        if generator is not None:
            backends.assign(generator.state, drawn)


def is_random_seeded() -> bool:
    """Whether `keras.utils.set_random_seed` has been called, as far as Keras tells.

    Keras forgets it in `clear_session` and in other threads. Python's `random`, which it
    seeds, does not: once seen is enough.
    """
    global _is_random_seeded
    if get_global_attribute("global_random_seed") is not None:
        _is_random_seeded = True
    return _is_random_seeded


_is_random_seeded = False


def is_shape_inference() -> bool:
    """Whether Keras runs here for shapes alone, so that no value is looked at.

    A weight that is still to be filled is then asked of its initializer at every use.
    """
    is_meta = get_global_attribute("torch_device") == "meta"
    return is_meta or get_global_attribute("symbolic_scope") is not None
