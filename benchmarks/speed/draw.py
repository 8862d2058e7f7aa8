"""How fast weights are drawn: ours against every installed backend's own Glorot.

    python benchmarks/speed/draw.py [--json FILE] [--only arrays|threads|models|memory]

One process per backend draws ours, Keras's and the framework's own by turns, so that
what else the machine does meets all alike. Figures are medians; the spread is the range
of the middle half. The floor is NumPy writing a constant to a new array. What a second
thread can give is what a second process gives, each drawing one half. Models are built in
fresh processes, stock against `with as_default(...)`. Memory is the growth of the largest
resident set, in a fresh process, over a gigabyte of float32.
"""

import argparse
import importlib.util
import inspect
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

BACKENDS = ("tensorflow", "jax", "torch")
SIDE = 4096
MODELS = ("ResNet50", "MobileNetV2", "EfficientNetB0")


def clock(function, sync):
    start = time.perf_counter()
    result = sync(function())
    seconds = time.perf_counter() - start
    del result  # to give memory back is not part of drawing
    return seconds


def by_turns(contestants, sync, rounds, pause=0.005):
    """Times of each contestant, in rounds of one call each after a warm-up.

    The pause before each call lets the last one's threads go to sleep: those of torch
    and TensorFlow spin for a while when their work is done.
    """
    times = {name: [] for name in contestants}
    for function in contestants.values():
        sync(function())
    for _ in range(rounds):
        for name, function in contestants.items():
            if pause:
                time.sleep(pause)
            times[name].append(clock(function, sync))
    return times


def synchronizer(backend):
    if backend == "jax":
        import jax

        return jax.block_until_ready
    return lambda tensor: tensor


def peer(backend, distribution, shape, dtype):
    """The framework's own Glorot, if it has one besides Keras's."""
    if backend == "torch":
        import torch

        fill = getattr(torch.nn.init, f"xavier_{distribution}_")
        return lambda: fill(torch.empty(shape, dtype=getattr(torch, dtype)))
    if backend == "jax":
        import jax

        init = getattr(jax.nn.initializers, f"glorot_{distribution}")()
        keys = iter(range(10**9))
        return lambda: init(jax.random.key(next(keys)), shape, dtype)
    return None


def measure_arrays(backend):
    import keras
    import numpy as np

    import keras_glorot

    sync = synchronizer(backend)
    pairs = {
        name.lower(): (
            getattr(keras_glorot, f"Glorot{name}"),
            getattr(keras.initializers, f"Glorot{name}"),
        )
        for name in ("Uniform", "Normal")
    }
    square = (SIDE, SIDE)
    for distribution, (ours, stock) in pairs.items():
        for dtype in ("float32", "bfloat16"):
            contestants = {
                "ours": lambda ours=ours, dtype=dtype: ours(seed=1)(square, dtype),
                "keras": lambda stock=stock, dtype=dtype: stock(seed=1)(square, dtype),
            }
            if other := peer(backend, distribution, square, dtype):
                contestants["framework"] = other
            contestants["floor"] = lambda: np.full(square, 1, np.float32)
            yield f"{distribution} {dtype} 4096²", by_turns(contestants, sync, 9)
        yield (
            f"{distribution} 64x64",
            by_turns(
                {
                    "ours": lambda ours=ours: ours(seed=1)((64, 64)),
                    "keras": lambda stock=stock: stock(seed=1)((64, 64)),
                },
                sync,
                200,
                pause=0,
            ),
        )
        shapes = iter([(20 + i, 30) for i in range(400)])

        def new_shapes(cls, shapes=shapes):
            for _ in range(100):
                result = cls(seed=1)(next(shapes))
            return result

        times = {"ours": [], "keras": []}
        for name, cls in (("ours", ours), ("keras", stock)):
            while len(times[name]) < 2 and sum(times[name]) < 10:
                times[name].append(clock(lambda cls=cls: new_shapes(cls), sync))
        yield f"{distribution} 100 new shapes", times


def draw_part(distribution, parts, threads):
    """Draws that part of a square with NumPy alone; the parts take equal time."""
    from keras_glorot._drawing import stream

    stream.MOST_THREADS = threads
    stream.draw(distribution, (SIDE // parts, SIDE), 1.0, "float32", (1,))


def measure_threads():
    """One thread against two, and against what the machine can give: two processes."""
    context = multiprocessing.get_context("spawn")
    for distribution in ("uniform", "truncated_normal"):
        with ProcessPoolExecutor(2, context) as pool:

            def halves(distribution=distribution, pool=pool):
                jobs = [pool.submit(draw_part, distribution, 2, 1) for _ in range(2)]
                return [job.result() for job in jobs]

            contestants = {
                "2 threads": lambda name=distribution: draw_part(name, 1, 2),
                "1 thread": lambda name=distribution: draw_part(name, 1, 1),
                "2 processes": halves,
            }
            yield f"{distribution} 4096², threads", by_turns(contestants, lambda x: x, 41)


def measure_model(backend, name, whose):
    """Seconds to build a model, and those of them spent in initializers."""
    import keras

    import keras_glorot

    spent = 0.0

    def timed(cls):
        call = cls.__call__

        def wrapper(self, *args, **kwargs):
            nonlocal spent
            start = time.perf_counter()
            result = call(self, *args, **kwargs)
            spent += time.perf_counter() - start
            return result

        wrapper.__signature__ = inspect.signature(call)  # Keras looks for `layout`
        cls.__call__ = wrapper

    timed(keras.initializers.VarianceScaling)
    timed(keras_glorot.GlorotUniform.__mro__[1])
    build = getattr(keras.applications, name)
    start = time.perf_counter()
    if whose == "ours":
        with keras_glorot.as_default(variance_scaling=True):
            build(weights=None)
    else:
        build(weights=None)
    return {"build": time.perf_counter() - start, "drawing": spent}


def measure_memory(backend, distribution):
    """Growth of the largest resident set over the tensor's size, 1 GiB of float32."""
    import resource

    import keras_glorot

    initializer = getattr(keras_glorot, f"Glorot{distribution.title()}")(seed=1)
    initializer((64, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel = initializer((1 << 14, 1 << 14))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del kernel
    return (after - before) / (1 << 20)


def child(arguments):
    kind, backend, *rest = arguments
    if kind in ("arrays", "threads"):
        measured = measure_arrays(backend) if kind == "arrays" else measure_threads()
        name = backend if kind == "arrays" else "numpy"
        for case, times in measured:
            print(json.dumps({"case": case, "backend": name, "seconds": times}), flush=True)
    elif kind == "model":
        print(json.dumps(measure_model(backend, *rest)))
    else:
        print(json.dumps(measure_memory(backend, *rest)))


def ask_child(kind, backend, *rest):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, backend, *rest],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [
        json.loads(line) for line in done.stdout.splitlines() if line[:1] in '{"0123456789'
    ]


def summary(times):
    quarter, median, three = statistics.quantiles([*times, *times], n=4)
    scale, unit = (1e3, "ms") if median >= 1e-3 else (1e6, "µs")
    spread = f"{median * scale:.3g} ±{(three - quarter) / 2 * scale:.1g}"
    return f"{spread}, min {min(times) * scale:.3g} {unit}"


def array_rows(records):
    for record in records:
        times = record["seconds"]
        median = {name: statistics.median(values) for name, values in times.items()}
        least = {name: min(values) for name, values in times.items()}
        first = next(iter(median))
        for name, values in times.items():
            yield (
                record["case"],
                record["backend"],
                name,
                summary(values),
                f"{median[name] / median[first]:.3g}x, {least[name] / least[first]:.3g}x"
                if name != first
                else "",
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write every single time to this file")
    parser.add_argument("--only", choices=("arrays", "threads", "models", "memory"))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    from rich.console import Console
    from rich.table import Table

    from keras_glorot._drawing import stream

    backends = [name for name in BACKENDS if importlib.util.find_spec(name)]
    results = {"arrays": [], "models": [], "memory": []}
    title = f"{stream.native_name()} (time over ours: of medians, of minima)"
    table = Table(title=title, title_justify="left")
    for column in ("case", "backend", "whose"):
        table.add_column(column)
    for column in ("median", "ratio"):
        table.add_column(column, justify="right")
    if arguments.only in (None, "arrays"):
        for backend in backends:
            results["arrays"] += ask_child("arrays", backend)
    if arguments.only in (None, "threads"):
        results["arrays"] += ask_child("threads", backends[0])
    for row in array_rows(results["arrays"]):
        table.add_row(*row)
    if arguments.only in (None, "models"):
        for name in MODELS:
            for backend in backends:
                pair = {}
                for whose in ("ours", "stock"):
                    [pair[whose]] = ask_child("model", backend, name, whose)
                results["models"].append({"model": name, "backend": backend, **pair})
                for part in ("build", "drawing"):
                    for whose, seconds in pair.items():
                        ratio = seconds[part] / pair["ours"][part]
                        table.add_row(
                            f"{name} {part}",
                            backend,
                            whose,
                            f"{seconds[part]:.3g} s",
                            "" if whose == "ours" else f"{ratio:.3g}x",
                        )
    if arguments.only in (None, "memory"):
        for backend in backends:
            for distribution in ("uniform", "normal"):
                [ratio] = ask_child("memory", backend, distribution)
                results["memory"].append(
                    {"backend": backend, "distribution": distribution, "ratio": ratio}
                )
                table.add_row(
                    f"{distribution} memory", backend, "ours", f"{ratio:.3f} x 1 GiB"
                )
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    return None


if __name__ == "__main__":
    main()
