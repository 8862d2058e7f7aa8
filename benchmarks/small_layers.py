"""What part of the time to build a model of 1,000 small layers goes into drawing.

    KERAS_BACKEND=jax python benchmarks/small_layers.py

The share is that of all that happens inside the initializer, in CPU time: of three models,
the least and the largest. The first model, which warms up, does not count.
"""

import time

import keras

import keras_glorot

COUNT = 1000
SIZE = 64


class Timed(keras_glorot.GlorotUniform):
    seconds = 0.0

    def __call__(self, *args, **kwargs):
        start = time.process_time()
        drawn = super().__call__(*args, **kwargs)
        Timed.seconds += time.process_time() - start
        return drawn


def build():
    inputs = keras.Input((SIZE,))
    dense = [
        keras.layers.Dense(SIZE, kernel_initializer=Timed(seed=i)) for i in range(COUNT)
    ]
    return keras.Model(inputs, [layer(inputs) for layer in dense])


def measure():
    Timed.seconds, start = 0.0, time.process_time()
    build()
    return Timed.seconds, time.process_time() - start


if __name__ == "__main__":
    runs = [measure() for _ in range(4)][1:]
    shares = [drawing / total for drawing, total in runs]
    drawing, total = min(runs)
    print(
        f"{keras.backend.backend()}: {min(shares):.1%} to {max(shares):.1%} of building; "
        f"{drawing / COUNT * 1e6:.0f} of {total / COUNT * 1e6:.0f} µs per layer"
    )
