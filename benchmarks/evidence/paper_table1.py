"""Table 1 of Glorot & Bengio (2010), rerun small: does normalized beat standard?

Networks of five hidden layers of 1000 units learn Shapeset-3×2 and 5,000 digits of
MNIST by plain SGD, from "standard" and from "normalized" (Glorot) weights. What differs
from the paper is the number of updates, 5 million there, and the size of MNIST.

    python benchmarks/evidence/paper_table1.py --datasets shapeset --updates 10000 --seeds 5

10,000 updates take about two minutes on one core. Every finished training is one line
of the results file. Start the same command again after an interruption and it goes on
where it was; `--report` only prints the tables. The results that lie here were made with
version 1 of the random stream.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import scipy.stats
from paper_training import DATASETS, INITIALIZERS, SLOPES, Training, train
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

PAPER_UPDATES = 5_000_000  # section 2.3
PAPER = {  # test error in %, Table 1
    ("shapeset", "softsign", "standard"): 16.27,
    ("shapeset", "softsign", "normalized"): 16.06,
    ("shapeset", "tanh", "standard"): 27.15,
    ("shapeset", "tanh", "normalized"): 15.60,
    ("shapeset", "sigmoid", "standard"): 82.61,
    ("mnist", "softsign", "standard"): 1.64,
    ("mnist", "softsign", "normalized"): 1.72,
    ("mnist", "tanh", "standard"): 1.76,
    ("mnist", "tanh", "normalized"): 1.64,
    ("mnist", "sigmoid", "standard"): 2.21,
}
HEADING = """\
# Table 1 of Glorot & Bengio (2010), rerun small

**The paper made 5 million updates; here they are far fewer: see the table.** So the
errors are far from the paper's, and only their order compares. Guessing errs on 83.3 %
of Shapeset-3×2 and on 90 % of MNIST: an error near that says that nothing is learned
yet, and the learning rate beside it says nothing either.

Test error in %: mean over the seeds ± the half-width of its 95 % confidence interval
(Student's t). Five hidden layers of 1000 units, softmax cross-entropy, SGD on
minibatches of 10, biases from zero. The learning rate is the one with the least
validation error at seed 0. Shapeset-3×2: a fresh stream of images by seed, 5,000 images
to validate and 20,000 to test. MNIST: 5,000 images in five folds; the seed picks the
1,000 to test, of the rest 500 validate and 3,500 train (the paper: 50,000).
"""
PAIRED = """
Standard minus normalized, paired by seed (the same images in the same order), in
points; above zero, normalized is better:
"""


def trainings(args, results):
    """Yield what is to be trained, while `results` grow.

    Seed 0 tries every learning rate, the other seeds take the best one.
    """
    names = args.datasets, args.activations, args.initializations, [args.updates]
    rows = list(itertools.product(*names))
    for row, rate in itertools.product(rows, args.rates):
        yield Training(*row, rate, seed=0)
    for seed, row in itertools.product(range(1, args.seeds), rows):
        yield Training(*row, best_rate(results, row), seed)


def best_rate(results, row):
    """The learning rate with the least validation error at seed 0."""
    errors = {
        training.learning_rate: record["validation_error"]
        for training, record in results.items()
        if training.row == row and training.seed == 0
    }
    return min(errors, key=errors.get)


def read(path, kind=Training):
    """Every finished training, with its errors."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        names = [field.name for field in dataclasses.fields(kind)]
        results[kind(**{name: record.pop(name) for name in names})] = record
    return results


def append(path, training, record):
    """Add one line, and have it on the disk before anything else is done."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(training) | record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def interval(sample):
    """`mean ± half-width` of the 95 % confidence interval by Student's t."""
    if len(sample) < 2:
        return f"{np.mean(sample):.2f}"
    half = scipy.stats.t.ppf(0.975, len(sample) - 1) * scipy.stats.sem(sample)
    return f"{np.mean(sample):.2f} ± {half:.2f}"


def report(results):
    """Both tables, as Markdown."""
    rows, tried = defaultdict(dict), defaultdict(set)
    for training, record in results.items():
        row, rate = training.row, training.learning_rate
        tried[row].add(rate)
        if rate == best_rate(results, row):
            rows[row][training.seed] = record["test_error"]
    rows = {row: rows[row] for row in sorted(rows, key=place)}
    errors = [
        {
            "dataset": row[0],
            "activation": row[1],
            "initialization": row[2],
            "error": interval([*by_seed.values()]),
            "paper": f"{PAPER[row[:3]]:.2f}" if row[:3] in PAPER else "—",
            "seeds": len(by_seed),
            "updates": f"{row[3]:,} ({row[3] / PAPER_UPDATES:.2%} of 5 million)",
            "learning rate": f"{best_rate(results, row)} of {sorted(tried[row])}",
        }
        for row, by_seed in rows.items()
    ]
    return "\n".join([HEADING, *table(errors), PAIRED, *table(differences(rows)), ""])


def place(row):
    """What rows are sorted by: standard above normalized, fewer updates above more."""
    order = [*DATASETS, *SLOPES, *INITIALIZERS]
    *names, updates = row
    return [order.index(name) for name in names], updates


def differences(rows):
    """A line for every row of standard weights that has one of normalized beside it."""
    for (dataset, activation, initialization, updates), ours in rows.items():
        theirs = rows.get((dataset, activation, "normalized", updates), {})
        seeds = ours.keys() & theirs.keys()
        if initialization == "standard" and seeds:
            paper = [PAPER.get((dataset, activation, name)) for name in INITIALIZERS]
            yield {
                "dataset": dataset,
                "activation": activation,
                "difference": interval([ours[seed] - theirs[seed] for seed in seeds]),
                "paper": "—" if None in paper else f"{paper[0] - paper[1]:.2f}",
                "seeds": len(seeds),
                "updates": f"{updates:,}",
            }


def table(records):
    records = list(records)
    lines = [list(records[0]), ["---"] * len(records[0])] if records else []
    lines += [record.values() for record in records]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def run(args, results, console):
    """Train what is not among the results yet."""
    rows = len(args.datasets) * len(args.activations) * len(args.initializations)
    total = rows * (len(args.rates) + args.seeds - 1) * args.updates
    checkpoint = args.results.with_suffix(".npz")
    with Progress(console=console) as progress:
        task = progress.add_task("", total=total)
        advance = functools.partial(progress.advance, task)
        for training in trainings(args, results):
            if training in results:
                advance(training.updates)
                continue
            progress.update(task, description=" ".join(training.row[:3]))
            record = train(training, checkpoint, advance)
            append(args.results, training, record)
            results[training] = record
            progress.print(training, f"test error {record['test_error']} %")
    checkpoint.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--datasets", nargs="+", choices=DATASETS, default=[*DATASETS])
    add("--activations", nargs="+", choices=SLOPES, default=[*SLOPES])
    add("--initializations", nargs="+", choices=INITIALIZERS, default=[*INITIALIZERS])
    add("--updates", type=int, default=10_000)
    add("--seeds", type=int, default=5)
    add("--rates", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    add("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    add("--report", action="store_true", help="print the tables, train nothing")
    args = parser.parse_args()

    results, console = read(args.results), Console()
    if not args.report:
        run(args, results, console)
    text = report(results)
    args.results.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(Markdown(text))


if __name__ == "__main__":
    main()
