"""The example in every public docstring runs and prints what it shows."""

import doctest

import keras
import numpy as np
import pytest

import keras_glorot
import keras_glorot.recipes

matplotlib = pytest.importorskip("matplotlib")  # two examples draw
matplotlib.use("agg")

# What an example may use without making it.
NAMES = {"keras": keras, "keras_glorot": keras_glorot, "np": np}
NAMES |= {name: getattr(keras_glorot, name) for name in keras_glorot.__all__}


def small_model():
    hidden = [keras.layers.Dense(8, "tanh") for _ in range(3)]
    return keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(2)])


def examples():
    finder = doctest.DocTestFinder(exclude_empty=False)
    found = finder.find(keras_glorot.recipes, globs=dict(NAMES))
    for name in keras_glorot.__all__:
        public = getattr(keras_glorot, name)
        if callable(public):
            found += finder.find(public, name, globs=dict(NAMES))
    return [example for example in found if example.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_example(example, capsys):
    keras.utils.clear_session()
    model = small_model()
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    example.globs |= {"model": model, "x": x}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example)
    assert runner.failures == 0, capsys.readouterr().out


def test_every_public_name_has_an_example():
    with_example = {example.name for example in examples()}
    for name in keras_glorot.__all__:
        if callable(getattr(keras_glorot, name)):
            assert name in with_example, f"{name} has no example"
