"""Do first weights matter for training, and does `calibrate` do harm? Many nets, briefly.

    python benchmarks/evidence/training.py
    python benchmarks/evidence/training.py --nets gelu SIREN --starts stock isometric
    python benchmarks/evidence/training.py --report

Every finished training is one line of the results file. Start the same command again after
an interruption and it goes on where it was; `--report` only writes the tables, `--renew`
trains again what would start from other weights now. All of it takes an hour on one core.
AnyInit is a peer to compare with: `pip install anyinit==0.4.0`; without it, it is left out.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from deep_nets import MEASURED, MINIBATCH, SETTINGS
from paper_table1 import append, interval, read, table
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from training_nets import HEALTHY, NETS
from training_starts import HELD_OUT, STARTS, checksum, first_weights, load
from training_steps import Trainer

RATES = [10 ** (half / 2) for half in range(-14, 1)]  # two in each decade
FIRST = 8, 7  # the rates that all try: 1e-3 and 3e-4
SEARCH, TEST = (0, 1, 2), (3, 4, 5, 6, 7)
BARE = [name for name, net in NETS.items() if net.is_bare]
SMALL = [name for name in BARE if NETS[name].data == "digits"]
TWICE = "stock", "isometric"
LEVEL = 0.05
FACTOR, BAR = 2, 0.8  # of the hint, stated before it was measured
LEARNS = 30  # % of the digits: of guessing, 10 are right

HEADING = """\
# Do first weights matter for training, and does `calibrate` do harm?

{verdict}

**Short trainings of small nets, on one CPU core.** Only the order of the scores compares.

- The nets (`benchmarks/evidence/training_nets.py`) are small enough for {count} trainings
  in {minutes:.0f} minutes of one core. Images are scikit-learn's digits, 8 × 8. {train} are
  trained on, {validation} choose the learning rate, {test} are the test. Other tasks are
  synthetic, with as many examples each.
- Adam, {updates} updates on minibatches of {minibatch}. The learning rate: 1e-3 and 3e-4,
  then others, two in each decade, until both neighbours of the best were tried. The best
  has the best mean score in validation over {search} seeds. {edges}
- Then {tests} other seeds train with it, and are tested: mean ± the half-width of the 95 %
  confidence interval (Student's t).
- `stock` is Keras's default. `he_normal` and `orthogonal` are Keras's in every layer,
  `orthogonal` with a gain of √2 before a rectifier. `gain auto` is
  `initialize(model, GlorotUniform(gain="auto"))`, `isometric` is
  `initialize(model, "isometric")`. `Fixup-like` is He's, divided by a power of the number
  of blocks, with zeros at the end of each branch and in the head. LSUV and AnyInit's
  empirical mode see {measured} training images before, as `calibrate` does.
- "=": `calibrate` left the weights of all seeds as they were, bit by bit. "fails": the
  start raises an error. "—": not measured yet, or (`Fixup-like`) without branches.
- BatchNormalization takes its statistics from the batch at hand, also in the test.
- `calibrate` had two modes before it held the likeness of examples. Training could not tell
  them apart (`git show 73f3326:benchmarks/evidence/training.md`).
- With {versions}.

| net | what |
| --- | --- |
"""
ACCURACY = """
## Without normalization

Test accuracy in %; the best mean of each net in bold. `+` has `calibrate` after the start.
The last column is the same net *with* normalization, from the stock start:
"""
HARM = """
## Does `calibrate` do harm?

Test accuracy in %, or the loss ± %, from two starts. Then differences, paired by seed, in
points or in % of the loss; above zero, `calibrate` is better. "c" is `calibrate`, "iso"
`isometric`. {number} differences are between other weights. At a level of {level:.0%} after
Holm's correction for all of them, there are significant ones among

- those of `calibrate` against the same start without it, {own};
- those of `calibrate` after `isometric` against stock, {stock}.
"""
HINT = """
## A hint for the learning rate?

The learning rate at which one signed step moves the outputs by std 1, over the best rate
above (neighbours are a factor of 3.2 apart). A line in `calibrate`'s note was to come if it
is within a factor of {factor} in {bar:.0%} of the rows with `calibrate`. It is in {near} of
the {rows} that learn ({share:.0%}); after `isometric`, in {near_isometric} of {nets} nets.
Half of the ratios lie between {low:.2g} and {high:.2g}, all between {least:.2g} and
{most:.2g}. {answer}
"""
REASONS = """
Seen in these tables:

- **Deep chains** learn from the isometric start, and best from it of all starts alone. With
  BatchNormalization in each layer, chains of 50 layers learn less than without.
- **Residual nets** need a start where their sums grow: 24 dense blocks and the transformer.
  12 blocks of convolutions do as well from stock.
- **`calibrate` after `isometric`** leaves most nets as they are, and changes none beyond
  chance. After stock, deep chains learn with it, less than from `isometric`. At one seed of
  eight it refuses `gelu`: on fresh examples, signal times gradient misses the bound of 0.5
  by 0.05, so the net stays where it was.
- **Ten epochs of 3,968 images** show the same: the deep chains learn from the isometric
  start. 16 convolutions of strided images do as well from stock.
- **Where `isometric` is not advised** it can be worse than stock: in SIREN, which has a
  start of its own, and with BatchNormalization in each of 50 layers. `calibrate` changes
  nothing there.
"""
DETAILS = """
## Details

Best learning rate, the hint, and the loss of the first and last eighth of the training,
mean over the seeds of the test that stayed finite:
"""


@dataclasses.dataclass(frozen=True)
class Training:
    """What tells one training from all others."""

    net: str
    start: str
    calibrated: bool
    learning_rate: float
    seed: int

    @property
    def row(self):
        """What the learning rate is chosen for."""
        return self.net, self.start, self.calibrated


# --- What is trained


def rows(nets, starts):
    """The most important first: each row alone, then with `calibrate`."""
    few = itertools.product([*BARE, *HEALTHY], TWICE, (False, True))
    normalized = [name for name in NETS if NETS[name].normalized_from]
    few = itertools.chain(few, itertools.product(normalized, TWICE, (False, True)))
    rest = itertools.product(SMALL, STARTS, (False, True))
    for net, start, calibrated in dict.fromkeys(itertools.chain(few, rest)):
        has_start = start != "Fixup-like" or NETS[net].branch  # others have no branches
        if has_start and net in nets and start in starts:
            yield net, start, calibrated


def trainings(rows, results) -> Iterator[Training]:
    """Yield what is to be trained, while `results` grow.

    Some seeds try the learning rates, others take the best one. What can't be initialized
    is not tried again.
    """
    for row in rows:
        numbers = [*FIRST]
        while numbers and not failure(results, row):
            for number, seed in itertools.product(numbers, SEARCH):
                if not failure(results, row):
                    yield Training(*row, RATES[number], seed)
            numbers = untried(results, row)
        for seed in TEST:
            if not failure(results, row):
                yield Training(*row, best_rate(results, row), seed)


def failure(results, row):
    """Why the start can't be had for this net, if it can't."""
    first = Training(*row[:2], False, RATES[FIRST[0]], SEARCH[0])
    return results.get(first, {}).get("failure")


def of_row(results, row, seeds):
    return {
        run: record
        for run, record in results.items()
        if run.row == row and run.seed in seeds and "failure" not in record
    }


def best_rate(results, row):
    """The rate with the best mean score in validation; if equal, loss."""
    by_rate = defaultdict(list)
    for run, record in of_row(results, row, SEARCH).items():
        by_rate[run.learning_rate].append(record)

    def quality(rate):
        records = by_rate[rate]
        finite = all(record["losses"][-1:] and record["validation"] for record in records)
        if not finite:
            return -math.inf, 0
        score = np.mean([record["validation"] for record in records])
        return score, -np.mean([record["losses"][-1] for record in records])

    return max(by_rate, key=quality)


def untried(results, row):
    """The number of a rate beside the best one that was not tried, in a list."""
    tried = {run.learning_rate for run in of_row(results, row, SEARCH)}
    best = RATES.index(best_rate(results, row))
    beside = [number for number in (best + 1, best - 1) if 0 <= number < len(RATES)]
    return [number for number in beside if RATES[number] not in tried][:1]


def train(training, results, trainer):
    """What came of one training, or of one from the same weights."""
    net, start, calibrated = training.row
    began = time.process_time()
    alone = results.get(dataclasses.replace(training, calibrated=False), {})
    try:
        weights = first_weights(*training.row, training.seed)
    except Exception as error:
        if start != "AnyInit" or calibrated:
            raise
        return {"failure": f"{type(error).__name__}: {error}"}
    drawn = checksum(*training.row, training.seed)
    if calibrated and alone.get("weights") == drawn:
        return alone | {"same_weights": True, "seconds": 0.0}
    parts = load(net, training.seed)
    x, y = parts["train"]
    losses, scores, hint, seconds = trainer(
        net,
        weights,
        np.float32(training.learning_rate),
        x,
        y,
        places(net, training.seed),
        [parts["validation"], parts["test"]],
    )
    means = np.array([np.mean(each) for each in np.array_split(losses, 8)])
    finite = int(np.isfinite(means).cumprod().sum())
    return {
        "validation": number(scores[0]),
        "test": number(scores[1]),
        "losses": [round(float(mean), 5) for mean in means[:finite]],
        "hint": float(f"{hint:.3g}"),
        "weights": drawn,
        "seconds": round(time.process_time() - began + seconds, 2),
        "versions": SETTINGS["versions"],
    }


def renewed(results, selected):
    """Without the trainings of selected rows that would start from other weights now."""
    return {
        run: record
        for run, record in results.items()
        if run.row not in selected
        or "failure" in record
        or record["weights"] == checksum(*run.row, run.seed)
    }


def number(score):
    return round(score, 3) if math.isfinite(score) else None


def places(net, seed):
    """The examples of each update: all of them in each epoch, in a new order."""
    order = np.random.default_rng(seed)
    updates, count = NETS[net].updates, NETS[net].train
    epochs = math.ceil(updates * MINIBATCH / count)
    drawn = [order.permutation(count) for _ in range(epochs)]
    return np.concatenate(drawn)[: updates * MINIBATCH].reshape(updates, MINIBATCH)


def run(selected, path, results, console):
    """Train what is not among the results yet."""
    total = len(selected) * (3 * len(SEARCH) + len(TEST))  # three rates at least
    with Progress(console=console) as progress, Trainer() as trainer:
        task = progress.add_task("", total=total)
        for training in trainings(selected, results):
            names = training.net, training.start, "calibrated" * training.calibrated
            progress.update(task, advance=1, description=" ".join(names))
            if training not in results:
                record = train(training, results, trainer)
                append(path, training, record)
                results[training] = record


# --- Tables


def scores(results, row):
    """Test score by seed at the best rate."""
    if failure(results, row) or not of_row(results, row, TEST):
        return {}
    rate = best_rate(results, row)
    return {
        run.seed: -math.inf if record["test"] is None else record["test"]
        for run, record in of_row(results, row, TEST).items()
        if run.learning_rate == rate
    }


def is_same(results, row):
    """Whether `calibrate` left the weights of all seeds."""
    records = of_row(results, row, TEST).values()
    return bool(records) and all(record.get("same_weights") for record in records)


def report(results):
    """All tables, as Markdown."""
    rows = sorted({training.row for training in results}, key=place)
    nets = list(dict.fromkeys(row[0] for row in rows))
    harms = [line for net in nets for line in comparisons(results, net)]
    records = list(results.values())
    versions = {
        f"{name} {number}"
        for record in records
        for name, number in record.get("versions", {}).items()
    }
    numbers = {
        **HELD_OUT,
        "train": NETS[SMALL[0]].train,
        "verdict": verdict(results, nets),
        "count": sum("failure" not in record for record in records),
        "updates": NETS[SMALL[0]].updates,
        "minibatch": MINIBATCH,
        "search": len(SEARCH),
        "edges": edges(results, rows),
        "tests": len(TEST),
        "measured": MEASURED,
        "minutes": sum(record.get("seconds", 0) for record in records) / 60,
        "versions": ", ".join(sorted(versions)),
    }
    lines = [HEADING.format(**numbers).rstrip()]
    lines += [f"| {net} | {NETS[net].what} |" for net in nets]
    lines += [ACCURACY, *table(accuracies(results, nets))]
    lines += [HARM.format(**significance(harms))]
    lines += [*table(harm(results, net) for net in nets), REASONS.rstrip()]
    lines += [HINT.format(**hints(results, rows)), DETAILS]
    lines += table(detail(results, row) for row in rows if not is_same(results, row))
    lines += [""]
    return "\n".join(lines)


def place(row):
    """What rows are sorted by: the order of nets and starts above."""
    net, start, calibrated = row
    return [*NETS].index(net), [*STARTS].index(start), calibrated


def edges(results, rows):
    """Whether a best learning rate is at an end of those that can be tried."""
    found = [row for row in rows if scores(results, row)]
    ends = [row for row in found if best_rate(results, row) in (RATES[0], RATES[-1])]
    return f"At an end of all that can be tried: {len(ends)} of {len(found)}."


def verdict(results, nets):
    """The result in a sentence for each start: accuracies of nets without normalization."""
    bare = [net for net in nets if net in SMALL]

    def between(row):
        found = [scores(results, row(net)) for net in bare]
        means = [np.mean([*by_seed.values()]) for by_seed in found if by_seed]
        return f"{min(means):.0f} to {max(means):.0f} %" if means else "—"

    plain = between(lambda net: (net, "isometric", False))
    stock = between(lambda net: (net, "stock", False))
    normalized = between(lambda net: (f"{net}, normalized", "stock", False))
    return (
        f"{len(bare)} deep nets without normalization: from the isometric start {plain} of "
        f"the digits are told right, from Keras's default {stock}; the same nets with "
        f"normalization, from Keras's default, {normalized}."
    )


def accuracies(results, nets):
    """Two lines for each net without normalization: starts alone, and calibrated."""
    for net in (each for each in nets if each in BARE):
        found = {
            (start, calibrated): scores(results, (net, start, calibrated))
            for start, calibrated in itertools.product(STARTS, (False, True))
        }
        best = max(np.mean([*each.values()]) for each in found.values() if each)
        for calibrated in (False, True):
            line = {"net": net, "": "+" * calibrated}
            for start in STARTS:
                row = net, start, calibrated
                line[start] = cell(results, row, found[start, calibrated], best)
            alone = f"{net}, normalized", "stock", False
            yield line | {"normalized": "" if calibrated else shown(results, alone)}


def cell(results, row, by_seed, best):
    if failure(results, row):
        return "fails"
    if not by_seed:
        return "—"
    if is_same(results, row):
        return "="
    text = shown(results, row)
    return f"**{text}**" if np.mean([*by_seed.values()]) == best else text


def shown(results, row):
    """Mean and interval: of the accuracy, or of the loss, in %."""
    sample = [*scores(results, row).values()]
    if not sample or not np.isfinite(sample).all():
        return "diverges" if sample else "—"
    if NETS[row[0]].has_accuracy:
        return one_digit(interval(sample))
    half = interval(sample).partition("± ")[2]
    return f"{math.exp(-np.mean(sample) / 100):.3g} ± {float(half or 0):.0f} %"


def one_digit(text):
    return " ± ".join(f"{float(part):.1f}" for part in text.split(" ± "))


# `calibrate` after a start against a start.
STOCK = "c(iso) − stock"
PAIRS = {
    "c(iso) − iso": (("isometric", True), ("isometric", False)),
    STOCK: (("isometric", True), ("stock", False)),
    "c(stock) − stock": (("stock", True), ("stock", False)),
}


def differences(results, net, pair):
    """Of the scores, by seed; empty where they are not measured."""
    ours, theirs = (scores(results, (net, *row)) for row in PAIRS[pair])
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def is_left(results, net, pair):
    """Whether both are the same start, and `calibrate` left it as it is."""
    ours, theirs = PAIRS[pair]
    return ours[0] == theirs[0] and is_same(results, (net, *ours))


def comparisons(results, net):
    """(net, pair, mean difference, p) of all that are not the same weights."""
    for pair in PAIRS:
        sample = differences(results, net, pair)
        if len(sample) > 1 and not is_left(results, net, pair):
            p = 1.0 if not np.ptp(sample) else scipy.stats.ttest_1samp(sample, 0).pvalue
            yield net, pair, np.mean(sample), p


def holm(comparisons):
    """Those that are significant at `LEVEL`, all of them together."""
    ordered = sorted(comparisons, key=lambda line: line[-1])
    levels = [LEVEL / (len(ordered) - place) for place in range(len(ordered))]
    pairs = zip(ordered, levels, strict=True)
    passed = itertools.takewhile(lambda pair: pair[0][-1] <= pair[1], pairs)
    return [line for line, _ in passed]


def significance(comparisons):
    """How many differences are beyond chance, by what they compare."""
    found = holm(comparisons)

    def counts(pairs):
        below = [line for line in found if line[1] in pairs and line[2] < 0]
        above = [line for line in found if line[1] in pairs and line[2] > 0]
        number = sum(line[1] in pairs for line in comparisons)
        names = f" ({', '.join(line[0] for line in below)})" if below else ""
        return f"{number}: {len(below)} below zero{names}, {len(above)} above"

    return {
        "level": LEVEL,
        "number": len(comparisons),
        "own": counts(PAIRS.keys() - {STOCK}),
        "stock": counts({STOCK}),
    }


def harm(results, net):
    line = {"net": net}
    for start in TWICE:
        line[start] = shown(results, (net, start, False))
    for pair in PAIRS:
        sample = differences(results, net, pair)
        line[pair] = one_digit(interval(sample)) if sample else "—"
        if is_left(results, net, pair):
            line[pair] = "="
    return line


def hint(results, row):
    """The mean hint of the seeds that choose the rate."""
    found = [record["hint"] for record in of_row(results, row, SEARCH).values()]
    return math.exp(np.mean(np.log(found)))


def hints(results, rows):
    """How near the hint is to the best rate, of calibrated rows that learn."""
    ratios = {}
    for row in (each for each in rows if each[2]):
        by_seed = scores(results, row)
        least = LEARNS if NETS[row[0]].has_accuracy else -math.inf
        learns = by_seed and np.mean([*by_seed.values()]) > least
        if learns:
            ratios[row] = hint(results, row) / best_rate(results, row)
    of_isometric = [ratio for row, ratio in ratios.items() if row[1] == "isometric"]
    values = [*ratios.values()] or [math.nan]
    share = np.mean([is_near(each) for each in values])
    return {
        "factor": FACTOR,
        "bar": BAR,
        "near": sum(map(is_near, values)),
        "rows": len(ratios),
        "share": share,
        "near_isometric": sum(map(is_near, of_isometric)),
        "nets": len(of_isometric),
        **dict(zip(("low", "high"), np.quantile(values, [0.25, 0.75]), strict=True)),
        "least": min(values),
        "most": max(values),
        "answer": "So it comes." if share >= BAR else "So there is no such line.",
    }


def is_near(ratio):
    return 1 / FACTOR <= ratio <= FACTOR


def detail(results, row):
    """What stands behind one score of the tables."""
    net, start, calibrated = row
    line = {"net": net, "start": start + " +" * calibrated}
    names = "learning rate", "hint", "first loss", "last loss"
    records = [*of_row(results, row, TEST).values()]
    if not records:
        reason = failure(results, row)
        return line | dict.fromkeys(names, "—") | {names[0]: f"fails: {reason}"}
    finished = [record["losses"] for record in records if len(record["losses"]) == 8]
    first, last = np.mean(finished, 0)[[0, -1]] if finished else (math.nan, math.nan)
    values = best_rate(results, row), hint(results, row), first, last
    return line | dict(zip(names, (f"{each:.2g}" for each in values), strict=True))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETS, default=[*NETS])
    add("--starts", nargs="+", choices=STARTS, default=[*STARTS])
    add("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    add("--report", action="store_true", help="write the tables, train nothing")
    add("--renew", action="store_true", help="train again what starts otherwise now")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kind: Any = Training
    results, console = read(args.results, kind), Console()
    if not importlib.util.find_spec("anyinit"):
        console.print("AnyInit is not installed, so it is left out.")
        args.starts = [name for name in args.starts if name != "AnyInit"]
    selected = [*rows(args.nets, args.starts)]
    if args.renew:
        results = renewed(results, selected)
        args.results.unlink(missing_ok=True)
        for training, record in results.items():
            append(args.results, training, record)
    if not args.report:
        run(selected, args.results, results, console)
    text = report(results)
    args.results.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(Markdown(text))


if __name__ == "__main__":
    main()
