"""How small should the ends of residual branches start? Test accuracy over depth.

    python benchmarks/evidence/residual.py
    python benchmarks/evidence/residual.py --report

Blocks without normalization on scikit-learn's digits, the sign of each image at random:
`dense` and `conv` blocks have two kernels with a ReLU between them, a `transformer` block
has attention and two kernels with a GELU. `glorot` and `he_normal` are in all kernels. The
kernels that end a branch have after `initialize(model, "isometric")` 1/√branches of what
they had without a sum; here also 1/branches, and zero. Each training is one line of the
results file; the same command goes on where it was.
"""

import argparse
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

from keras_glorot import initialize

RESULTS = Path(__file__).with_suffix(".jsonl")
NETS = {"dense": (8, 24, 64), "conv": (8, 24), "transformer": (8, 24)}
# By start: what `initialize` draws, and the power of the number of branches at their ends.
STARTS = {
    "glorot": ("glorot_uniform", None),
    "he_normal": ("he_normal", None),
    "1/√branches": ("isometric", -0.5),
    "1/branches": ("isometric", -1.0),
    "zero": ("isometric", -math.inf),
}
RATES = [float(f"{10 ** (half / 2):.2g}") for half in range(-12, 0)]
FIRST = RATES[5:7]
SEEDS = (0, 1, 2)
STEPS, MINIBATCH = 150, 32


def dense(x, blocks):
    x = layers.Dense(48)(layers.Flatten()(x))
    for number in range(blocks):
        y = layers.Dense(48, "relu")(x)
        x = layers.Add()([x, layers.Dense(48, name=f"end_{number}")(y)])
    return x


def conv(x, blocks):
    x = layers.Conv2D(12, 3, 2, "same")(x)
    for number in range(blocks):
        y = layers.Conv2D(12, 3, padding="same", activation="relu")(x)
        y = layers.Conv2D(12, 3, padding="same", name=f"end_{number}")(y)
        x = layers.Add()([x, y])
    return layers.Flatten()(x)


def transformer(x, blocks):
    x = layers.Dense(24)(layers.Reshape((8, 8))(x))
    for number in range(blocks):
        x = layers.Add()([x, layers.MultiHeadAttention(2, 12)(x, x)])
        y = layers.Dense(48, "gelu")(x)
        x = layers.Add()([x, layers.Dense(24, name=f"end_{number}")(y)])
    return layers.Flatten()(x)


@functools.cache
def build(net, blocks):
    inputs = keras.Input((8, 8, 1))
    x = layers.Activation("relu")(globals()[net](inputs, blocks))
    return keras.Model(inputs, layers.Dense(10)(x))


@functools.cache
def drawn(net, blocks, how, seed):
    """By path, the fresh weights."""
    model = build(net, blocks)
    initialize(model, how, seed=seed, verbose=False)
    return {each.path: np.array(each.value) for each in model.trainable_variables}


def start_values(net, blocks, start, seed):
    how, power = STARTS[start]
    values = dict(drawn(net, blocks, how, seed))
    ends = [path for path in values if "end_" in path or "attention_output" in path]
    if power is not None:  # the recipe has 1/√branches
        kernels = [path for path in ends if path.endswith("kernel")]
        for path in kernels:
            values[path] = values[path] * len(kernels) ** (power + 0.5)
    return [jnp.asarray(value) for value in values.values()]


@functools.cache
def trainer(net, blocks):
    model = build(net, blocks)
    rest = [each.value for each in model.non_trainable_variables]

    def logits(weights, x):
        return model.stateless_call(weights, rest, x, training=False)[0]

    def loss(weights, x, labels):
        chosen = jax.nn.log_softmax(logits(weights, x))
        return -jnp.take_along_axis(chosen, labels[:, None], 1).mean()

    @jax.jit
    def train(weights, rate, x, labels, rows):
        """Adam."""
        zeros = jax.tree.map(jnp.zeros_like, weights)

        def step(state, place):
            weights, first, second, count = state
            gradient = jax.grad(loss)(weights, x[place], labels[place])
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
            scale = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
            weights = jax.tree.map(
                lambda w, m, v: w - scale * m / (jnp.sqrt(v) + 1e-8), weights, first, second
            )
            return (weights, first, second, count + 1), None

        return jax.lax.scan(step, (weights, zeros, zeros, 1.0), rows)[0][0]

    @jax.jit
    def accuracy(weights, x, labels):
        return (logits(weights, x).argmax(1) == labels).mean()

    return train, accuracy


@functools.cache
def load(seed):
    """Images and labels to train on, to choose the rate by, and to test."""
    rng = np.random.default_rng(seed)
    digits: Any = load_digits()
    x = (digits.images - digits.images.mean()) / digits.images.std()
    x *= rng.choice([-1, 1], len(x))[:, None, None]
    order = rng.permutation(len(x))
    parts = np.split(order, [1000, 1250])
    return [(x[part, ..., None].astype("float32"), digits.target[part]) for part in parts]


def measure(net, blocks, start, rate, seed):
    """Accuracy in validation and test."""
    (x, labels), *others = load(seed)
    train, accuracy = trainer(net, blocks)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(x), (STEPS, MINIBATCH))
    weights = train(start_values(net, blocks, start, seed), rate, x, labels, rows)
    return [round(100 * float(accuracy(weights, *other)), 1) for other in others]


def search(run):
    """Test accuracy by seed, at a rate that is better than the two beside it."""
    found = {rate: run(rate, 0)[0] for rate in FIRST}
    while True:
        best = max(found, key=found.__getitem__)
        at = RATES.index(best)
        missing = [rate for rate in RATES[at - 1 : at + 2] if rate not in found]
        if not missing:
            return [run(best, seed)[1] for seed in SEEDS]
        found |= {rate: run(rate, 0)[0] for rate in missing}


def main():
    parser = argparse.ArgumentParser(description="Trains residual nets.")
    parser.add_argument("--report", action="store_true", help="only print the table")
    report = parser.parse_args().report
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {tuple(key): value for *key, value in map(json.loads, lines)}

    def run(net, blocks, start, rate, seed):
        key = net, blocks, start, rate, seed
        if key not in done:
            if report:
                raise LookupError
            done[key] = measure(*key)
            with RESULTS.open("a") as file:
                file.write(json.dumps([*key, done[key]], ensure_ascii=False) + "\n")
        return done[key]

    print(f"| net | blocks | {' | '.join(STARTS)} |\n|{' --- |' * (len(STARTS) + 2)}")
    for net, depths in NETS.items():
        for blocks in depths:
            cells = []
            for start in STARTS:
                try:
                    found = search(functools.partial(run, net, blocks, start))
                except LookupError:
                    cells.append("–")
                    continue
                spread = np.std(found, ddof=1)
                cells.append(f"{np.mean(found):.1f} ± {spread:.1f}")
            print(f"| {net} | {blocks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
