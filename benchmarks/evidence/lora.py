"""Does the scale of LoRA's factor A matter? A transformer adapted to new digits.

    python benchmarks/evidence/lora.py
    python benchmarks/evidence/lora.py --optimizers Adam --seeds 1
    python benchmarks/evidence/lora.py --report

Every finished training is one line of the results file. Start the same command again after
an interruption and it goes on where it was; `--report` only prints the table.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import deep_nets  # before Keras: it chooses the backend
import keras
import numpy as np
import torch
from keras import layers
from paper_table1 import append, interval, read, table
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch.fx.experimental.proxy_tensor import make_fx

from keras_glorot import GlorotUniform

HERE = Path(__file__)
MINIBATCH = deep_nets.MINIBATCH
VERSIONS = {"versions": deep_nets.SETTINGS["versions"]}  # written into each line
CLASSES, RANK, BLOCKS, HEADS = 5, 4, 4, 16
PRETRAINED, ADAPTED, TESTED = 640, 320, 500  # images
EPOCHS, PRETRAINING_EPOCHS, PRETRAINING_RATE = 8, 15, 1e-3
STARTS = {"stock": "he_uniform", "right": "xavier_uniform", "head alone": None}
OPTIMIZERS = {
    "Adam": functools.partial(torch.optim.Adam, fused=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
}
RATES = {
    "Adam": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    "SGD": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
}
HEADING = """\
# Does the scale of LoRA's factor A matter?

**Short trainings of a small net on scikit-learn's digits, on one CPU core.** Guessing is
right in 20 % of cases.

- A transformer of {blocks} blocks, width 64, {heads} heads, with LayerNorm, is trained on
  the digits 0 to 4 (Adam, {pretraining_epochs} epochs, {pretrained} images). Then it is
  frozen, gets a new head, and LoRA of rank {rank} on all query and value kernels; these and
  the head are trained on {adapted} images of the digits 5 to 9: {epochs} epochs of Adam,
  or of SGD with momentum 0.9, on minibatches of {minibatch}. {tested} other images of these
  digits test it.
- `stock` is `enable_lora({rank})`: Keras draws A from its shape alone, √{heads} times too
  small. `right` is `enable_lora({rank}, a_initializer="xavier_uniform")`. B starts at zero.
  `head alone` trains no LoRA.
- The stds of A: {stds}.
- The trainings below took {minutes:.0f} minutes of CPU time, with {versions}.

Test accuracy in %, {seeds} seeds, mean ± the half-width of its 95 % confidence interval;
and the difference of the two by seed:
"""


@dataclasses.dataclass(frozen=True)
class Training:
    """What tells one training from all others."""

    optimizer: str
    start: str
    learning_rate: float
    seed: int


def load(digits, size, seed):
    """Training and test images of some digits, labels from 0."""
    x, labels = deep_nets.images("digits", 8)
    chosen = np.flatnonzero(np.isin(labels, digits))
    chosen = np.random.default_rng(seed).permutation(chosen)
    y = torch.from_numpy(labels - min(digits))
    parts = chosen[:size], chosen[size : size + TESTED]
    return [(x[part], y[part]) for part in parts]


def array(variable) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def build():
    normalization = layers.LayerNormalization
    whole = deep_nets.transformer((8, 8, 1), normalization, blocks=BLOCKS, heads=HEADS)
    x = whole.layers[-2].output
    return keras.Model(whole.input, layers.Dense(CLASSES, name="head")(x))


@functools.lru_cache(maxsize=1)
def pretrained(seed):
    """The weights after training on the first half of the digits."""
    keras.utils.set_random_seed(seed)
    model = build()
    (x, y), _ = load(range(5), PRETRAINED, seed)
    variables = model.trainable_variables
    adam = functools.partial(OPTIMIZERS["Adam"], lr=PRETRAINING_RATE)
    descend(model, variables, x, y, adam, PRETRAINING_EPOCHS, seed)
    return [array(each) for each in model.weights]


def adapt(training):
    """Train LoRA and a new head, and return what came of it."""
    started = time.process_time()
    weights = pretrained(training.seed)
    keras.utils.set_random_seed(training.seed)
    model = build()
    model.set_weights(weights)
    head: Any = model.get_layer("head")
    head.kernel.assign(GlorotUniform(seed=training.seed)(head.kernel.shape))
    head.bias.assign(np.zeros(CLASSES))
    factors = []
    for layer in model.layers:
        if isinstance(layer, layers.MultiHeadAttention):
            for dense in (layer.query_dense, layer.value_dense):
                dense.enable_lora(RANK, a_initializer=STARTS[training.start] or "zeros")
                factors += [dense.lora_kernel_a, dense.lora_kernel_b]
    trained = [head.kernel, head.bias, *factors]
    std = np.std([array(each) for each in factors[::2]])
    (x, y), test = load(range(5, 10), ADAPTED, training.seed)
    optimizer = OPTIMIZERS[training.optimizer]
    optimizer = functools.partial(optimizer, lr=training.learning_rate)
    losses = descend(model, trained, x, y, optimizer, EPOCHS, training.seed)
    return {
        "test_accuracy": deep_nets.accuracy(model, *test),
        "losses": losses,
        "std": round(float(std), 4),
        "seconds": round(time.process_time() - started, 2),
    }


def descend(model, trained, x, y, make_optimizer, epochs, seed):
    """Steps on minibatches; the mean loss of each epoch, up to one that is not finite."""
    ids = set(map(id, trained))
    variables = [*trained, *(each for each in model.weights if id(each) not in ids)]
    step = gradient(model, variables, len(trained))
    values = [each.value for each in variables]
    optimizer = make_optimizer(values[: len(trained)])
    losses = deep_nets.epoch_losses(step, values, optimizer, x, y, seed)
    means = itertools.takewhile(np.isfinite, itertools.islice(losses, epochs))
    return [round(mean, 4) for mean in means]


_steps: dict[int, Any] = {}  # by the number of variables that are trained


def gradient(model, variables, count):
    """(values, x, y) → loss, and gradients of the first `count` values: traced once."""
    if count not in _steps:

        def loss_and_gradients(values, x, y):
            with keras.StatelessScope(list(zip(variables, values, strict=True))):
                loss = torch.nn.functional.cross_entropy(model(x, training=True), y)
            return loss, torch.autograd.grad(loss, values[:count])

        values = [each.value.detach().requires_grad_() for each in variables]
        x, y = torch.zeros(MINIBATCH, 8, 8, 1), torch.zeros(MINIBATCH, dtype=torch.int64)
        _steps[count] = make_fx(loss_and_gradients)(values, x, y)
    return _steps[count]


def run(args, results, console):
    wanted = [
        Training(optimizer, start, rate, seed)
        for seed in range(1, args.seeds + 1)
        for optimizer in args.optimizers
        for rate, start in itertools.product(RATES[optimizer], STARTS)
    ]
    with Progress(console=console) as progress:
        for training in progress.track([each for each in wanted if each not in results]):
            results[training] = VERSIONS | adapt(training)
            append(args.results, training, results[training])


def report(results):
    """The table, as Markdown."""
    cells, stds = defaultdict(dict), {}
    for each, record in results.items():
        row = each.optimizer, each.learning_rate
        cells[row].setdefault(each.start, {})[each.seed] = record["test_accuracy"]
        stds[each.start] = record["std"]
    rows = []
    for optimizer, rate in sorted(cells):
        by_start = cells[optimizer, rate]
        right, stock = by_start["right"], by_start["stock"]
        row = {"optimizer": optimizer, "learning rate": f"{rate:g}"}
        row |= {start: interval([*by_start[start].values()]) for start in STARTS}
        rows.append(row | {"right - stock": interval([right[i] - stock[i] for i in right])})
    versions = next(iter(results.values()))["versions"]
    heading = HEADING.format(
        blocks=BLOCKS,
        heads=HEADS,
        pretraining_epochs=PRETRAINING_EPOCHS,
        pretrained=PRETRAINED,
        rank=RANK,
        adapted=ADAPTED,
        epochs=EPOCHS,
        minibatch=MINIBATCH,
        tested=TESTED,
        stds=", ".join(f"{start} {std}" for start, std in stds.items() if std),
        minutes=sum(each["seconds"] for each in results.values()) / 60,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        seeds=len({each.seed for each in results}),
    )
    return "\n".join([heading, *table(rows)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
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
