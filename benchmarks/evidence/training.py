"""Does the initialization matter? Deep nets without normalization, trained briefly.

    python benchmarks/evidence/training.py
    python benchmarks/evidence/training.py --datasets digits --nets mlp --methods stock
    python benchmarks/evidence/training.py --report

Every finished training is one line of the results file. Start the same command again
after an interruption and it goes on where it was; `--report` only prints the tables. To
measure a method again after its code has changed, delete its lines first. All nets and
methods take more than an hour on one core. AnyInit is a peer to compare with:
`pip install anyinit==0.4.0`; without it, it is left out.
"""

import argparse
import functools
import importlib.util
import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from deep_nets import (
    IMAGES,
    MEASURED,
    METHODS,
    MINIBATCH,
    NETS,
    PEERS,
    SETTINGS,
    SOURCES,
    Training,
    train,
)
from paper_table1 import append, interval, read, table
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

RATES = [1e-4, 3e-4, 1e-3, 3e-3]
OURS = "calibrate"
HEADING = """\
# Does the initialization matter? Deep nets without normalization, trained briefly

**Short trainings of small nets on few small images, on one CPU core.** The accuracies
are far from what these nets can reach; only their order compares. Guessing is right in
10 % of cases: an accuracy near that says that nothing was learned within the budget,
which is the same for all methods. The trainings below took {minutes:.0f} minutes of CPU
time, with {versions}.

- Adam on minibatches of {minibatch}, {train} training images, {updates} updates per epoch,
  {test} images to test. The seed picks the images, their order and the weights.
- The learning rate is that of {rates} with the best accuracy on
  {validation} further images at seed 0, which does not count for the table.
- `stock` is Keras's default; `he_normal` that initializer in every layer; `initialize`
  is `initialize(model, GlorotUniform(gain="auto"))`; `calibrate` is the same, then
  `calibrate(model, x)`.
- `calibrate` and AnyInit's empirical mode see {measured} training images before, no labels.
- scikit-learn's digits have 8 × 8 pixels, the images of MNIST here 16 × 16; MobileNetV2
  and ResNet50 see both resized to 32 × 32.
- "fails": the method raises an error on this net. "—": not measured.
- One seed and {validation} images choose the learning rate, with a standard error of up to
  3 points: some of the differences below come from an unlucky choice.
"""
ACCURACY = """
Test accuracy in %: mean over the seeds ± the half-width of its 95 % confidence interval
(Student's t); the best mean of each row in bold:
"""
PAIRED = """
`{method}` minus the others in points, paired by seed (the same images in the same order);
above zero, `{method}` is better:
"""
DETAILS = """
Learning rate, loss of the first and the last epoch (the mean over the seeds that stayed
finite), seeds that diverged, CPU seconds to initialize and to train:
"""


def trainings(args, results):
    """Yield what is to be trained, while `results` grow.

    Seed 0 tries every learning rate, the others take the best one: the same search for
    every net and method. What can't be initialized is not tried again.
    """
    for dataset, net, method in itertools.product(args.datasets, args.nets, args.methods):
        row = dataset, net, method, args.epochs or NETS[net].epochs
        for rate in args.rates:
            if not failure(results, row):
                yield Training(*row, rate, seed=0)
        for seed in range(1, args.seeds + 1):
            if not failure(results, row):
                yield Training(*row, best_rate(results, row), seed)


def of_row(results, row):
    return {training: record for training, record in results.items() if training.row == row}


def failure(results, row):
    """Why the method can't initialize the net, if it can't."""
    found = (record.get("failure") for record in of_row(results, row).values())
    return next(filter(None, found), None)


def best_rate(results, row):
    """The learning rate with the best validation accuracy at seed 0; if equal, loss."""

    def quality(item):
        training, record = item
        diverged = len(record["losses"]) < training.epochs
        return record["validation_accuracy"], -math.inf if diverged else -record["losses"][
            -1
        ]

    search = [item for item in of_row(results, row).items() if item[0].seed == 0]
    return max(search, key=quality)[0].learning_rate


def run(args, results, console):
    """Train what is not among the results yet."""
    runs = len(args.datasets) * len(args.methods) * (len(args.rates) + args.seeds)
    epochs = sum(args.epochs or NETS[net].epochs for net in args.nets)
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        task = progress.add_task("", total=runs * epochs)
        advance = functools.partial(progress.advance, task)
        for training in trainings(args, results):
            if training in results:
                advance(training.epochs)
                continue
            progress.update(task, description=" ".join(training.row[:3]))
            record = SETTINGS | train(training, advance)
            append(args.results, training, record)
            results[training] = record
            outcome = record.get("failure") or f"{record['test_accuracy']} %"
            progress.print(training, outcome)
        progress.update(task, completed=runs * epochs)  # what failed is not tried again


def report(results):
    """All tables, as Markdown."""
    rows = sorted({training.row for training in results}, key=place)
    cells = defaultdict(dict)
    for dataset, net, method, epochs in rows:
        row = dataset, net, method, epochs
        cells[net, dataset, epochs][method] = scores(results, row)
    records = results.values()
    seconds = sum(sum(record.get("seconds", [])) for record in records)
    versions = {
        f"{name} {number}"
        for record in records
        for name, number in record["versions"].items()
    }
    rates = sorted({run.learning_rate for run in results if run.seed == 0})
    settings = {
        **IMAGES,
        "minibatch": MINIBATCH,
        "updates": IMAGES["train"] // MINIBATCH,
        "measured": MEASURED,
        "rates": ", ".join(f"{rate:g}" for rate in rates),
        "minutes": seconds / 60,
        "versions": ", ".join(sorted(versions)),
    }
    nets = [
        {"net": name, "what": net.what, "epochs": net.epochs} for name, net in NETS.items()
    ]
    return "\n".join(
        [
            HEADING.format(**settings),
            *table(nets),
            ACCURACY,
            *table(accuracies(cells)),
            PAIRED.format(method=OURS),
            *table(differences(cells)),
            DETAILS,
            *table(detail(results, row) for row in rows),
            "",
        ]
    )


def place(row):
    """What rows are sorted by: the order of nets, data sets and methods above."""
    dataset, net, method, epochs = row
    return [*NETS].index(net), [*SOURCES].index(dataset), [*METHODS].index(method), epochs


def scores(results, row):
    """Test accuracy by seed, without the search; None if the method fails."""
    if failure(results, row):
        return None
    records = of_row(results, row).items()
    return {run.seed: record["test_accuracy"] for run, record in records if run.seed}


def accuracies(cells):
    for (net, dataset, epochs), by_method in cells.items():
        means = {m: np.mean([*s.values()]) for m, s in by_method.items() if s}
        line = {"net": net, "data": dataset, "epochs": epochs}
        for method in METHODS:
            found = by_method.get(method, {})
            cell = "fails" if found is None else "—"
            if found:
                cell = interval([*found.values()])
                cell = f"**{cell}**" if means[method] == max(means.values()) else cell
            line[method] = cell
        yield line


def differences(cells):
    for (net, dataset, epochs), by_method in cells.items():
        line = {"net": net, "data": dataset, "epochs": epochs}
        ours = by_method.get(OURS) or {}
        for method in (name for name in METHODS if name != OURS):
            theirs = by_method.get(method) or {}
            pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
            line[method] = interval(pairs) if pairs else "—"
        yield line


def detail(results, row):
    """What stands behind one accuracy of the table."""
    dataset, net, method, epochs = row
    line = {"net": net, "data": dataset, "epochs": epochs, "method": method}
    names = "learning rate", "first loss", "last loss", "diverged", "initialize", "train"
    if reason := failure(results, row):
        return line | dict.fromkeys(names, "—") | {"learning rate": f"fails: {reason}"}
    records = [record for run, record in of_row(results, row).items() if run.seed]
    if not records:
        return line | dict.fromkeys(names, "—")
    finished = [losses for r in records if len(losses := r["losses"]) == epochs]
    first, last = np.mean(finished, 0)[[0, -1]] if finished else (math.nan, math.nan)
    initialize, train = np.mean([record["seconds"] for record in records], 0)
    values = (
        f"{best_rate(results, row):g}",
        f"{first:.3g}",
        f"{last:.3g}",
        f"{len(records) - len(finished)} of {len(records)}",
        f"{initialize:.1f} s",
        f"{train:.1f} s",
    )
    return line | dict(zip(names, values, strict=True))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SOURCES, default=[*SOURCES])
    add("--nets", nargs="+", choices=NETS, default=[*NETS])
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--seeds", type=int, default=5)
    add("--rates", nargs="+", type=float, default=RATES)
    add("--epochs", type=int, help="instead of those of the net")
    add("--threads", type=int, default=1)
    add("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    add("--report", action="store_true", help="print the tables, train nothing")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    results, console = read(args.results, Training), Console()
    if not importlib.util.find_spec("anyinit"):
        console.print("AnyInit is not installed, so it is left out.")
        args.methods = [name for name in args.methods if name not in PEERS]
    if not args.report:
        run(args, results, console)
    text = report(results)
    args.results.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(Markdown(text))


if __name__ == "__main__":
    main()
