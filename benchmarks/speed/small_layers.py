"""What part of the time to build a model of 1,000 small layers goes into drawing.

    KERAS_BACKEND=jax python benchmarks/speed/small_layers.py

CPU time of three models, the median, after one that warms up: of all that happens inside
the initializer, of what in it makes the values, of what hands them over to the backend,
and of Keras's own initializer.
"""

import statistics
import time
from collections import Counter

import keras

import keras_glorot
from keras_glorot import _backends as backends
from keras_glorot._drawing import distributions, stream

COUNT = 1000
SIZE = 64
seconds: Counter[str] = Counter()


def timed(name, function):
    def measured(*args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        seconds[name] += time.process_time() - start
        return result

    return measured


def build(initializer):
    class Timed(initializer):
        __call__ = timed("initializer", initializer.__call__)

    seconds.clear()
    start = time.process_time()
    inputs = keras.Input((SIZE,))
    dense = [
        keras.layers.Dense(SIZE, kernel_initializer=Timed(seed=i)) for i in range(COUNT)
    ]
    keras.Model(inputs, [layer(inputs) for layer in dense])
    seconds["building"] = time.process_time() - start
    return dict(seconds)


def measure(initializer):
    runs = [build(initializer) for _ in range(4)][1:]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def report(title, measured):
    total = measured.pop("building")
    shares = (
        f"{name} {part / total:.1%} ({part / COUNT * 1e6:.0f} µs)"
        for name, part in sorted(measured.items(), key=lambda item: -item[1])
    )
    print(f"{title:6} {total / COUNT * 1e6:.0f} µs per layer: {', '.join(shares)}")


if __name__ == "__main__":
    print(f"{keras.backend.backend()}, {stream.native_name()}")
    report("stock", measure(keras.initializers.GlorotUniform))
    distributions.draw = timed("draw", distributions.draw)
    backends.to_tensor = timed("hand-over", backends.to_tensor)
    report("ours", measure(keras_glorot.GlorotUniform))
