"""Installs files of a release as a user does, and uses what was installed.

`make installs` runs it on dist/. Each file is installed with each backend into an empty
environment, which is removed before the next one is made. All must draw the same weights.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from hashlib import sha256
from importlib import metadata
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
BIN, SUFFIX = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")


def main(files: list[str]) -> None:
    assert files, "`make dist` or `make wheels` first: dist/ holds nothing to install."
    drawn = {install(Path(file).resolve(), name) for file in files for name in BACKENDS}
    assert len(drawn) == 1, drawn


def install(file: Path, backend: str) -> str:
    """Tries the file with this backend, and returns the weights that it draws."""
    began = time.monotonic()
    version = re.match(r"keras_glorot-(.+?)(-|\.tar)", file.name)[1]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        venv.create(f"{folder}/env", with_pip=True)

        def run(program: str, *arguments: str) -> str:
            command = [str(Path(folder, "env", BIN, program + SUFFIX)), *arguments]
            result = subprocess.run(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
            )
            assert result.returncode == 0, f"{file.name}[{backend}]: {program} {arguments}"
            return result.stdout

        # -I keeps the checkout and the user's own packages out of Python's path.
        run("python", "-I", "-m", "pip", "install", "--quiet", f"{file}[{backend}]")
        about = run("keras-glorot", "--version")
        assert f"keras-glorot {version}, drawing with native kernel" in about, about
        used = run("python", "-I", __file__, "--use")
        run("keras-glorot", "audit", "model.keras")
    seconds = time.monotonic() - began
    print(f"{file.name}[{backend}], {seconds:.0f} s\n{about}{used}", flush=True)
    return used.splitlines()[-1]


def use() -> None:
    """The first lines of a user, in the environment: a layer, a file, the tools."""
    import keras
    import numpy as np

    from keras_glorot import GlorotUniform, audit, initialize

    layer = keras.layers.Dense(8, kernel_initializer="xavier_uniform")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save("model.keras")
    loaded = keras.saving.load_model("model.keras")
    for before, after in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert isinstance(loaded.layers[0].kernel_initializer, GlorotUniform)
    assert not audit(loaded).findings
    initialize(loaded, seed=1)
    assert not audit(loaded).findings
    print(keras.backend.backend(), metadata.version(keras.backend.backend()))
    print("weights of seed 1:", sha256(loaded.get_weights()[0].tobytes()).hexdigest())


if __name__ == "__main__":
    if sys.argv[1:] == ["--use"]:
        use()
    else:
        main(sys.argv[1:])
