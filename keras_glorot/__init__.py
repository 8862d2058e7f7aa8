"""Glorot (Xavier) initialization that is right in every Keras layer."""

from importlib.metadata import version

from keras_glorot.auditing import audit
from keras_glorot.fans import Fans, compute_fans, layer_fans, register_fans
from keras_glorot.gains import calculate_gain
from keras_glorot.initialization import initialize
from keras_glorot.initializers import GlorotNormal, GlorotUniform, as_default
from keras_glorot.propagation import propagate

__all__ = [
    "Fans",
    "GlorotNormal",
    "GlorotUniform",
    "__version__",
    "as_default",
    "audit",
    "calculate_gain",
    "compute_fans",
    "initialize",
    "layer_fans",
    "propagate",
    "register_fans",
]

__version__ = version("keras-glorot")
