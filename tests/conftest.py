"""One process, one backend: TensorFlow unless KERAS_BACKEND says otherwise."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_addoption(parser):
    parser.addoption(
        "--overwrite",
        action="store_true",
        help="write the golden outputs of tests/golden anew",
    )
