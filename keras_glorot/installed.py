"""Which backend Keras will take, and how to get it: asked before Keras is imported."""

import importlib.util
import json
import os
import sys
from pathlib import Path

__all__ = ["backend_name", "missing_backend"]

BACKENDS = ("tensorflow", "jax", "torch")


def missing_backend() -> str | None:
    """The package to install or name to set, where Keras would end in a traceback."""
    backend = backend_name()
    if backend in sys.modules or importlib.util.find_spec(backend):
        return None
    there = [name for name in BACKENDS if importlib.util.find_spec(name)]
    ways = [f"set KERAS_BACKEND={name} before Keras is imported" for name in there]
    wanted = backend if backend in BACKENDS else "tensorflow"
    ways.append(f'pip install "keras-glorot[{wanted}]" and set KERAS_BACKEND={wanted}')
    return f"Keras's backend {backend!r} is not installed: {', or '.join(ways)}."


def backend_name() -> str:
    """The backend that Keras will take: by its own rules, without the time it takes."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name
    home = os.path.expanduser("~")
    folder = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
    folder = os.path.expanduser(os.environ.get("KERAS_HOME", folder))
    try:
        return json.loads(Path(folder, "keras.json").read_text("utf-8"))["backend"]
    except (OSError, ValueError, LookupError, TypeError):
        return "tensorflow"
