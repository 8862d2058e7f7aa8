"""What it costs to ask the layer for its fans, in microseconds per variable.

    KERAS_BACKEND=tensorflow python benchmarks/speed/fans_cost.py

It is the thread's processor time from the call of an initializer until it knows fans
and activation; the drawing is left out. Each variable asks once, with caches as the
building of a layer leaves them, and then again in a loop. A late model is one without
`build`, whose variables Keras fills belatedly: there it counts the lookup of variable
and owner, and beside it the asking during the symbolic call, which Keras may repeat.
"""

import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_glorot import layer_rules
from keras_glorot._keras.call_site import current_call_site

LAYERS = keras.layers


AGAIN = 20


class Clock(keras.initializers.Initializer):
    """Asks as GlorotUniform does, notes the time, and draws nothing."""

    def __init__(self):
        self.times = {"being built": [], "late": []}

    def __call__(self, shape, dtype=None):
        start = time.thread_time()
        self.ask(shape)
        first = time.thread_time()
        for _ in range(AGAIN):
            site = self.ask(shape)
        again = (time.thread_time() - first) / AGAIN
        kind = "being built" if site.variable is None else "late"
        self.times[kind].append((first - start, again))
        return keras.ops.zeros(shape, dtype)

    def ask(self, shape):
        site = current_call_site(self)
        layer_rules.kernel_fans(shape, *site)
        layer_rules.kernel_activation(*site)
        return site


class Late(keras.Model):
    def __init__(self, layers):
        super().__init__()
        self.blocks = list(layers)

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def report(what, times):
    first, again = (1e6 * statistics.median(spent) for spent in zip(*times, strict=True))
    print(f"{what:28} {len(times):3} variables: {first:5.1f} µs, again {again:5.1f} µs")


def main():
    print(f"Keras {keras.__version__} on {keras.backend.backend()}")
    kinds = {
        "Dense": lambda c: LAYERS.Dense(4, kernel_initializer=c),
        "Conv1D, groups": lambda c: LAYERS.Conv1D(4, 1, groups=2, kernel_initializer=c),
        "DepthwiseConv1D": lambda c: LAYERS.DepthwiseConv1D(1, depthwise_initializer=c),
        "EinsumDense": lambda c: LAYERS.EinsumDense(
            "abc,cd->abd", (None, 4), kernel_initializer=c
        ),
    }
    LAYERS.Dense(1, kernel_initializer=Clock()).build((None, 4))  # the one-time check
    for name, make in kinds.items():
        clock = Clock()
        outer = LAYERS.Identity(name="outer")
        with keras.name_scope("outer", caller=outer), keras.name_scope("block"):
            for _ in range(300):
                make(clock).build((None, 3, 4))
        report(name, clock.times["being built"])
    clock = Clock()
    make = kinds["DepthwiseConv1D"]
    Late(make(clock) for _ in range(300))(np.zeros((1, 3, 4), "float32"))
    report("late model, symbolic call", clock.times["being built"])
    report("late model, filled", clock.times["late"])


if __name__ == "__main__":
    main()
