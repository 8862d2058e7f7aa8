"""Time and memory of `initialize` and `audit` on whole models.

    KERAS_BACKEND=jax python benchmarks/speed/whole_models.py EfficientNetB0 MobileNetV2
    KERAS_BACKEND=jax python benchmarks/speed/whole_models.py --parameters 1e9

The second builds one Dense layer of that size, and measures the resident memory, sampled
every millisecond, beyond what the model itself holds.
"""

import argparse
import os
import threading
import time

import keras
import numpy as np

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=["EfficientNetB0"])
    parser.add_argument("--parameters", type=float)
    options = parser.parse_args()
    print(f"{keras.backend.backend()}, Keras {keras.__version__}, {os.cpu_count()} cores")
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
