"""The backend that Keras runs on: its tensors, its traces, its gradients.

The names are those of `common`, where each says its job and does it as any backend of Keras
can. The file that has the backend's name does some of them in its own way.
"""

import importlib
import importlib.util

import keras

from keras_glorot._backends import common
from keras_glorot._backends.common import *  # noqa: F403 - so that tools know the names

_path = f"{__name__}.{keras.backend.backend()}"
if importlib.util.find_spec(_path):
    _own = vars(importlib.import_module(_path))
    globals().update({name: _own[name] for name in common.__all__ if name in _own})
