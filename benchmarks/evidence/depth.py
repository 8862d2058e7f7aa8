"""How deep can a plain net be? Test accuracy over depth, for several starts.

    python benchmarks/evidence/depth.py
    python benchmarks/evidence/depth.py --nets dense --activations relu --depths 4 200
    python benchmarks/evidence/depth.py --report

Every finished training is one line of the results file. Start the same command again after
an interruption and it goes on where it was; `--report` only writes the table and the
picture. To measure a start again after its code has changed, delete its lines first. All
of it takes some hours on one core. AnyInit is a peer to compare with:
`pip install anyinit==0.4.0`; without it, it is left out.
"""

import argparse
import gc
import importlib.util
import itertools
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from deep_nets import MEASURED, MINIBATCH
from depth_nets import (
    ACTIVATIONS,
    CHANNELS,
    LEVELS,
    LONG,
    NETS,
    PARTS,
    UPDATES,
    WIDTH,
    Training,
    load,
    train,
)
from paper_table1 import append, interval, read, table
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression

HERE = Path(__file__)
ALL = (*ACTIVATIONS,)
RATES = [10 ** (quarter / 4) for quarter in range(-28, 1)]  # four in each decade
FIRST = 16, 12  # the rates that all try: 1e-3 and 1e-4
STEP = 2  # in the search by one seed, half a decade
SEARCH = 0, 1, 2  # the seeds whose validation accuracies choose the rate
TIE = 1.0  # of these accuracies, about the standard error of one
PLAIN = ("stock", "he_normal", "orthogonal", "isometric")
DRAWN = PLAIN[1:]
OTHERS = ("gain auto", "LSUV", "AnyInit", "calibrated")
AT_LEVELS = tuple(f"level {each:g}" for each in LEVELS)
NORMALIZED = tuple(name for name in NETS if name.startswith("dense, "))


class Block(NamedTuple):
    """All combinations of these are trained."""

    datasets: tuple[str, ...]
    nets: tuple[str, ...]
    activations: tuple[str, ...]
    depths: tuple[int, ...]
    starts: tuple[str, ...] = PLAIN
    seeds: int = 5


OWN = ("isometric",)
NOT_ODD = tuple(name for name in ALL if name != "tanh")
DEPTHS = (4, 16, 50, 100, 200)
ENDS = (4, 100, 200)
PLAN = [  # the most important first
    Block(("digits",), ("dense",), ALL, DEPTHS, OWN),
    Block(("flipped",), ("dense",), ("elu", "selu"), ENDS, OWN),
    Block(("twice flipped",), ("dense",), ("tanh",), ENDS, OWN),
    Block(("flipped",), ("dense",), NOT_ODD, ENDS, OWN),
    Block(("digits",), ("dense",), ("tanh", "elu", "selu"), (100,)),
    Block(("twice flipped",), ("dense",), ("tanh",), (100,), DRAWN),
    Block(("flipped",), ("dense",), ("elu", "selu"), (100,), DRAWN),
    Block(("digits",), ("separable",), ("relu",), (6, 24), OWN),
    Block(("digits",), ("dense",), ("gelu",), (4, 200), (LONG,)),
    Block(("flipped",), ("dense",), ("relu",), (4, 100), (LONG,)),
    Block(("twice flipped",), ("dense",), ("tanh",), (4, 200), (LONG,)),
    Block(("digits",), ("conv",), ("relu", "gelu"), (6, 24), OWN),
    Block(("mnist",), ("dense",), ("relu", "gelu", "tanh"), (4, 100), OWN),
    Block(("flipped",), ("dense",), ("elu",), (4, 100), AT_LEVELS),
    Block(("twice flipped",), ("dense",), ("tanh",), (4, 100), AT_LEVELS),
    Block(("digits",), ("separable",), ("relu",), (6, 24), DRAWN),
    Block(("digits",), ("dense",), ALL, (100,), (*PLAIN, *OTHERS)),
    Block(("digits",), ("conv",), ("relu",), (100,), DRAWN, 3),
    Block(("digits",), NORMALIZED, ("relu",), (4, 100), ("stock", "isometric")),
    Block(("flipped",), ("dense",), NOT_ODD, DEPTHS, OWN),
    Block(("twice flipped",), ("dense",), ("tanh",), DEPTHS, OWN),
    Block(("digits",), ("conv", "separable"), ("relu", "gelu"), (6, 12, 24), DRAWN),
    Block(("flipped",), ("dense",), ("selu",), (4, 100), AT_LEVELS),
    Block(("digits",), ("dense",), ALL, DEPTHS),
    Block(("flipped",), ("dense",), NOT_ODD, (4, 100), DRAWN),
    Block(("twice flipped",), ("dense",), ("tanh",), (4,), DRAWN),
    Block(("mnist",), ("dense",), ("relu", "gelu", "tanh"), ENDS, DRAWN),
    Block(("digits",), ("dense",), ("relu",), (1000,), OWN, 1),
]
SECTIONS = [  # title, nets, starts, and what is shown beside them
    ("Dense nets", ("dense",), PLAIN),
    ("Other starts", ("dense",), OTHERS, OWN),
    ("Other levels", ("dense",), AT_LEVELS, OWN),
    ("Twice as many updates", ("dense",), (LONG,), OWN),
    ("Convolutional nets", ("conv", "separable"), PLAIN),
    ("With normalization or sums", NORMALIZED, ("stock", "isometric")),
]
HEADING = """\
# How deep can a plain net be?

{sentence}

![Test accuracy on digits over depth, one panel for each activation. The isometric start \
stays level up to 200 layers. The others fall, `orthogonal` before tanh, ELU and SELU the \
least.](depth.png)

**Short trainings of small nets on small images, on one CPU core.** Only the order of the
accuracies compares. Guessing is right in 10 % of cases.

- `dense`: so many Dense layers of {width} units. `conv`: so many Conv2D layers of
  {channels} channels, 3 × 3, with average pooling in the middle and `Flatten` before the
  head; `separable`: SeparableConv2D of twice as many. No normalization, no sums, no
  dropout, but where the name says so: `residual` adds the input of each layer but the first
  to what its activation gives.
- `digits` are scikit-learn's, 8 × 8. `flipped` are the same, the sign of each image at
  random; dense nets get one more number, which is always 8. An odd net like that of tanh
  has `twice flipped`: each image times two signs, and both signs as two more numbers. A
  linear model (scikit-learn's `LogisticRegression(C=0.01)`) tells {linear} right.
- {updates} updates of Adam on minibatches of {minibatch} from {train} training images,
  {test} images to test. The seed picks the images, their order and the weights.
- The learning rate: 1e-4 and 1e-3, then others, two in each decade, until the best is at
  neither end, by the accuracy on {validation} further images at seed 0. Then, four in each
  decade, by three seeds, until both neighbours are known; of rates within {tie:g} point of
  the best, about its standard error, the one with the least training loss. {edges}
- `stock` is Keras's default. `he_normal` and `orthogonal` are Keras's initializers in every
  layer, `orthogonal` with a gain of √2 before a rectifier. `gain auto` is
  `initialize(model, GlorotUniform(gain="auto"))`, `isometric` is
  `initialize(model, "isometric")`, `calibrated` the same and then `calibrate`. `LSUV` and
  AnyInit's empirical mode see {measured} training images before, as `calibrate` does.
  `level 10` is `isometric`, with a std of 10 before each activation whose pairs are not
  exactly linear: ELU and SELU have 100 in `isometric`, tanh 0.3.
- BatchNormalization takes its statistics from the images at hand, also in the test.
- The {count} trainings took {minutes:.0f} minutes of CPU time, with {versions}.

Test accuracy in %: mean over the seeds ± the half-width of its 95 % confidence interval
(Student's t); the best mean of each row in bold; — is not measured.
"""
GOAL = """
## The goal, and where it is missed

At every depth up to {deepest} the isometric start is to come within {points} points of the
same net at its least depth ({wide} for ELU and SELU). `worst` is the depth where it is
furthest below: the lowest of several noisy means. `points lower` compares the same seeds.
The last column is the best other start without normalization at depth {depth}.
"""
REASONS = """
Seen in these tables:

- **GELU on digits and ReLU on flipped digits** miss it by the short training. With twice as
  many updates the deep net is within the goal.
- **tanh** has no pairs. It misses on twice flipped digits, also with twice as many updates.
  At depth 100 other levels are worse. `orthogonal` does not hold its level, and falls
  much further.
- **ELU and SELU** learn at a std of 100 as ReLU does. Far below, their pairs are as good an
  isometry, but nearly a line, and the flipped digits are not learned.
- **Separable convolutions** train at any depth that was tried.
- **Normalization** after each of 100 layers does not replace the start, nor the start the
  sums: such chains hardly learn from either. Sums *and* normalization learn from both.
- **Sums without normalization** grow with each layer in other starts. The isometric one
  makes the branches small, and learns.
"""
POINTS, WIDE, DEEP, DEEPEST = 2, 5, 100, 200
STYLES = {
    "isometric": "o-k",
    "stock": "s--C0",
    "he_normal": "^:C1",
    "orthogonal": "v-.C2",
}


def selected(args):
    """The plan, as far as it was asked for."""
    for block in PLAN:
        parts = {
            name: tuple(each for each in part if each in (getattr(args, name) or part))
            for name, part in zip(block._fields[:5], block[:5], strict=True)
        }
        if not importlib.util.find_spec("anyinit"):
            parts["starts"] = tuple(each for each in parts["starts"] if each != "AnyInit")
        yield block._replace(**parts)


def trainings(blocks, results):
    """Yield what is to be trained, while `results` grow."""
    for block in blocks:
        for row in itertools.product(*block[:5]):
            while missing := untried(results, row):
                for rate, seed in missing:
                    yield Training(*row, rate, seed)
            for seed in range(1, block.seeds + 1):
                yield Training(*row, best_rate(results, row), seed)


def untried(results, row):
    """The rates and seeds that are still to be tried before the best rate is known.

    In large steps by one seed, then from the best in small ones by all seeds of the search,
    each time until its neighbours are known to be no better.
    """
    coarse, fine = coarse_qualities(results, row), qualities(results, row, SEARCH)
    top = best_of(coarse) if coarse else FIRST[0]
    missing = absent(coarse, (*FIRST, top + STEP, top - STEP), SEARCH[:1])
    start = best_of(fine, TIE) if fine else top
    return missing or absent(fine, (start, start + 1, start - 1), SEARCH)


def absent(known, numbers, seeds):
    numbers = [each for each in numbers if 0 <= each < len(RATES) and each not in known]
    return [(RATES[number], seed) for number in numbers for seed in seeds]


def coarse_qualities(results, row):
    known = qualities(results, row, SEARCH[:1])
    return {number: known[number] for number in known if not number % STEP}


def qualities(results, row, seeds):
    """Number of a rate → validation accuracy and last loss, means over these seeds."""
    found = defaultdict(dict)
    for each, record in results.items():
        if each.row == row and each.seed in seeds:
            last = record["losses"][-1] if len(record["losses"]) == 8 else math.inf
            number = RATES.index(each.learning_rate)
            found[number][each.seed] = record["validation_accuracy"], last
    return {
        number: tuple(np.mean([*by_seed.values()], axis=0))
        for number, by_seed in found.items()
        if len(by_seed) == len(seeds)
    }


def best_of(known, tie=0.0):
    """The most accurate rate; of those that tie with it, the one with the least loss."""
    most = max(accuracy for accuracy, _ in known.values())
    ties = [number for number in known if known[number][0] >= most - tie]
    return min(ties, key=lambda number: known[number][1])


def best_rate(results, row):
    """By all seeds of the search; by one, as long as the others are not trained."""
    if untried(results, row):
        return RATES[best_of(coarse_qualities(results, row))]
    return RATES[best_of(qualities(results, row, SEARCH), TIE)]


def run(plan, total, path, results, console):
    with Progress(console=console) as progress:
        task = progress.add_task("", total=total)
        for training in plan:
            progress.update(task, advance=1, description=" ".join(map(str, training.row)))
            if training not in results:
                results[training] = train(training)
                append(path, training, results[training])
                progress.print(training, results[training]["test_accuracy"])


# --- Tables and the picture


def report(results):
    """All tables, as Markdown."""
    cells = accuracies(results)
    numbers = {
        "sentence": sentence(cells),
        "width": WIDTH,
        "channels": CHANNELS,
        "updates": UPDATES,
        "minibatch": MINIBATCH,
        "measured": MEASURED,
        **PARTS["digits"],
        "linear": linear(),
        "tie": TIE,
        "edges": edges(results),
        "count": len(results),
        "minutes": sum(each.get("seconds", 0) for each in results.values()) / 60,
        "versions": ", ".join(
            sorted(
                {
                    f"{name} {number}"
                    for each in results.values()
                    for name, number in each["versions"].items()
                }
            )
        ),
    }
    lines = [HEADING.format(**numbers)]
    for title, *which in SECTIONS:
        rows = list(section(cells, *which))
        lines += [f"## {title}", "", *table(rows), ""] if rows else []
    lines += [GOAL.format(points=POINTS, wide=WIDE, depth=DEEP, deepest=DEEPEST)]
    lines += [*table(goal(cells)), REASONS.rstrip()]
    return "\n".join(lines) + "\n"


def sentence(cells):
    """The result in a sentence: all activations, digits, 100 dense layers."""
    ranges = {}
    for start in PLAIN:
        means = [
            np.mean(row[start])
            for (dataset, net, _, depth), row in cells.items()
            if (dataset, net, depth) == ("digits", "dense", DEEP) and start in row
        ]
        ranges[start] = f"{min(means):.0f} to {max(means):.0f} %" if means else "—"
    return (
        f"Plain nets of {DEEP} layers, seven activations: from the isometric start "
        f"{ranges['isometric']} of the digits are told right, from Keras's default "
        f"{ranges['stock']}, from `he_normal` {ranges['he_normal']}, from `Orthogonal` "
        f"{ranges['orthogonal']}."
    )


def linear():
    """How many images a linear model tells right, by data set."""
    parts = []
    for dataset in ("digits", "flipped", "twice flipped"):
        scores = []
        for seed in range(1, 6):
            data = load(Training(dataset, "dense", "tanh", 4, "stock", 0.0, seed))
            model = LogisticRegression(C=0.01, max_iter=1000).fit(*data["train"])
            scores.append(100 * model.score(*data["test"]))
        parts.append(f"{np.mean(scores):.0f} % of `{dataset}`")
    return f"{parts[0]}, {parts[1]} and {parts[2]}"


def edges(results):
    """Whether a best learning rate is at an end, and how many one seed has chosen."""
    rows = measured(results)
    found = [row for row in rows if best_rate(results, row) in (RATES[0], RATES[-1])]
    text = f"At an end of all that can be tried: {len(found)} of {len(rows)}."
    early = [row for row in rows if untried(results, row)]
    own = sum(start in OWN for *_, start in early)
    return (
        f"{text} By seed 0 alone: {len(early)}, {own} of them isometric." if early else text
    )


def accuracies(results):
    """(data set, net, activation, depth) → start → test accuracies, without the search."""
    cells = defaultdict(dict)
    for *row, start in measured(results):
        scores = at_rate(results, (*row, start), best_rate(results, (*row, start)))
        cells[tuple(row)][start] = scores
    return dict(sorted(cells.items(), key=lambda item: place(item[0])))


def measured(results):
    """The rows whose nets were trained at the best rate that is known."""
    rows = dict.fromkeys(each.row for each in results if each.seed)
    counts = {row: len(at_rate(results, row, best_rate(results, row))) for row in rows}
    return [row for row in rows if counts[row] > 2 or (counts[row] and row[3] > DEEPEST)]


def at_rate(results, row, rate):
    """Test accuracies, by seed."""
    found = {
        each.seed: record["test_accuracy"]
        for each, record in results.items()
        if each.row == row and each.learning_rate == rate and each.seed
    }
    return [found[seed] for seed in sorted(found)]


def place(row):
    dataset, net, activation, depth = row
    return (
        [*NETS].index(net),
        [*PARTS].index(dataset),
        [*ACTIVATIONS].index(activation),
        depth,
    )


def section(cells, nets, starts, beside=()):
    """A line for each net for which one of these starts was measured."""
    rows = {
        row: cells[row] for row in cells if row[1] in nets and {*starts} & {*cells[row]}
    }
    starts = *beside, *starts
    used = [start for start in starts if any(start in row for row in rows.values())]
    for (dataset, net, activation, depth), row in rows.items():
        best = max(np.mean(row[start]) for start in used if start in row)
        line = {"images": dataset, "net": net, "activation": activation, "depth": depth}
        for start in used:
            line[start] = cell(row[start], best) if start in row else "—"
        yield line | {"seeds": max(len(row.get(start, [])) for start in used)}


def cell(scores, best):
    text = interval(scores)
    return f"**{text}**" if np.mean(scores) == best else text


def goal(cells):
    """Of each plain net, how far the isometric start falls with depth."""
    groups = defaultdict(dict)
    for (*group, depth), row in cells.items():
        if group[1] not in NORMALIZED and "isometric" in row:
            groups[tuple(group)][depth] = row
    for (dataset, net, activation), by_depth in groups.items():
        least, *others = sorted(depth for depth in by_depth if depth <= DEEPEST)
        if others:
            worst = min(others, key=lambda depth: np.mean(by_depth[depth]["isometric"]))
            level, low = (by_depth[depth]["isometric"] for depth in (least, worst))
            lower = [
                a - b for a, b in zip(level, low, strict=False)
            ]  # as many as both have
            allowed = WIDE if activation in ("elu", "selu") else POINTS
            yield {
                "images": dataset,
                "net": net,
                "activation": activation,
                "at the least depth": f"{np.mean(level):.1f} ({least} layers)",
                "worst": f"{np.mean(low):.1f} ({worst} layers)",
                "points lower": interval(lower),
                "within the goal": "yes" if np.mean(lower) <= allowed else "no",
                f"best other, {DEEP} layers": rival(by_depth.get(DEEP, {})),
            }


def rival(starts):
    others = {
        start: float(np.mean(scores))
        for start, scores in starts.items()
        if start not in ("isometric", "calibrated", LONG, *AT_LEVELS)
    }
    if not others:
        return "—"
    name = max(others, key=lambda start: others[start])
    return f"{others[name]:.1f} ({name})"


def picture(results, path):
    """Accuracy over depth on digits, one panel for each activation."""
    cells = accuracies(results)
    figure, axes = plt.subplots(2, 4, figsize=(10, 4.6), sharex=True, sharey=True)
    figure.set_layout_engine("constrained")
    for axis, activation in zip(axes.flat, ACTIVATIONS, strict=False):
        for start, style in STYLES.items():
            points = [
                (depth, np.mean(row[start]))
                for (dataset, net, name, depth), row in cells.items()
                if (dataset, net, name) == ("digits", "dense", activation) and start in row
            ]
            if points and points[-1][0] > 4:
                axis.plot(*zip(*points, strict=True), style, label=start, markersize=4)
        axis.set(title=activation, xscale="log", ylim=(0, 100), xlim=(3.5, 230))
        axis.set_xticks([4, 16, 50, 200], ["4", "16", "50", "200"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    figure.supxlabel("layers")
    figure.supylabel("test accuracy in %")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in Block._fields[:5]:
        kind = int if name == "depths" else str
        parser.add_argument(f"--{name}", nargs="+", type=kind, help="only these")
    parser.add_argument("--results", type=Path, default=HERE.with_suffix(".jsonl"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(arguments)
    kind: Any = Training
    console, results = Console(), read(args.results, kind)
    if not args.report:
        torch.set_num_threads(1)
        sys.setrecursionlimit(20_000)  # Keras calls itself along a chain of 1,000 layers
        gc.freeze()  # the frameworks' own objects: else a third of the time goes to them
        blocks = list(selected(args))
        total = sum((12 + b.seeds) * math.prod(map(len, b[:5])) for b in blocks)
        run(trainings(blocks, results), total, args.results, results, console)
    text = report(results)
    args.results.with_suffix(".md").write_text(text, encoding="utf-8")
    picture(results, args.results.with_suffix(".png"))
    console.print(Markdown(text))


if __name__ == "__main__":
    main()
