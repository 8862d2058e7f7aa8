"""Two ways in which a deep network without normalization does not learn, and the repair.

    make demo
    python benchmarks/demo.py --picture docs    # the README's picture, dark and light

Two networks learn scikit-learn's digits, each from several starts that differ in their
first weights only. In the first, 100 dense layers of ReLU, every start draws what it
declares, and depth alone is too much for two of them. In the second, ten separable
convolutions, stock Keras counts the fans wrongly. Shown are the verdict of `audit`, what
tells the examples apart by depth, accuracies, and that a saved model predicts the same when
it is loaded again.
"""

import argparse
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_glorot
from keras_glorot import GlorotUniform

EPOCHS = 6
BATCH = 256
BARS = "▁▂▃▄▅▆▇█"
BAR_COUNT = 10


def digits():
    """scikit-learn's 1,797 digits of 8 x 8 pixels, a quarter of them for the test."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype("float32")
    images = images.reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


@dataclasses.dataclass(frozen=True)
class Net:
    """A network, its starts by name, and how it is trained."""

    title: str
    axis: str
    build: Callable[[str], Any]
    starts: tuple[str, ...]
    optimizer: Callable[[], Any]


STOCK, HE, FANS, ISOMETRIC = "stock Keras", "he_normal", "initialize", "isometric"


def dense_net(start):
    kernel = "he_normal" if start == HE else "glorot_uniform"  # Keras's default
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    for i in range(100):
        options: Any = {"kernel_initializer": kernel, "name": f"hidden_{i + 1}"}
        model.add(keras.layers.Dense(64, "relu", use_bias=False, **options))
    model.add(keras.layers.Dense(10, name="scores"))
    if start == ISOMETRIC:
        keras_glorot.initialize(model, "isometric", seed=3, verbose=False)
    return model


def separable_net(start):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(32, 3, activation="tanh", name="stem")]
    )
    for i in range(10):
        options: Any = {"padding": "same", "activation": "tanh", "name": f"hidden_{i + 1}"}
        model.add(keras.layers.SeparableConv2D(32, 3, **options))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, name="scores"))
    if start == FANS:
        keras_glorot.initialize(model, GlorotUniform(gain="auto"), seed=3, verbose=False)
    return model


NETS = [
    Net(
        "100 dense layers of ReLU",
        "layer",
        dense_net,
        (STOCK, HE, ISOMETRIC),
        lambda: keras.optimizers.Adam(1e-4),
    ),
    Net(
        "10 separable convolutions",
        "separable convolution",
        separable_net,
        (STOCK, FANS),
        lambda: keras.optimizers.SGD(0.05),
    ),
]


@dataclasses.dataclass(frozen=True)
class Result:
    """What is shown of one start."""

    model: Any
    verdict: str
    apart: list[float]  # what tells examples apart, by depth
    accuracies: list[float]  # by epoch


def verdict(model):
    """How many kernels have the std that they should have, as `audit` counts them."""
    note = keras_glorot.audit(model).note
    return note[: note.index(" kernels")]


def differences(model, batch):
    """Of each hidden layer: the RMS of its output times √(1 - likeness)."""
    rows = keras_glorot.propagate(model, batch).rows
    return [
        math.hypot(row["mean"], row["std"]) * math.sqrt(1 - row["likeness"])
        for row in rows
        if row["path"].startswith("hidden")
    ]


def learn(model, optimizer, data):
    """The accuracy on the test digits after each epoch."""
    train_x, test_x, train_y, test_y = data
    accuracies = []

    def test(*_):  # `validation_data` would compile another program
        scores = keras.ops.convert_to_numpy(model(test_x))
        accuracies.append(float(np.mean(scores.argmax(axis=1) == test_y)))

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    callback = keras.callbacks.LambdaCallback(on_epoch_end=test)
    options: Any = {"batch_size": 32, "callbacks": [callback], "verbose": 0}
    model.fit(train_x, train_y, epochs=EPOCHS, **options)
    return accuracies


def run(net, data, console):
    """By start: what is shown of it."""
    results = {}
    for start in net.starts:
        with console.status(f"{net.title}, {start}: {EPOCHS} epochs"):
            keras.utils.set_random_seed(3)
            model = net.build(start)
            found, apart = verdict(model), differences(model, data[0][:BATCH])
            accuracies = learn(model, net.optimizer(), data)
            results[start] = Result(model, found, apart, accuracies)
    return results


def predicts_the_same_when_loaded(model, images):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
    predictions = [each.predict(images, verbose=0) for each in (model, loaded)]
    return np.array_equal(*predictions)


def bars(values, lowest, highest):
    """One bar for each tenth of the depth, on a logarithmic scale."""
    low, high = math.log(lowest), math.log(highest)
    step = len(values) // BAR_COUNT
    heights = [(math.log(each) - low) / (high - low) for each in values[step - 1 :: step]]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)


def show(net, results, console):
    seen = [each for result in results.values() for each in result.apart]
    depth = len(seen) // len(results)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("first weights", no_wrap=True)
    heads = (
        "audit:\nstds right",
        "examples\napart at 1",
        "by depth",
        f"at {depth}",
        "accuracy",
    )
    for head in heads:
        side = "center" if head == "by depth" else "right"
        table.add_column(head, justify=side, no_wrap=True, vertical="bottom")
    for start, result in results.items():
        ends = [f"{each:.1e}" for each in (result.apart[0], result.apart[-1])]
        drawn = bars(result.apart, min(seen), max(seen))
        accuracy = f"{result.accuracies[-1]:.1%}"
        table.add_row(start, result.verdict, ends[0], drawn, ends[1], accuracy)
    console.print(f"{net.title}, {EPOCHS} epochs of handwritten digits")
    console.print(table)


STYLES = {
    STOCK: ("#d1242f", "o-"),
    HE: ("#bf6f00", "^-"),
    FANS: ("#2f81f7", "s-"),
    ISOMETRIC: ("#1a9850", "D-"),
}
LOOKS = {"signal.svg": ("black", "white"), "signal-dark.svg": ("#e6edf3", "#0d1117")}
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def draw_picture(nets, folder):
    """Writes signal.svg and signal-dark.svg: a row for each net, by depth and by epoch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    for name, (ink, paper) in LOOKS.items():
        style = {**dict.fromkeys(INKED, ink), "figure.facecolor": paper, "font.size": 11,
                 "axes.facecolor": paper, "legend.facecolor": paper,
                 "svg.hashsalt": "keras-glorot", "svg.fonttype": "none"}  # fmt: skip
        with plt.rc_context(style):
            figure, axes = plt.subplots(len(nets), 2, figsize=(9, 6), layout="constrained")
            for (net, results), row in zip(nets, axes, strict=True):
                draw_row(net, results, *row)
            figure.savefig(folder / name, metadata={"Date": None})
            plt.close(figure)


def draw_row(net, results, left, right):
    for start, result in results.items():
        color, marker = STYLES[start]
        depth, epochs = len(result.apart), len(result.accuracies)
        options = {"color": color, "ms": 4, "label": start, "markevery": depth // BAR_COUNT}
        left.semilogy(range(1, depth + 1), result.apart, marker, **options)
        right.plot(range(1, epochs + 1), result.accuracies, marker, color=color, ms=4)
    left.set(xlabel=net.axis, ylabel="distance between examples")
    right.set(xlabel="epoch", ylabel="accuracy on unseen digits", ylim=(0, 1))
    left.set_title(net.title, loc="left", fontsize=11)
    right.set_title("what is learned", loc="left", fontsize=11)
    left.legend(fontsize=10)
    for ax in (left, right):
        ax.grid(alpha=0.25)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "an existing folder, to write the README's picture to"
    parser.add_argument("--picture", metavar="FOLDER", type=Path, help=text)
    options = parser.parse_args()
    if options.picture and not options.picture.is_dir():
        parser.error(f"--picture must be an existing folder. Received: {options.picture}")
    console = Console(highlight=False)
    begin = time.perf_counter()
    console.print(
        f"keras-glorot {keras_glorot.__version__} on Keras {keras.__version__}, "
        f"{keras.backend.backend()} backend"
    )
    data, nets = digits(), []
    for net in NETS:
        console.print()
        nets.append((net, run(net, data, console)))
        show(*nets[-1], console)
    if options.picture:
        draw_picture(nets, options.picture)
    same = predicts_the_same_when_loaded(nets[0][1][ISOMETRIC].model, data[1])
    seconds = time.perf_counter() - begin
    console.print(f"\nSaved and loaded: predictions {'identical' if same else 'DIFFER'}.")
    console.print(f"{seconds:.0f} s in all")
    if not same:
        raise SystemExit("The loaded model does not predict what the saved one did.")


if __name__ == "__main__":
    main()
