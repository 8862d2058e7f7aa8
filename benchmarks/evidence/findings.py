"""What `propagate` says of networks that training works for, and of sick ones.

    python benchmarks/evidence/findings.py  # some minutes

Each healthy network, with stock initializers, is shown to `propagate` and then trained with
Adam until its loss is half of that of the best constant answer. Writes `findings.md`.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_glorot import propagate

# The tests have them too.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))

from networks import HEALTHY, SICK

RESULT = Path(__file__).with_suffix(".md")
RATES, EPOCHS = (3e-3, 1e-3), 60
HEAD = """# Findings of `propagate`

Healthy networks, with stock initializers: the findings of `propagate`, and after how many
epochs of 512 or 768 examples the loss is half of that of the best constant answer.

| network | epochs | findings |
|---|---|---|
"""
SICK_HEAD = """
Sick networks, and the findings:

| network | findings |
|---|---|
"""


class HalfWay(keras.callbacks.Callback):
    """Stops at half of a loss."""

    def __init__(self, loss: float):
        super().__init__()
        self.loss, self.epochs = loss, None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs["loss"] < self.loss / 2:
            model: Any = self.model
            self.epochs, model.stop_training = epoch + 1, True


def epochs_to_half(name: str) -> int | None:
    """With the first rate that reaches it."""
    return next(filter(None, (trained(name, rate) for rate in RATES)), None)


def trained(name: str, rate: float) -> int | None:
    keras.utils.set_random_seed(0)
    model, x, y, loss = HEALTHY[name]()
    model.compile(keras.optimizers.Adam(rate), loss)
    half_way = HalfWay(constant_loss(y, loss))
    model.fit(x, y, 32, EPOCHS, callbacks=[half_way], verbose=0)
    return half_way.epochs


def constant_loss(y: Any, loss: Any) -> float:
    """Of the best answer that is the same for all examples."""
    if isinstance(y, list):
        return sum(map(constant_loss, y, loss))
    if loss == "mse":
        return float(y.var(0).mean())
    shares = np.bincount(np.ravel(y).astype(int)) / y.size
    return float(-(shares * np.log(np.maximum(shares, 1e-12))).sum())


def findings(model: keras.Model, x: Any) -> str:
    codes = {finding.code for finding in propagate(model, x, verbose=False).findings}
    return ", ".join(f"`{code}`" for code in sorted(codes)) or "–"


def main() -> None:
    lines = [HEAD]
    for name, make in HEALTHY.items():
        keras.utils.set_random_seed(0)
        model, x, *_ = make()
        found = findings(model, keras.tree.map_structure(lambda part: part[:64], x))
        row = f"| {name.replace('_', ' ')} | {epochs_to_half(name)} | {found} |\n"
        print(row, end="", flush=True)
        lines.append(row)
    lines.append(SICK_HEAD)
    for name, make in SICK.items():
        keras.utils.set_random_seed(0)
        model, x, _ = make()
        lines.append(f"| {name.replace('_', ' ')} | {findings(model, x)} |\n")
    RESULT.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
