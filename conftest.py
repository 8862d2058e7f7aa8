"""One process, one backend: TensorFlow unless KERAS_BACKEND says otherwise."""

import gc
import os
import random

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Eight devices to shard over; JAX looks at this when it starts.
if os.environ["KERAS_BACKEND"] == "jax":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

pytest.register_assert_rewrite("printed")  # a helper with assertions


def pytest_addoption(parser):
    parser.addoption(
        "--overwrite",
        action="store_true",
        help="write the golden outputs of tests/golden anew",
    )
    parser.addoption(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="run the files, and the tests in each file, in a random order",
    )


def pytest_report_header(config):
    seed = config.getoption("--shuffle")
    return None if seed is None else f"order: --shuffle {seed}"


def pytest_collection_modifyitems(config, items):
    seed = config.getoption("--shuffle")
    if seed is not None:
        rng = random.Random(seed)
        place = {path: rng.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: (place[item.path], rng.random()))


def pytest_collection_finish(session):
    """What the imports made stays to the end: no garbage collection looks at it again."""
    gc.collect()
    gc.freeze()
