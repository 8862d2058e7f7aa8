"""Glorot (Xavier) initialization that is right in every Keras layer."""

from keras_glorot import installed as _installed

if _missing := _installed.missing_backend():
    raise ModuleNotFoundError(_missing)

from importlib.metadata import version as _version

from keras_glorot._models.survey import layer_fans
from keras_glorot.fans import Fans, compute_fans
from keras_glorot.gains import calculate_gain
from keras_glorot.initializers import (
    GlorotNormal,
    GlorotOrthogonal,
    GlorotUniform,
    as_default,
)
from keras_glorot.layer_rules import register_fans
from keras_glorot.tables import Finding, Table
from keras_glorot.tools.audit import audit
from keras_glorot.tools.calibrate import calibrate
from keras_glorot.tools.histograms import plot_histograms
from keras_glorot.tools.initialize import initialize
from keras_glorot.tools.propagate import propagate
from keras_glorot.tools.report import report

__all__ = [
    "Fans",
    "Finding",
    "GlorotNormal",
    "GlorotOrthogonal",
    "GlorotUniform",
    "Table",
    "__version__",
    "as_default",
    "audit",
    "calculate_gain",
    "calibrate",
    "compute_fans",
    "initialize",
    "layer_fans",
    "plot_histograms",
    "propagate",
    "register_fans",
    "report",
]

__version__ = _version("keras-glorot")


def __dir__() -> list[str]:
    """The public names, without the modules that they come from."""
    return __all__
