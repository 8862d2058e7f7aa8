"""A model with our initializers comes back the same, whichever way it went."""

import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_glorot import GlorotNormal, GlorotOrthogonal, GlorotUniform, as_default

TESTS = Path(__file__).parent


def make_model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, kernel_initializer="xavier_uniform"),
            keras.layers.Conv2D(4, 1, kernel_initializer=GlorotOrthogonal("relu", 7)),
            keras.layers.DepthwiseConv2D(3, depthwise_initializer=GlorotNormal(seed=4)),
            keras.layers.Flatten(),
            keras.layers.Dense(
                6, "tanh", kernel_initializer=GlorotNormal(gain="tanh", seed=1)
            ),
            keras.layers.Dense(
                5,
                kernel_initializer=GlorotUniform(
                    gain=0.5, seed=keras.random.SeedGenerator(9)
                ),
            ),
            keras.layers.Dense(
                3,
                kernel_initializer=GlorotUniform(
                    gain="auto", input_axes=[0], output_axes=[1]
                ),
            ),
        ]
    )


@pytest.fixture(scope="module")
def model():
    return make_model()


def assert_same(model, other, weights=True):
    configs = [
        [layer.get_config() for layer in each.layers if layer.weights]
        for each in (model, other)
    ]
    # A SeedGenerator's automatic name counts up; nothing else may differ.
    texts = [json.dumps(config, sort_keys=True, default=str) for config in configs]
    assert texts[0] == texts[1]
    assert '"tanh"' in texts[1]
    assert "1.66" not in texts[1]
    if weights:
        for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_file(model, tmp_path, suffix):
    path = str(tmp_path / f"model{suffix}")
    model.save(path)
    loaded = keras.saving.load_model(path, compile=False)
    assert_same(model, loaded)
    x = np.linspace(-1, 1, 128).reshape(2, 8, 8, 1)
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_weights_file(model, tmp_path):
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    other = keras.models.clone_model(model)
    other.load_weights(path)
    assert_same(model, other)


def test_json(model):
    assert_same(model, keras.models.model_from_json(model.to_json()), weights=False)


def test_clone_model(model):
    clone = keras.models.clone_model(model)
    assert_same(model, clone, weights=False)
    # What is seeded by a number is drawn the same again, and so is a fresh generator.
    for index in (1, 2, 4, 5):
        np.testing.assert_array_equal(
            model.layers[index].get_weights()[0], clone.layers[index].get_weights()[0]
        )


def test_model_config(model):
    assert_same(model, keras.Sequential.from_config(model.get_config()), weights=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_model(model, copied):
    assert_same(model, copied(model))


@pytest.mark.parametrize(
    "initializer",
    [
        GlorotUniform("tanh", seed=3),
        GlorotNormal(),
        GlorotNormal("auto", input_axes=[0], output_axes=[1]),
        GlorotOrthogonal("relu", input_axes=[0], output_axes=[1]),
    ],
)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_initializer(initializer, copied):
    other = copied(initializer)
    assert type(other) is type(initializer)
    assert other.get_config() == initializer.get_config()
    # Even an unseeded one: the seed it once drew goes along.
    one, two = (keras.ops.convert_to_numpy(each((5, 6))) for each in (initializer, other))
    np.testing.assert_array_equal(one, two)


def test_seed_generator_in_the_config():
    initializer = GlorotUniform(seed=keras.random.SeedGenerator(9))
    again = keras.initializers.deserialize(keras.initializers.serialize(initializer))
    assert isinstance(again.seed, keras.random.SeedGenerator)
    assert again.get_config() == initializer.get_config()
    one, two = (keras.ops.convert_to_numpy(each((5, 6))) for each in (initializer, again))
    np.testing.assert_array_equal(one, two)


def test_model_built_in_a_scope_loads_outside_it(tmp_path):
    with as_default(gain="tanh"):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].kernel_initializer.get_config() == {"gain": "tanh"}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
)
def test_saved_model(model, tmp_path):
    import tensorflow as tf

    model.export(str(tmp_path / "exported"), verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    x = np.linspace(-1, 1, 128, dtype="float32").reshape(2, 8, 8, 1)
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-5, atol=1e-6)


# Across processes ----------------------------------------------------------------------

BACKENDS = ("tensorflow", "jax", "torch")


def run_other(action, path, backend, python=sys.executable):
    """Lets another process save or check the model, as `python test_round_trips.py`."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": str(TESTS.parent),
    }
    subprocess.run(
        [python, __file__, action, str(path)], env=environment, check=True, text=True
    )


@pytest.mark.slow
def test_every_backend_reads_every_other(tmp_path):
    for backend in BACKENDS:
        run_other("save", tmp_path / f"{backend}.keras", backend)
    for backend in BACKENDS:
        run_other("check", tmp_path, backend)


def forget_newer_keys(path):
    """Takes out of a file what Keras 3.15 writes for every Dense and 3.10 can't read.

    A model of stock layers and initializers meets the same; it is no matter of ours.
    """
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(
        members["config.json"],
        object_hook=lambda entry: {
            key: value for key, value in entry.items() if key != "quantization_config"
        },
    )
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.slow
@pytest.mark.skipif(
    "KERAS_GLOROT_OTHER_PYTHON" not in os.environ,
    reason="KERAS_GLOROT_OTHER_PYTHON names no Python with another Keras",
)
def test_newest_and_oldest_keras_read_each_other(tmp_path):
    other = os.environ["KERAS_GLOROT_OTHER_PYTHON"]
    for writer, reader in ((sys.executable, other), (other, sys.executable)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        run_other("save", folder / "tensorflow.keras", "tensorflow", writer)
        forget_newer_keys(folder / "tensorflow.keras")
        run_other("check", folder, "tensorflow", reader)


def describe(initializer):
    config = initializer.get_config()
    if isinstance(config.get("seed"), dict):
        # Keras's wrapping of an object differs between its versions; the object may not.
        config["seed"] = (
            f"{config['seed']['class_name']} {config['seed']['config']['seed']}"
        )
    return config


def initializers(model):
    return [
        describe(layer.kernel_initializer)
        for layer in model.layers
        if hasattr(layer, "kernel_initializer")
    ]


def main():
    action, path = sys.argv[1], Path(sys.argv[2])
    if action == "save":
        saved = make_model()
        saved.save(path)
        np.savez(path.with_suffix(".npz"), *saved.get_weights())
        path.with_suffix(".json").write_text(json.dumps(initializers(saved)))
        return
    for file in sorted(path.glob("*.keras")):
        loaded = keras.saving.load_model(file)
        stored = np.load(file.with_suffix(".npz"))
        for one, name in zip(loaded.get_weights(), stored.files, strict=True):
            np.testing.assert_array_equal(one, stored[name])
        configs = initializers(loaded)
        stored = json.loads(file.with_suffix(".json").read_text())
        assert configs == stored, (configs, stored)
        # Seeded kernels are redrawn alike: the stream is the same in every process.
        redrawn = keras.models.clone_model(loaded)
        for index in (1, 2, 4, 5):
            np.testing.assert_array_equal(
                redrawn.layers[index].get_weights()[0],
                loaded.layers[index].get_weights()[0],
            )


if __name__ == "__main__":
    main()


WITHOUT_IMPORT = """
import json
import sys
import keras

results = []
for path in sys.argv[1:]:
    try:
        (layer,) = keras.saving.load_model(path).layers
    except TypeError as error:
        results.append(str(error))
    else:
        initializer = layer.kernel_initializer
        stock = getattr(keras.initializers, type(initializer).__name__)
        total = keras.ops.convert_to_numpy(layer.kernel).sum()
        results.append([type(initializer) is stock, float(total)])
assert not any(name.startswith("keras_glorot") for name in sys.modules)
print(json.dumps(results))
"""
LOADED: list = [
    "xavier_uniform",
    GlorotNormal(seed=3),
    GlorotUniform(seed=keras.random.SeedGenerator(3)),
]
# (Keras's own class takes axes since 3.15.)
REFUSED = [GlorotOrthogonal(), GlorotNormal(gain="tanh")]


def test_loading_without_the_import(tmp_path):
    # As the guide to files says: Keras takes its own class of the same name, if it can.
    layers, paths = [], []
    for initializer in [*LOADED, *REFUSED]:
        layers.append(keras.layers.Dense(2, kernel_initializer=initializer))
        paths.append(str(tmp_path / f"model_{len(paths)}.keras"))
        keras.Sequential([keras.Input((4,)), layers[-1]]).save(paths[-1])
    command = [sys.executable, "-c", WITHOUT_IMPORT, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    if isinstance(results[0], str):  # Keras 3.16 asks for the import
        assert all("Could not locate class 'Glorot" in result for result in results)
        return
    for layer, (is_stock, total) in zip(layers, results[: len(LOADED)], strict=False):
        assert is_stock
        kernel = keras.ops.convert_to_numpy(layer.kernel)
        assert total == pytest.approx(kernel.sum(), rel=1e-6)
    assert "'class_name': 'GlorotOrthogonal'" in results[-2]
    assert "unexpected keyword argument 'gain'" in results[-1]
