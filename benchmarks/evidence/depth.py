"""How deep can a plain net be? Test accuracy over depth, for several starts.

    python benchmarks/evidence/depth.py
    python benchmarks/evidence/depth.py --nets dense --depths 4 200 --seeds 1
    python benchmarks/evidence/depth.py --report

Every finished training is one line of the results file. Start the same command again after
an interruption and it goes on where it was; `--report` only prints the table. To measure a
start again after its code has changed, delete its lines first.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from deep_nets import CLASSES, MINIBATCH, SETTINGS, accuracy, images
from keras import layers
from paper_table1 import append, interval, read, table
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from sklearn.model_selection import train_test_split
from torch.fx.experimental.proxy_tensor import make_fx

import keras_glorot

HERE = Path(__file__)
PARTS = {"train": 768, "validation": 256, "test": 500}
EPOCHS = 8
RATES = [10 ** (half / 2) for half in range(-12, -1)]  # two in each decade
FIRST = (6, 4, 2)  # the rates that all try: 1e-3, 1e-4, 1e-5
HEADING = """\
# How deep can a plain net be?

**Short trainings of small nets on scikit-learn's digits, on one CPU core.** Only the order
of the accuracies compares. Guessing is right in 10 % of cases.

- `dense`: so many Dense layers of 128 units. `conv`: so many Conv2D layers of 16 channels,
  3 × 3, with average pooling in the middle and `Flatten` before the head. No normalization,
  no sums, no dropout.
- `flipped`: the sign of each image at random, so that no linear model can tell the digits.
  An odd net without biases can't either, so tanh is not among these.
- {train} images to train on, {epochs} epochs of Adam on minibatches of {minibatch}, {test}
  images to test. The seed picks the images, their order and the weights.
- The learning rate: 1e-5, 1e-4, 1e-3, then others, two in each decade, until the best is at
  neither end, nor beside one that was not tried. The best has the highest accuracy on
  {validation} further images at seed 0, which does not count for the table.
- `stock` is Keras's default, `he_normal` and `orthogonal` are Keras's initializers in every
  layer, `isometric` is `initialize(model, "isometric")`, `level 0.1` and the like are the
  same with a first kernel of that size.
- The trainings below took {minutes:.0f} minutes of CPU time, with {versions}.

Test accuracy in %, seeds: {seeds}{interval}; the best of each row in bold, — not measured:
"""


@dataclasses.dataclass(frozen=True)
class Training:
    """What tells one training from all others."""

    dataset: str
    net: str
    activation: str
    depth: int
    start: str
    learning_rate: float
    seed: int

    @property
    def row(self):
        """What the learning rate is chosen for."""
        return self.dataset, self.net, self.activation, self.depth, self.start


# --- Nets and starts


def dense(activation, depth):
    hidden = [layers.Dense(128, activation) for _ in range(depth)]
    return [layers.Flatten(), *hidden]


def conv(activation, depth):
    hidden = []
    for number in range(depth):
        if number == depth // 2:
            hidden.append(layers.AveragePooling2D(2))
        hidden.append(layers.Conv2D(16, 3, padding="same", activation=activation))
    return [*hidden, layers.Flatten()]


NETS = {"dense": dense, "conv": conv}


def build(training):
    parts = NETS[training.net](training.activation, training.depth)
    return keras.Sequential([keras.Input((8, 8, 1)), *parts, layers.Dense(CLASSES)])


def stock(training):
    return build(training)


def replaced(initializer, training):
    """What this initializer in every layer draws."""
    with keras.saving.custom_object_scope({"glorot_uniform": initializer}):
        return build(training)


def isometric(training):
    model = build(training)
    keras_glorot.initialize(model, "isometric", training.seed, verbose=False)
    return model


def at_level(level, training):
    """As isometric, but for the std at which the network begins."""
    model = isometric(training)
    kernel = model.weights[0]
    kernel.assign(kernel * level)
    return model


STARTS = {
    "stock": stock,
    "he_normal": functools.partial(replaced, keras.initializers.HeNormal),
    "orthogonal": functools.partial(replaced, keras.initializers.Orthogonal),
    "isometric": isometric,
}
LEVELS = {f"level {each}": functools.partial(at_level, each) for each in (0.1, 0.25, 0.5)}


# --- Training


def load(training):
    """(images, labels) by part, each part with its share of every digit."""
    x, labels = images("digits", 8)
    rest, parts = np.arange(len(labels)), {}
    signs = np.random.default_rng(training.seed).choice([-1, 1], len(labels))
    signs = signs if training.dataset == "flipped" else signs * signs
    x = x * torch.from_numpy(signs.astype("float32"))[:, None, None, None]
    for part, size in PARTS.items():
        places, rest = train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=training.seed
        )
        parts[part] = x[places], torch.from_numpy(labels[places])
    return parts


@functools.lru_cache(maxsize=1)
def gradient(net, activation, depth):
    """(values, x, y) → loss and gradients, traced once for all trainings of a net."""
    model = build(Training("digits", net, activation, depth, "", 0.0, 0))
    variables = model.trainable_variables

    def loss_and_gradients(values, x, y):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            loss = torch.nn.functional.cross_entropy(model(x, training=True), y)
        return loss, torch.autograd.grad(loss, values)

    values = [variable.value for variable in variables]
    x = torch.zeros(MINIBATCH, 8, 8, 1)
    return make_fx(loss_and_gradients)(values, x, torch.zeros(MINIBATCH, dtype=torch.int64))


def train(training):
    """Train one net and return what came of it."""
    data = load(training)
    keras.backend.clear_session()
    keras.utils.set_random_seed(training.seed)
    start = time.process_time()
    model = (STARTS | LEVELS)[training.start](training)
    losses = descend(training, model, *data["train"])
    return {
        "validation_accuracy": accuracy(model, *data["validation"]),
        "test_accuracy": accuracy(model, *data["test"]),
        "losses": losses,
        "seconds": round(time.process_time() - start, 2),
    }


def descend(training, model, x, y):
    """Adam on minibatches; the mean loss of each epoch, up to one that is not finite."""
    step = gradient(training.net, training.activation, training.depth)
    values = [variable.value for variable in model.trainable_variables]
    optimizer = torch.optim.Adam(values, training.learning_rate, fused=True)
    order, means = np.random.default_rng(training.seed), []
    for _ in range(EPOCHS):
        total = 0.0
        for batch in order.permutation(len(y)).reshape(-1, MINIBATCH):
            with torch.no_grad():
                loss, gradients = step(values, x[batch], y[batch])
            for value, slope in zip(values, gradients, strict=True):
                value.grad = slope
            optimizer.step()
            total += loss.item()
        if not math.isfinite(total):
            break
        means.append(round(total * MINIBATCH / len(y), 4))
    return means


# --- What is to be trained


def trainings(args, results):
    """Yield what is to be trained, while `results` grow."""
    combinations = (args.datasets, args.nets, args.activations, args.depths, args.starts)
    for row in itertools.product(*combinations):
        if row[0] == "flipped" and row[2] == "tanh":
            continue
        for number in FIRST:
            yield Training(*row, RATES[number], 0)
        while (number := untried(results, row)) is not None:
            yield Training(*row, RATES[number], 0)
        for seed in range(1, args.seeds + 1):
            yield Training(*row, best_rate(results, row), seed)


def untried(results, row):
    """The number of a rate beside the best one that was not tried; None if both were."""
    tried = {each.learning_rate for each in results if each.row == row}
    best = RATES.index(best_rate(results, row))
    for number in (best + 1, best - 1):
        if 0 <= number < len(RATES) and RATES[number] not in tried:
            return number
    return None


def best_rate(results, row):
    """The rate with the best validation accuracy at seed 0; if equal, loss."""

    def quality(item):
        losses = item[1]["losses"]
        return item[1]["validation_accuracy"], -losses[-1] if losses else -math.inf

    search = [each for each in results.items() if each[0].row == row and not each[0].seed]
    return max(search, key=quality)[0].learning_rate


def run(args, results, console):
    with Progress(console=console) as progress:
        task = progress.add_task("", total=None)
        for training in trainings(args, results):
            if training in results:
                continue
            progress.update(task, description=" ".join(map(str, training.row)))
            results[training] = SETTINGS | train(training)
            append(args.results, training, results[training])
            progress.print(training, results[training]["test_accuracy"])


def report(results):
    """The table, as Markdown."""
    cells = defaultdict(dict)
    for row in dict.fromkeys(each.row for each in results):
        scores = [
            record["test_accuracy"]
            for each, record in results.items()
            if each.row == row and each.seed
        ]
        if scores:
            cells[row[:-1]][row[-1]] = scores
    used = {start for row in cells.values() for start in row}
    starts = [each for each in STARTS | LEVELS if each in used]
    seeds = max(len(scores) for row in cells.values() for scores in row.values())
    records = []
    for (dataset, net, activation, depth), row in sorted(cells.items()):
        best = max(np.mean(scores) for scores in row.values())
        record = {"images": dataset, "net": net, "activation": activation, "depth": depth}
        for start in starts:
            text = interval(row[start]) if start in row else "—"
            is_best = start in row and np.mean(row[start]) == best
            record[start] = f"**{text}**" if is_best else text
        records.append(record)
    values = results.values()
    versions = next(iter(values))["versions"]
    heading = HEADING.format(
        **PARTS,
        epochs=EPOCHS,
        minibatch=MINIBATCH,
        minutes=sum(each["seconds"] for each in values) / 60,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        seeds=seeds,
        interval=", mean ± the half-width of its 95 % confidence interval"
        if seeds > 1
        else "",
    )
    return "\n".join([heading, *table(records)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = functools.partial(parser.add_argument, nargs="+")
    add("--datasets", default=["digits", "flipped"])
    add("--nets", default=list(NETS))
    add("--activations", default=["relu", "gelu", "tanh"])
    add("--depths", type=int, default=[4, 50, 100, 200])
    add("--starts", default=list(STARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=HERE.with_suffix(".jsonl"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    kind: Any = Training
    console, results = Console(), read(args.results, kind)
    if not args.report:
        torch.set_num_threads(1)
        run(args, results, console)
    text = report(results)
    args.results.with_suffix(".md").write_text(text)
    console.print(Markdown(text))


if __name__ == "__main__":
    main()
