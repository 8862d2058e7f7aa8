"""`audit` and `initialize` on every backbone of KerasHub and all of `keras.applications`.

    cd benchmarks/evidence; KERAS_BACKEND=torch python model_zoo.py > model_zoo.md
    KERAS_BACKEND=torch python benchmarks/evidence/model_zoo.py MixtralBackbone VGG16

For each model: what `audit` finds on the stock model and why; what `initialize` leaves and
why; what `audit` finds afterwards; whether each constant is what building the model again
gives; whether the model comes back from a file the same; and whether the loaded one,
reinitialized, gets the same weights. `model_zoo.jsonl` has the configurations of KerasHub:
the small ones of its own tests (Apache License 2.0), where they need no download.
"""

import argparse
import copy
import gc
import importlib.util
import json
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_glorot

HERE = Path(__file__).parent
COLUMNS = (
    "model",
    "weights",
    "found on the stock model",
    "left by `initialize`",
    "found after",
    "constants as built",
    "round trip",
    "loaded, same weights",
)
# What a finding on a stock model comes from, if its advice does not begin with it.
CAUSES = {
    "twin": "one initializer with one seed for several kernels",
    "relu-gain": "gain 1 before a ReLU-like activation",
    "constant-kernel": "declared constant",
    "embedding": "Glorot on an embedding",
    "recurrent": "Glorot on a recurrent kernel",
    "activation": "the layer has an activation that Keras does not know",
}
UNEXPLAINED = "UNEXPLAINED"


def hub_models() -> Iterator[tuple[str, Callable[[], keras.Model]]]:
    for line in (HERE / "model_zoo.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        module, _, name = entry["class"].rpartition(".")

        def build(module=module, name=name, entry=entry):
            # A copy: BLIP-2 changes its configuration.
            arguments = copy.deepcopy(entry["arguments"])
            arguments = keras.saving.deserialize_keras_object(arguments)
            return getattr(importlib.import_module(module), name)(**arguments)

        yield entry["name"], build


def applications() -> Iterator[tuple[str, Callable[[], keras.Model]]]:
    for name in sorted(vars(keras.applications)):
        # NASNetMobile: Keras does not offer it on PyTorch.
        if name[0].isupper() and (keras.backend.backend(), name) != (
            "torch",
            "NASNetMobile",
        ):
            yield name, lambda name=name: getattr(keras.applications, name)(weights=None)


def arrays(model: Any) -> list[np.ndarray]:
    return [np.asarray(keras.ops.convert_to_numpy(each)) for each in model.weights]


def alike(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def summary(table: keras_glorot.Table) -> str:
    """How many findings there are of each kind, and why."""
    counts = Counter()
    for finding in table.findings:
        cause = CAUSES.get(finding.code)
        if finding.code == "std" and ":" in finding.advice:
            cause = finding.advice.split(":")[0]
        elif finding.code == "not-reset":
            cause = finding.message.removeprefix("not changed: ").rstrip(".")
        counts[finding.code, cause or f"{UNEXPLAINED} ({finding.path})"] += 1
    return "; ".join(f"{n} {code}: {cause}" for (code, cause), n in counts.items()) or "–"


def constants_as_built(
    model: keras.Model, stock: list[np.ndarray], build: Callable[[], keras.Model]
) -> str:
    """Of what is the same in two stock models, how much differs in `model`.

    Kernels are drawn even where they are declared zero, so they do not count; nor does
    what is left, which has a column of its own.
    """
    other, values = arrays(build()), arrays(model)
    wrong, count = [], 0
    rows = keras_glorot.initialize(model, seed=1).rows[: len(values)]
    for row, first, second, now in zip(rows, stock, other, values, strict=True):
        if row["fan_in"] or row["done"].startswith("not changed"):
            continue
        if first.tobytes() == second.tobytes():
            count += 1
            if now.tobytes() != first.tobytes():
                wrong.append(row["path"])
    return f"all {count}" if not wrong else f"{UNEXPLAINED} ({', '.join(wrong)})"


def disturb(model: Any) -> None:
    for variable in model.weights:
        variable.assign(keras.ops.full(variable.shape, 1, variable.dtype))


def examine(name: str, build: Callable[[], keras.Model]) -> tuple[str, ...]:
    keras.utils.clear_session()
    model = build()
    stock = arrays(model)
    found = summary(keras_glorot.audit(model))
    disturb(model)
    left = summary(keras_glorot.initialize(model, seed=1))
    after = summary(keras_glorot.audit(model))
    constants = constants_as_built(model, stock, build)
    weights = arrays(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        loaded: Any = keras.saving.load_model(path)
    round_trip = "equal" if alike(weights, arrays(loaded)) else UNEXPLAINED
    disturb(loaded)
    keras_glorot.initialize(loaded, seed=1)
    again = "equal" if alike(weights, arrays(loaded)) else UNEXPLAINED
    return name, str(len(weights)), found, left, after, constants, round_trip, again


def main():
    parser = argparse.ArgumentParser(description="The table in model_zoo.md.")
    parser.add_argument("names", nargs="*", help="models; all of them by default")
    names = parser.parse_args().names
    # `initialize` warns of what it leaves, which the table shows; KerasHub of much else.
    warnings.simplefilter("ignore")
    with_hub = importlib.util.find_spec("keras_hub")
    models = [*(hub_models() if with_hub else ()), *applications()]
    models = [each for each in models if not names or each[0] in names]
    print(f"# {len(models)} models, Keras {keras.__version__}, {keras.backend.backend()}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    exceptions = unexplained = 0
    for name, build in models:
        try:
            row = examine(name, build)
        except Exception as error:  # the table is to show it
            traceback.print_exc()
            exceptions += 1
            message = str(error).split("\n")[0][:200]
            row = (name, f"EXCEPTION {type(error).__name__}: {message}", *["–"] * 6)
        unexplained += any(UNEXPLAINED in cell for cell in row)
        print(f"| {' | '.join(row)} |", flush=True)
        gc.collect()
    print(f"\n{exceptions} exceptions, {unexplained} models with something unexplained.")
    sys.exit(bool(exceptions + unexplained))


if __name__ == "__main__":
    main()
