"""What goes wrong without this package and right with it, in one minute on real digits.

    make demo
    python benchmarks/demo.py --picture docs    # the README's picture, dark and light

Three copies of one deep network, ten separable convolutions without normalization, learn
scikit-learn's digits for six epochs. They differ in their first weights only: as stock
Keras draws them; with right fans and gains (`initialize`); and scaled by measurement on
one batch (`calibrate`). Shown are the verdict of `audit`, the signal by depth, accuracies,
and that a saved model predicts the same when it is loaded again.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

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

DEPTH, EPOCHS = 10, 6
BATCH = 256
BARS = "▁▂▃▄▅▆▇█"
STOCK, FANS, CALIBRATED = "stock Keras", "initialize", "initialize + calibrate"


def digits():
    """scikit-learn's 1,797 digits of 8 x 8 pixels, a quarter of them for the test."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype("float32")
    images = images.reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


def separable_net():
    """As people write it: Keras's default initializer everywhere."""
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Conv2D(32, 3, activation="tanh", name="stem")]
    )
    for i in range(DEPTH):
        layer = keras.layers.SeparableConv2D(
            32, 3, padding="same", activation="tanh", name=f"separable_{i + 1}"
        )
        model.add(layer)
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, name="scores"))
    return model


def start(model, method, batch):
    """Gives the model its first weights."""
    if method != STOCK:
        keras_glorot.initialize(model, GlorotUniform(gain="auto"), seed=3, verbose=False)
    if method == CALIBRATED:
        keras_glorot.calibrate(model, batch, verbose=False)


def signal(model, batch):
    """The std of the output of each separable layer."""
    rows = keras_glorot.propagate(model, batch).rows
    return [row["std"] for row in rows if row["layer"] == "SeparableConv2D"]


def learn(model, data):
    """The accuracy on the test digits after each epoch."""
    train_x, test_x, train_y, test_y = data
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss, metrics=["accuracy"])
    history = model.fit(
        train_x,
        train_y,
        validation_data=(test_x, test_y),
        epochs=EPOCHS,
        batch_size=32,
        verbose=0,
    )
    return history.history["val_accuracy"]


def verdict(model):
    """How many kernels have the std that they should have, as `audit` counts them."""
    note = keras_glorot.audit(model).note
    return note[: note.index(" kernels")]


def run(data, console):
    """By method: the trained model, verdict, signal by depth, accuracy by epoch."""
    results = {}
    for method in (STOCK, FANS, CALIBRATED):
        with console.status(f"{method}: {EPOCHS} epochs"):
            keras.utils.set_random_seed(3)
            model = separable_net()
            batch = data[0][:BATCH]
            start(model, method, batch)
            said = verdict(model) if method != CALIBRATED else "measured"
            results[method] = model, said, signal(model, batch), learn(model, data)
    return results


def predicts_the_same_when_loaded(model, images):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
    predictions = [each.predict(images, verbose=0) for each in (model, loaded)]
    return np.array_equal(*predictions)


def bars(stds, lowest, highest):
    """One bar per layer, the std on a logarithmic scale."""
    low, high = math.log(lowest), math.log(highest)
    heights = [(math.log(std) - low) / (high - low) for std in stds]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)


def show(results, console):
    seen = [std for _, _, stds, _ in results.values() for std in stds]
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("first weights", no_wrap=True)
    heads = "audit:\nstds right", "std at 1", "by depth", f"std at {DEPTH}", "accuracy"
    for head in heads:
        side = "center" if head == "by depth" else "right"
        table.add_column(head, justify=side, no_wrap=True, vertical="bottom")
    for method, (_, said, stds, accuracies) in results.items():
        ends = [f"{std:.1e}" for std in (stds[0], stds[-1])]
        drawn = bars(stds, min(seen), max(seen))
        table.add_row(method, said, ends[0], drawn, ends[1], f"{accuracies[-1]:.1%}")
    console.print(table)


def draw_picture(results, folder):
    """Writes signal.svg and signal-dark.svg: the std by depth, the accuracy by epoch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    looks = {"signal.svg": ("black", "white"), "signal-dark.svg": ("#e6edf3", "#0d1117")}
    styles = {
        STOCK: ("#d1242f", "o-"),
        FANS: ("#2f81f7", "s-"),
        CALIBRATED: ("#1a9850", "^-"),
    }
    for name, (ink, paper) in looks.items():
        colors = dict.fromkeys(
            (
                "text.color",
                "axes.labelcolor",
                "axes.edgecolor",
                "xtick.color",
                "ytick.color",
            ),
            ink,
        )
        style = {**colors, "figure.facecolor": paper, "axes.facecolor": paper,
                 "legend.facecolor": paper, "svg.hashsalt": "keras-glorot"}  # fmt: skip
        with plt.rc_context(style):
            figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
            for method, (_, _, stds, accuracies) in results.items():
                color, marker = styles[method]
                options = {"color": color, "ms": 4, "label": method}
                left.semilogy(range(1, DEPTH + 1), stds, marker, **options)
                right.plot(range(1, EPOCHS + 1), accuracies, marker, **options)
            left.set(xlabel="separable convolution", ylabel="std of the signal")
            right.set(xlabel="epoch", ylabel="accuracy on unseen digits", ylim=(0, 1))
            left.set_title("the signal by depth", loc="left", fontsize=10)
            right.set_title("what is learned", loc="left", fontsize=10)
            left.legend(fontsize=9)
            for ax in (left, right):
                ax.grid(alpha=0.25)
            figure.savefig(folder / name, metadata={"Date": None})
            plt.close(figure)


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
        f"{keras.backend.backend()} backend\n{DEPTH} separable convolutions on handwritten "
        f"digits, {EPOCHS} epochs\n"
    )
    data = digits()
    results = run(data, console)
    show(results, console)
    if options.picture:
        draw_picture(results, options.picture)
    model, *_ = results[CALIBRATED]
    same = predicts_the_same_when_loaded(model, data[1])
    seconds = time.perf_counter() - begin
    console.print(
        f"Saved and loaded: predictions {'identical' if same else 'DIFFER'} "
        f"({seconds:.0f} s in all)."
    )
    if not same:
        raise SystemExit("The loaded model does not predict what the saved one did.")


if __name__ == "__main__":
    main()
