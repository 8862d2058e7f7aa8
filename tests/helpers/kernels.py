"""Lets NumPy, or one clone of the native kernel, draw in a test."""

import types

from keras_glorot._drawing import stream

NATIVE = stream.native
KERNELS = ["NumPy"] if NATIVE is None else ["NumPy", *NATIVE.CLONES]


def use_kernel(name, monkeypatch):
    if name == "NumPy":
        monkeypatch.setattr(stream, "native", None)
    else:
        number = NATIVE.CLONES.index(name)
        clone = types.SimpleNamespace(
            CLONES=(name,),
            philox=NATIVE.philox,
            fill=lambda _, *arguments: NATIVE.fill(number, *arguments),
            multiply=lambda _, *arguments: NATIVE.multiply(number, *arguments),
        )
        monkeypatch.setattr(stream, "native", clone)
