"""The table of stock Keras is right, in the version that is installed."""

import math
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from models import SelfAttention

from keras_glorot._models.survey import Survey

layers: Any = keras.layers
PAGE = Path(__file__).parent.parent / "docs" / "evidence" / "stock.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`\w+\(.*?) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
CASES = {
    "`Dense(512)`": (lambda: layers.Dense(512), (512,)),
    "`DepthwiseConv2D(3)`": (lambda: layers.DepthwiseConv2D(3), (8, 8, 512)),
    "`Conv2D(512": (lambda: layers.Conv2D(512, 3, groups=32), (8, 8, 512)),
    "`SeparableConv2D": (lambda: layers.SeparableConv2D(64, 3), (8, 8, 64)),
    "`MultiHeadAttention": (lambda: SelfAttention(layers.MultiHeadAttention(8, 32)),
                            (4, 256)),
    "`Conv2DTranspose": (lambda: layers.Conv2DTranspose(16, 3), (8, 8, 64)),
    "he_normal": (lambda: layers.Conv2DTranspose(16, 3, kernel_initializer="he_normal"),
                  (8, 8, 64)),
}  # fmt: skip
COLUMN = {"3.10": 1, "3.15": 2}.get(".".join(keras.__version__.split(".")[:2]))


def test_the_page_has_the_table():
    assert len(ROWS) == len(CASES)


@pytest.mark.skipif(COLUMN is None, reason="the page has no column for this Keras")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_ratio_of_stds(row):
    """The std of 576 values or more is right to 3 % (one standard error): 12 % is four."""
    name = next(key for key in reversed(CASES) if key in row[0])
    make, shape = CASES[name]
    keras.utils.set_random_seed(0)
    layer = make()
    layer.build((None, *shape))
    weight = next(each for each in Survey(layer).weights if each.fans is not None)
    fan_in, fan_out = weight.fans
    right = math.sqrt(2 / fan_in if name == "he_normal" else 2 / (fan_in + fan_out))
    ratio = np.std(keras.ops.convert_to_numpy(weight.variable)) / right
    assert ratio == pytest.approx(float(row[COLUMN]), rel=0.12)
