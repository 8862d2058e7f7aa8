"""The training benchmark goes on where it was, and its tables are what its lines say."""

import json
import math
import statistics
from types import SimpleNamespace

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the benchmark trains on PyTorch", allow_module_level=True)
pytest.importorskip("mlxtend")

import deep_nets
import torch
import training
from deep_nets import NETS, Training

TINY = ["--datasets", "digits", "--nets", "mlp", "--methods", "stock", "initialize"]
TINY += ["--epochs", "1", "--rates", "1e-3", "3e-3", "--seeds", "1"]
STUDENT = {2: 12.706204736}  # 97.5 % quantile of t, by the size of the sample


def lines(path):
    """The finished trainings without the time they took."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def record(validation=50.0, test=50.0, losses=(2.0, 1.0)):
    return {
        "validation_accuracy": validation,
        "test_accuracy": test,
        "losses": list(losses),
        "seconds": [1.0, 2.0],
        "versions": {"keras": "3"},
    }


def cells(text, *names):
    """The first line of a table that starts with these cells, split into its cells."""
    split = (line.strip("| ").split(" | ") for line in text.splitlines())
    return next(line for line in split if tuple(line[: len(names)]) == names)


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """What is trained again comes out the same; what is there is not trained again."""
    path = tmp_path / "training.jsonl"
    arguments = [*TINY, "--results", str(path)]
    training.main(arguments)
    whole = lines(path)
    searched = [(line["method"], line["seed"], line["learning_rate"]) for line in whole]
    assert searched[:2] == [("stock", 0, 1e-3), ("stock", 0, 3e-3)]
    assert [line["seed"] for line in whole] == [0, 0, 1] * 2
    assert all(line["versions"]["keras"] == keras.__version__ for line in whole)

    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:1] + kept[2:]))
    trained = []
    monkeypatch.setattr(training, "train", lambda *a: trained.append(a) or train(*a))
    train = deep_nets.train
    training.main(arguments)
    assert [(one.method, one.seed, one.learning_rate) for one, _ in trained] == [
        ("stock", 0, 3e-3)
    ]
    assert sorted(map(str, lines(path))) == sorted(map(str, whole))
    trained.clear()
    training.main(arguments)
    assert trained == []


def test_learning_rates_are_chosen_by_validation_at_seed_0():
    row = "digits", "mlp", "stock", 2
    results = {
        Training(*row, 1e-4, 0): record(validation=60, test=10),
        Training(*row, 3e-4, 0): record(validation=70, losses=(2.0, 1.0)),
        Training(*row, 1e-3, 0): record(validation=70, losses=(2.0, 0.5)),
        Training(*row, 3e-3, 0): record(validation=70, losses=(0.1,)),  # diverged
        Training(*row, 1e-4, 1): record(validation=99, test=99),
    }
    assert training.best_rate(results, row) == 1e-3


def test_tables_say_what_the_lines_say():
    results = {}
    for method, accuracies in {"initialize": (50, 54), "calibrate": (59, 67)}.items():
        row = "digits", "mlp", method, 2
        results[Training(*row, 1e-3, 0)] = record(test=1.0)  # must not count
        for seed, accuracy in enumerate(accuracies, 1):
            results[Training(*row, 1e-3, seed)] = record(test=accuracy)
    results[Training("digits", "mlp", "AnyInit analytic", 2, 1e-3, 0)] = {
        "failure": "No.",
        "versions": {},
    }
    text = training.report(results)

    def expected(sample):
        half = STUDENT[2] * statistics.stdev(sample) / math.sqrt(2)
        return f"{statistics.mean(sample):.2f} ± {half:.2f}"

    header = cells(text, "net", "data", "epochs", "stock")
    accuracies = dict(zip(header, cells(text, "mlp", "digits"), strict=True))
    assert accuracies["initialize"] == expected([50, 54])
    assert accuracies["calibrate"] == f"**{expected([59, 67])}**"
    assert accuracies["AnyInit analytic"] == "fails"
    assert accuracies["stock"] == "—"
    paired = text[text.index("minus the others") :]
    header = cells(paired, "net", "data", "epochs", "stock")
    differences = dict(zip(header, cells(paired, "mlp", "digits"), strict=True))
    assert differences["initialize"] == expected([9, 13])
    assert differences["AnyInit analytic"] == "—"


def test_what_a_peer_can_t_do_is_a_line_and_not_tried_again(monkeypatch):
    def fail(build, x, seed):
        raise ValueError("It can't be.")

    for method in ("AnyInit analytic", "stock"):
        monkeypatch.setitem(deep_nets.METHODS, method, fail)
    first = Training("digits", "mlp", "AnyInit analytic", 1, 1e-3, 0)
    failed = deep_nets.train(first, lambda epochs: None)
    assert failed == {"failure": "ValueError: It can't be."}
    arguments = {"datasets": ["digits"], "nets": ["mlp"], "methods": ["AnyInit analytic"]}
    args = SimpleNamespace(**arguments, epochs=1, rates=[1e-3, 3e-3], seeds=5)
    assert next(training.trainings(args, {})) == first
    assert list(training.trainings(args, {first: failed})) == []
    # Our own failures must not become lines.
    with pytest.raises(ValueError, match="can't be"):
        deep_nets.train(Training("digits", "mlp", "stock", 1, 1e-3, 0), lambda epochs: None)


@pytest.mark.parametrize("net", ["mlp", "transformer+ln"])
def test_the_traced_gradient_is_that_of_keras(net):
    """With other weights and images than those it was traced with."""
    pixels = NETS[net].pixels["digits"]
    model = NETS[net].build((pixels, pixels, 1))
    values = [variable.value for variable in model.trainable_variables]
    x = torch.randn(deep_nets.MINIBATCH, pixels, pixels, 1)
    y = torch.randint(deep_nets.CLASSES, (deep_nets.MINIBATCH,))
    loss, gradients = deep_nets.gradient("digits", net)(values, x, y)
    keras_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x))
    torch.testing.assert_close(loss, keras_loss)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(keras_loss, values), rtol=1e-4, atol=1e-6
    )


def test_batch_normalization_is_out_and_the_rest_is_there():
    bare = NETS["mobilenet"].build((32, 32, 1))
    kinds = [type(layer).__name__ for layer in bare.layers]
    whole = keras.applications.MobileNetV2((32, 32, 1), weights=None, alpha=0.35)
    expected = [type(layer).__name__ for layer in whole.layers]
    assert kinds == [kind for kind in expected if kind != "BatchNormalization"]
    assert all(getattr(layer, "use_bias", True) for layer in bare.layers)


@pytest.mark.parametrize("dataset", [*deep_nets.SOURCES])
def test_parts_of_a_data_set_are_disjoint_and_follow_the_seed(dataset):
    def load(seed):
        parts = deep_nets.load(Training(dataset, "mlp", "stock", 1, 1e-3, seed))
        assert {name: len(y) for name, (_, y) in parts.items()} == deep_nets.IMAGES
        return torch.cat([x for x, _ in parts.values()]).numpy()

    images = load(0)
    assert len(np.unique(images, axis=0)) == len(images)
    assert not np.array_equal(images, load(1))
    np.testing.assert_array_equal(images, load(0))
