"""How fast orthogonal kernels are drawn: ours against Keras's `Orthogonal`.

    python benchmarks/speed/orthogonal.py [--sides 64 512 4096] [--backends torch] [--cpu]

One process per backend draws by turns, as `benchmarks/speed/draw.py` does. Figures are
medians, by the clock or, which is less changed by other work on the machine, by the
processor (`--cpu`). Keras's first draw of a shape, in which JAX compiles, does not count.
Memory is the growth of the largest resident set over the kernel's size, each in a fresh
process. `defect` is the largest entry of QᵀQ - I, in float64.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

BACKENDS = ("tensorflow", "jax", "torch")


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


def measure_times(side, rounds):
    """Seconds, by the clock and of the processor, of each contestant by turns."""
    times = {name: [] for name in contestants()}
    for initializer in contestants().values():
        finished(initializer((side, side)))
    for _ in range(rounds):
        for name, initializer in contestants().items():
            time.sleep(0.005)
            start = time.perf_counter(), time.process_time()
            finished(initializer((side, side)))
            stop = time.perf_counter(), time.process_time()
            times[name].append([b - a for a, b in zip(start, stop, strict=True)])
    return times


def measure_memory(side, name):
    import resource

    initializer = contestants()[name]
    finished(initializer((64, 64)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel = finished(initializer((side, side)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del kernel
    return (after - before) * 1024 / (4 * side * side)


def measure_defect(side, name):
    import keras
    import numpy as np

    kernel = keras.ops.convert_to_numpy(contestants()[name]((side, side)))
    kernel = np.asarray(kernel, np.float64)
    return float(np.abs(kernel.T @ kernel - np.eye(side)).max())


def ask_child(backend, *question):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, "--child", *map(str, question)]
    done: Any = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(kind, side, argument):
    measures = {
        "times": lambda: measure_times(int(side), int(argument)),
        "memory": lambda: measure_memory(int(side), argument),
        "defect": lambda: measure_defect(int(side), argument),
    }
    print(json.dumps(measures[kind]()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 512, 2048, 4096])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--cpu", action="store_true", help="processor time, not the clock")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    print(f"{'backend':12}{'side':>6}{'ours':>12}{'keras':>12}{'ratio':>8}"
          f"{'memory':>14}{'defect':>18}")  # fmt: skip
    for backend in filter(importlib.util.find_spec, arguments.backends):
        for side in arguments.sides:
            rounds = max(2, min(50, (1 << 21) // side**2))
            times = ask_child(backend, "times", side, rounds)
            ours, stock = (
                statistics.median(pair[arguments.cpu] for pair in times[name])
                for name in ("ours", "keras")
            )
            memory, defect = (
                [ask_child(backend, kind, side, name) for name in ("ours", "keras")]
                for kind in ("memory", "defect")
            )
            print(
                f"{backend:12}{side:6}{ours * 1e3:9.4g} ms{stock * 1e3:9.4g} ms"
                f"{stock / ours:8.3g}{memory[0]:7.2f}{memory[1]:7.2f}"
                f"{defect[0]:9.1g}{defect[1]:9.1g}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
