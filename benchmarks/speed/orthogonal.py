"""How fast orthogonal kernels are drawn: ours against Keras's `Orthogonal`.

    python benchmarks/speed/orthogonal.py [--shapes 64x64 3x3x64x128] [--backends torch]
                                          [--cpu] [--only-times]

One process per backend draws by turns, as `benchmarks/speed/draw.py` does. Figures are
medians, by the clock or, which is less changed by other work on the machine, by the
processor (`--cpu`). Keras's first draw of a shape, in which JAX compiles, does not count.
Memory is the growth of the largest resident set over the kernel's size, each in a fresh
process. `defect` is the largest entry of QᵀQ - I, in float64, without rows of zeros.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any

BACKENDS = ("tensorflow", "jax", "torch")
SHAPES = ("64x64", "512x512", "4096x4096", "3x3x64x128", "3x3x256x256", "512x2048")


def contestants():
    import keras

    import keras_glorot

    return {
        "ours": keras_glorot.GlorotOrthogonal(seed=1),
        "keras": keras.initializers.Orthogonal(seed=1),
    }


def finished(tensor):
    if type(tensor).__module__.startswith("jax"):
        tensor.block_until_ready()
    return tensor


def measure_times(shape, rounds):
    """Seconds, by the clock and of the processor, of each contestant by turns."""
    times = {name: [] for name in contestants()}
    for initializer in contestants().values():
        finished(initializer(shape))
    for _ in range(rounds):
        for name, initializer in contestants().items():
            time.sleep(0.005)
            start = time.perf_counter(), time.process_time()
            finished(initializer(shape))
            stop = time.perf_counter(), time.process_time()
            times[name].append([b - a for a, b in zip(start, stop, strict=True)])
    return times


def measure_memory(shape, name):
    import resource

    initializer = contestants()[name]
    finished(initializer((64, 64)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel = finished(initializer(shape))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del kernel
    return (after - before) * 1024 / (4 * math.prod(shape))


def measure_defect(shape, name):
    import keras
    import numpy as np

    kernel = keras.ops.convert_to_numpy(contestants()[name](shape))
    matrix = np.asarray(kernel, np.float64).reshape(-1, shape[-1])
    matrix = matrix[matrix.any(axis=1)]
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    product = tall.T @ tall
    return float(np.abs(product / product[0, 0] - np.eye(len(product))).max())


def ask_child(backend, *question):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, "--child", *map(str, question)]
    done: Any = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(kind, text, argument):
    shape = tuple(map(int, text.split("x")))
    measures = {
        "times": lambda: measure_times(shape, int(argument)),
        "memory": lambda: measure_memory(shape, argument),
        "defect": lambda: measure_defect(shape, argument),
    }
    print(json.dumps(measures[kind]()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--cpu", action="store_true", help="processor time, not the clock")
    parser.add_argument("--only-times", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    print(f"{'backend':12}{'shape':>12}{'ours':>12}{'keras':>12}{'ratio':>8}"
          f"{'memory':>14}{'defect':>18}")  # fmt: skip
    for backend in filter(importlib.util.find_spec, arguments.backends):
        for shape in arguments.shapes:
            size = math.prod(map(int, shape.split("x")))
            times = ask_child(backend, "times", shape, max(2, min(50, (1 << 21) // size)))
            ours, stock = (
                statistics.median(pair[arguments.cpu] for pair in times[name])
                for name in ("ours", "keras")
            )
            line = f"{backend:12}{shape:>12}{ours * 1e3:9.4g} ms{stock * 1e3:9.4g} ms"
            line += f"{stock / ours:8.3g}"
            if not arguments.only_times:
                memory, defect = (
                    [ask_child(backend, kind, shape, name) for name in ("ours", "keras")]
                    for kind in ("memory", "defect")
                )
                line += f"{memory[0]:7.2f}{memory[1]:7.2f}{defect[0]:9.1g}{defect[1]:9.1g}"
            print(line, flush=True)
    return None


if __name__ == "__main__":
    main()
