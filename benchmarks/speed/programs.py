"""Draws inside traced programs, ours against Keras's own; and what a shard costs.

    python benchmarks/speed/programs.py [--size N] [--rounds N] [--whose ours|stock]
                                        [--only shards|tensorflow|xla|jax]

Each program runs in a process of its own, ours and the stock one by turns of processes:
the first call, with its compilation, then the later ones (least and median of wall and of
CPU time), and how far the largest resident set grew by the first call, over the tensor.
Shards are drawn on one thread, all of them one after the other, in CPU time, over the CPU
time of the whole tensor: 1 is the fair share.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time

SIDE = 4096
WHOSE = ("ours", "stock")
MESHES = {
    "rows / 8": (8, 1),
    "columns / 8": (1, 8),
    "blocks / 8": (2, 4),
    "rows / 64": (64, 1),
    "columns / 64": (1, 64),
    "blocks / 64": (8, 8),
}


def measure_program(kind, name, whose, size, rounds):
    import keras

    import keras_glorot

    module = keras_glorot if whose == "ours" else keras.initializers
    initializer = getattr(module, name)(seed=keras.random.SeedGenerator(1))
    if kind == "jax":
        import jax

        def draw(state):
            mapping = [(initializer.seed.state, state)]
            with keras.StatelessScope(state_mapping=mapping):
                return initializer((size,))

        state = initializer.seed.state.value
        program = jax.jit(draw)

        def call():
            return program(state).block_until_ready()
    else:
        import tensorflow as tf

        call = tf.function(lambda: initializer((size,)), jit_compile=kind == "xla")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = call()
    first = time.perf_counter() - start
    del result
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = [], []
    for _ in range(rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        result = call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        del result
    growth = (peak - before) * 1024 / (4 * size)
    return {"first": first, "wall": wall, "cpu": cpu, "growth": growth, "peak": peak >> 10}


def ask_child(kind, *rest):
    backend = "jax" if kind == "jax" else "tensorflow"
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, *map(str, rest)],
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def programs(kind, whose, size, rounds):
    for name in ("GlorotUniform", "GlorotNormal"):
        for who in whose:
            m = ask_child(kind, name, who, size, rounds)
            times = ", ".join(
                f"{clock} {min(m[clock]) / size * 1e9:.2f} / "
                f"{statistics.median(m[clock]) / size * 1e9:.2f}"
                for clock in ("wall", "cpu")
            )
            print(
                f"{kind:10} {name:13} {who:5}  first {m['first']:.2f} s, then {times} "
                f"ns per value (min / median), peak +{m['growth']:.2f} tensors, "
                f"{m['peak']} MB in all"
            )


def shards(rounds):
    from keras_glorot._drawing import stream

    stream.available_cores = lambda: 1

    def parts(rows, columns):
        high, wide = SIDE // rows, SIDE // columns
        for i in range(rows):
            for j in range(columns):
                yield (i * high, (i + 1) * high), (j * wide, (j + 1) * wide)

    def cost(form, regions):
        start = time.process_time()
        for region in regions:
            stream.draw(form, (SIDE, SIDE), 1.0, "float32", (1,), region)
        return time.process_time() - start

    print(f"{stream.native_name()}: shards over their fair share (of minima, of medians)")
    for form in ("uniform", "truncated_normal"):
        times = {name: [] for name in ("whole", *MESHES)}
        for _ in range(rounds):
            times["whole"].append(cost(form, [None]))
            for name, mesh in MESHES.items():
                times[name].append(cost(form, parts(*mesh)))
        for name in MESHES:
            ratios = [
                average(times[name]) / average(times["whole"])
                for average in (min, statistics.median)
            ]
            print(f"  {form:16} {name:12} {ratios[0]:.2f} {ratios[1]:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1e8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("shards", "tensorflow", "xla", "jax"))
    parser.add_argument("--whose", choices=WHOSE, nargs="+", default=WHOSE)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, name, whose, size, rounds = arguments.child
        print(json.dumps(measure_program(kind, name, whose, int(size), int(rounds))))
        return
    size = math.floor(arguments.size)
    if arguments.only in (None, "shards"):
        shards(arguments.rounds)
    for kind in ("tensorflow", "xla", "jax"):
        if arguments.only in (None, kind):
            programs(kind, arguments.whose, size, arguments.rounds)


if __name__ == "__main__":
    main()
