"""The training benchmark goes on where it was, and its tables are what its lines say."""

import functools
import json
import math
import statistics

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the benchmark draws its weights on PyTorch", allow_module_level=True)
pytest.importorskip("mlxtend")
pytest.importorskip("jax")

import torch
import training
import training_starts
import window_layers
from keras import layers
from training import Training
from training_nets import NETS
from training_starts import first_weights, load
from training_steps import Trainer

ROW = "gelu", "isometric", False
STUDENT = {5: 2.7764451052}  # 97.5 % quantile of t, by the size of the sample


def record(validation=50.0, test=50.0, losses=(2.0,) * 7 + (1.0,), **more):
    return {
        "validation": validation,
        "test": test,
        "losses": list(losses),
        "hint": 1e-3,
        "seconds": 1.0,
        "versions": {"keras": "3"},
    } | more


def finished(row, tests, rate=1e-3, **more):
    """Lines of a row whose best rate is `rate`, with these scores in the test."""
    at = training.RATES.index(rate)
    searched = {
        Training(*row, training.RATES[at + step], seed): record(70.0 - step**2, 1.0, **more)
        for step in (-1, 0, 1)
        for seed in training.SEARCH
    }
    return searched | {
        Training(*row, rate, seed): record(0.0, test, **more)
        for seed, test in zip(training.TEST, tests, strict=True)
    }


def cells(text, *names):
    """The first line of a table that starts with these cells, split into its cells."""
    split = (line.strip("| ").split(" | ") for line in text.splitlines())
    return next(line for line in split if tuple(line[: len(names)]) == names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["separable", "mobile", "detector", "translator"])
def test_the_program_computes_what_keras_does(name):
    """The first loss: windows for convolutions, weights in the same order."""
    x, y = load(name, 0)["train"]
    weights = first_weights(name, "isometric", False, 0)
    model = NETS[name].build()
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    places = training.places(name, 0)[:8]
    with Trainer() as trainer:
        (first, *_), *_ = trainer(name, weights, np.float32(0), x, y, places, [])
    batch = keras.tree.map_structure(lambda a: torch.from_numpy(a[places[0]]), (x, y))
    with torch.no_grad():
        expected = NETS[name].loss(model(batch[0], training=True), batch[1])
    assert first == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_windows_are_what_a_convolution_sees(size, stride):
    kernel = np.random.default_rng(0).normal(size=(size, size, 2, 3)).astype("float32")
    x = np.random.default_rng(1).normal(size=(4, 8, 8, 2)).astype("float32")
    layer = layers.Conv2D(3, size, stride, "same")
    seen = np.concatenate(window_layers.windows(x, layer), -1)
    expected = keras.ops.conv(x, kernel, stride, "same").numpy()
    np.testing.assert_allclose(seen @ kernel.reshape(-1, 3), expected, atol=1e-5)


@pytest.mark.slow
def test_training_follows_the_seed_and_learns():
    with Trainer() as trainer:
        one = Training(*ROW, 1e-3, 1)
        first, again = (training.train(one, {}, trainer) for _ in range(2))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert first["losses"][-1] < first["losses"][0] / 3
    assert first["test"] > 70


def test_lsuv_gives_each_layer_a_std_of_1():
    x, _ = load("conv", 0)["train"]
    model = training_starts.lsuv(NETS["conv"], 0, x[:64])
    first = model.layers[1]
    seen = keras.ops.conv(x[:64], first.kernel, first.strides, "same")
    assert seen.detach().numpy().std() == pytest.approx(1, rel=1e-4)


def test_orthogonal_has_a_gain_before_a_rectifier():
    model = training_starts.orthogonal(NETS["blocks"], 0, None)
    for name, gain in (("block_0_inner", 2), ("block_0_end", 1)):
        kernel = model.get_layer(name).kernel.numpy()
        np.testing.assert_allclose(kernel @ kernel.T, gain * np.eye(64), atol=1e-5)


def test_fixup_starts_with_branches_of_nothing():
    model = training_starts.fixup(NETS["blocks"], 0, None)
    assert not model(np.ones((1, 8, 8, 1))).detach().numpy().any()
    inner = model.get_layer("block_0_inner").kernel.numpy()
    assert inner.std() == pytest.approx(math.sqrt(2 / 64) / math.sqrt(24), rel=0.1)


@pytest.mark.parametrize("best", [2, 7, 10])
def test_best_rate_is_never_at_an_end_of_those_tried(best):
    results = {}
    for one in training.trainings([ROW], results):
        distance = abs(training.RATES.index(one.learning_rate) - best)
        results[one] = record(validation=90 - distance)
    assert training.best_rate(results, ROW) == training.RATES[best]
    searched = {each for each in results if each.seed in training.SEARCH}
    tried = {training.RATES.index(each.learning_rate) for each in searched}
    assert {best - 1, best, best + 1} <= tried
    assert len(searched) == 3 * len(tried)
    tested = [each for each in results if each.seed in training.TEST]
    assert [each.seed for each in tested] == [*training.TEST]
    assert {each.learning_rate for each in tested} == {training.RATES[best]}


def test_learning_rates_that_diverge_are_not_chosen():
    results = finished(ROW, [50] * 5)
    for one in [each for each in results if each.learning_rate == 1e-3]:
        results[one] = record(90.0, losses=(2.0,))
    results[Training(*ROW, 1e-3, 0)]["losses"] = []
    assert training.best_rate(results, ROW) != 1e-3


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    trained = []

    def train(one, results, trainer):
        trained.append(one)
        return record()

    monkeypatch.setattr(training, "train", train)
    path = tmp_path / "training.jsonl"
    arguments = ["--nets", "gelu", "--starts", "stock", "--results", str(path)]
    training.main(arguments)
    whole = list(trained)
    assert {each.row for each in whole} == {("gelu", "stock", c) for c in (False, True)}
    kept = path.read_text().splitlines(keepends=True)
    assert json.loads(kept[0])["net"] == "gelu"
    path.write_text("".join(kept[:1] + kept[2:]))
    trained.clear()
    training.main(arguments)
    assert trained == whole[1:2]


def test_weights_that_calibrate_leaves_are_not_trained_again():
    one = Training("silu", "isometric", False, 1e-3, 0)
    again = Training("silu", "isometric", True, 1e-3, 0)
    alone = record(weights=training_starts.checksum(*one.row, 0))
    line = training.train(again, {one: alone}, trainer=None)
    assert line == alone | {"same_weights": True, "seconds": 0.0}


def test_what_would_start_otherwise_now_is_trained_again():
    row, seed = ("silu", "isometric", False), 0
    lines = {
        Training(*row, 1e-3, seed): record(weights=training_starts.checksum(*row, seed)),
        Training(*row, 3e-3, seed): record(weights="another"),
        Training("relu", "isometric", False, 1e-3, seed): record(weights="another"),
    }
    kept, _, of_another_row = lines
    assert [*training.renewed(lines, [row])] == [kept, of_another_row]


def test_what_a_peer_can_t_do_is_a_line_and_not_tried_again(monkeypatch):
    def fail(net, seed, x):
        raise ValueError("It can't be.")

    for start in ("AnyInit", "stock"):
        monkeypatch.setitem(training_starts.STARTS, start, fail)
    first_weights.cache_clear()
    first = Training("relu", "AnyInit", False, 1e-3, 0)
    failed = training.train(first, {}, None)
    assert failed == {"failure": "ValueError: It can't be."}
    rows = [("relu", "AnyInit", False), ("relu", "AnyInit", True)]
    assert next(training.trainings(rows, {})) == first
    assert list(training.trainings(rows, {first: failed})) == []
    with pytest.raises(ValueError, match="can't be"):  # our own must not become lines
        training.train(Training("relu", "stock", False, 1e-3, 0), {}, None)


def test_tables_say_what_the_lines_say():
    stock, ours = [50, 51, 52, 53, 54], [80, 81, 82, 83, 85]
    worse = [score - 10 - each for each, score in enumerate(ours)]
    results = {
        **finished(("gelu", "stock", False), stock),
        **finished(("gelu", "stock", True), stock, same_weights=True),
        **finished(("gelu", "isometric", False), ours),
        **finished(("gelu", "isometric", True), worse),
        **finished(("SIREN", "stock", False), [100, 102, 101, 103, 104]),
    }
    text = training.report(results)

    def expected(sample):
        half = STUDENT[5] * statistics.stdev(sample) / math.sqrt(5)
        return f"{statistics.mean(sample):.1f} ± {half:.1f}"

    accuracies = text[text.index("## Without normalization") :]
    alone = dict(zip(cells(accuracies, "net"), cells(accuracies, "gelu"), strict=True))
    assert alone["stock"] == expected(stock)
    assert alone["isometric"] == f"**{expected(ours)}**"
    assert alone["LSUV"] == "—"
    harm = text[text.index("do harm?", 100) :]
    line = dict(zip(cells(harm, "net"), cells(harm, "gelu"), strict=True))
    differences = [one - other for one, other in zip(worse, ours, strict=True)]
    assert line["c(iso) − iso"] == expected(differences)
    assert line["c(stock) − stock"] == "="
    assert "same start without it, 1: 1 below zero (gelu), 0 above;" in text
    assert "against stock, 1: 0 below zero, 1 above." in text
    assert cells(harm, "SIREN")[1].startswith(f"{math.exp(-1.02):.3g} ± ")


def test_holm_corrects_for_all_comparisons():
    lines = [("net", "pair", -1.0, p) for p in (0.04, 0.001, 0.02, 0.024)]
    assert training.holm(lines) == [lines[1]]  # 0.001 ≤ 0.05 / 4, 0.02 > 0.05 / 3
    assert training.holm(lines[1:2] + lines[2:3]) == lines[1:3]


@pytest.mark.parametrize("net", ["gelu", "large conv", "detector", "recommender", "U-Net"])
def test_parts_of_a_data_set_follow_the_seed(net):
    def parts(seed):
        load.cache_clear()
        return keras.tree.flatten(load(net, seed))

    same = functools.partial(all, ())
    for one, again, other in zip(parts(0), parts(0), parts(1), strict=True):
        np.testing.assert_array_equal(one, again)
        same = same and np.array_equal(one, other)
    assert not same
    assert {len(each) for each in parts(0)} == {NETS[net].train, 500}
