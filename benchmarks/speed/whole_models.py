"""Time and memory of `initialize` and `audit` on whole models, time of `calibrate`.

    KERAS_BACKEND=jax python benchmarks/speed/whole_models.py EfficientNetB0 MobileNetV2
    KERAS_BACKEND=jax python benchmarks/speed/whole_models.py --parameters 1e9
    KERAS_BACKEND=jax python benchmarks/speed/whole_models.py --passes

The second builds one Dense layer of that size, and measures the resident memory, sampled
every millisecond, beyond what the model itself holds. The third one tells the passes and
the CPU time of `calibrate` beside that of `propagate`, on three models, twice.
"""

import argparse
import os
import threading
import time

import keras
import numpy as np
from keras import layers

import keras_glorot


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(function, *arguments):
    """Seconds, and the peak of the memory above that before the call."""
    peak = before = resident_bytes()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return result, seconds, peak - before


def wide(parameters: int) -> keras.Layer:
    """A layer with one huge kernel, built without drawing it."""
    side = round(parameters**0.5)
    layer = keras.layers.Dense(side, use_bias=False, kernel_initializer="zeros")
    layer.build((None, side))
    layer.kernel_initializer = keras.initializers.get("xavier_uniform")
    layer.kernel.assign(np.ones((side, side), "float32"))  # the pages must be there
    keras.ops.convert_to_numpy(layer.kernel[:1])  # and JAX be done with it
    return layer


def mobile_net() -> keras.Model:
    return keras.applications.MobileNetV2(weights=None, input_shape=(64, 64, 3))


def chain() -> keras.Model:
    hidden = [layers.Dense(128, "gelu") for _ in range(50)]
    return keras.Sequential([keras.Input((128,)), *hidden, layers.Dense(10)])


def transformer() -> keras.Model:
    inputs = keras.Input((16, 64))
    x = layers.Dense(64)(inputs)
    for _ in range(6):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 16)(h, h)
        h = layers.Dense(256, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(64)(h)
    outputs = layers.Dense(10)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs)


def tell_passes() -> None:
    for build in (mobile_net, chain, transformer):
        keras.utils.set_random_seed(0)
        model = build()
        shape = (64, *model.input_shape[1:])
        x = np.random.default_rng(1).standard_normal(shape).astype("float32")
        weights = model.get_weights()
        for _ in range(2):
            model.set_weights(weights)
            begin = time.process_time()
            keras_glorot.propagate(model, x, verbose=False)
            middle = time.process_time()
            table = keras_glorot.calibrate(model, x, verbose=False)
            seconds, other = time.process_time() - middle, middle - begin
            passes = table.note.split()[-1].rstrip(".")
            print(
                f"{build.__name__}: calibrate {seconds:.2f} s of CPU in {passes} passes, "
                f"propagate {other:.2f} s: {seconds / other:.2f} times"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=["EfficientNetB0"])
    parser.add_argument("--parameters", type=float)
    parser.add_argument("--passes", action="store_true")
    options = parser.parse_args()
    print(f"{keras.backend.backend()}, Keras {keras.__version__}, {os.cpu_count()} cores")
    if options.passes:
        tell_passes()
        return
    for name in ["Dense"] if options.parameters else options.names:
        if options.parameters:
            model = wide(int(options.parameters))
        else:
            model = getattr(keras.applications, name)(weights=None)
        size = model.count_params()
        largest = max(np.prod(v.shape) for v in model.weights) * 4
        for work, argument in (
            (keras_glorot.initialize, "xavier_uniform"),
            (keras_glorot.initialize, "xavier_normal"),
            (keras_glorot.audit, None),
            (keras_glorot.audit, None),
        ):
            arguments = [model, argument, 0] if argument else [model]
            table, seconds, peak = measure(work, *arguments)
            print(
                f"{name}: {work.__name__} {argument or ''}: {seconds:.2f} s, "
                f"{seconds / size * 1e9:.2f} ns per element, peak {peak / largest:.2f} x "
                f"the largest variable, {len(table.findings)} findings"
            )


if __name__ == "__main__":
    main()
