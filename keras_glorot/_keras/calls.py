"""Calls of layers: their masks, their activations, their errors."""

import re
from contextlib import AbstractContextManager
from typing import Any

import keras

from keras_glorot._keras.graph import replaced_attribute

try:
    from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
except ImportError:
    get_keras_mask = set_keras_mask = None


__all__ = ["copy_mask", "error_reason", "get_keras_mask", "set_keras_mask", "without_remat"]


def copy_mask(source: Any, target: Any) -> None:
    """Copies the Keras mask, which says which timesteps count, from source to target."""
    if get_keras_mask is not None and set_keras_mask is not None:
        set_keras_mask(target, get_keras_mask(source))


def without_remat(layer: keras.Layer) -> AbstractContextManager[None]:
    """Lets a layer of a `RematScope` keep its activations: it is then called once only."""
    return replaced_attribute(layer, "_remat_mode", None)


def error_reason(error: Exception) -> str:
    """The message, without the text and the colors that Keras puts around the reason."""
    # The text of a KeyError is a quoted one.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = _AFTER.split(text)[0]
    text = _BEFORE.split(text)[-1].strip()
    if text.startswith("in user code:"):  # TensorFlow quotes it first
        text = text.splitlines()[-1].strip()
    if isinstance(error, LookupError) or not text:
        return f"{type(error).__name__}: {text}".removesuffix(": ")
    return text


# In loading, in a symbolic call, and around a call of a layer.
_BEFORE = re.compile(
    r"(?:Exception|Error) encountered(?: during deserialization)?:\s"
    r"|Example error message for object .*:\n"
    r"|Exception encountered when calling .*\(\)\.\s"
)
_AFTER = re.compile(
    r"\n\n(?:Arguments received by |List of objects that could not be loaded:)"
    r"|Full object config: "
)
