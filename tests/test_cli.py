"""The command line: one line and exit code 2 for whatever is wrong, and no half file."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_glorot.cli import main

layers: Any = keras.layers  # Keras declares many arguments as `str`


def small():
    stack = [
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.Dense(4, "tanh", name="dense"),
    ]
    return keras.Sequential([keras.Input((8, 8, 128)), *stack])


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.keras"
    keras.utils.set_random_seed(0)
    small().save(path)
    return str(path)


def weights(path):
    return [keras.ops.convert_to_numpy(w) for w in keras.saving.load_model(path).weights]


def test_audit_prints_the_table(model_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["audit", model_file]) == 0
    text = capsys.readouterr().out
    assert "audit: 1 warning. 1 of 2 kernels have the expected std; 4 variables" in text
    assert "warning [std] depthwise/kernel: The std is 0.1" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_all_that_stands_on_stdout(model_file, capfd):
    assert main(["audit", model_file, "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert len(content["rows"]) == 4
    assert [finding["severity"] for finding in content["findings"]] == ["warning"]


@pytest.mark.parametrize(("severity", "code"), [("error", 0), ("warning", 1), ("info", 1)])
def test_fail_on(model_file, severity, code):
    assert main(["audit", model_file, "--fail-on", severity]) == code


def test_ignored_findings_are_neither_shown_nor_counted(model_file, capsys):
    arguments = ["audit", model_file, "--fail-on", "info"]
    assert main([*arguments, "--ignore", "twin", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["code"] == "std"
    assert main([*arguments, "--ignore", "twin", "--ignore", "std"]) == 0
    assert "[std]" not in capsys.readouterr().out


def test_init_then_audit(model_file, tmp_path, capsys):
    out = tmp_path / "out.keras"
    arguments = ["init", model_file, "-o", str(out), "--seed", "1"]
    assert main([*arguments, "--distribution", "normal", "--gain", "auto"]) == 0
    assert "GlorotNormal(gain=1.667)" in capsys.readouterr().out
    assert main(["audit", str(out), "--fail-on", "info"]) == 0
    assert os.listdir(tmp_path) == ["out.keras"]
    first = weights(out)
    assert main([*arguments, "--distribution", "normal", "--gain", "auto"]) == 0
    for one, other in zip(first, weights(out), strict=True):
        np.testing.assert_array_equal(one, other)
    assert main([*arguments, "--gain", "tanh"]) == 0
    assert not np.array_equal(first[0], weights(out)[0])


def test_an_architecture_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.applications, "MobileNet", lambda weights: small())
    assert main(["init", "MobileNet", "-o", str(tmp_path / "out.keras")]) == 0
    assert main(["audit", "MobileNet", "--fail-on", "warning"]) == 1


def damaged(path, kind, model_file):
    """Writes a file that is not what it should be."""
    content = Path(model_file).read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "foreign":
            path.write_text("not a model")
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(
                content[:700] + bytes(255 - b for b in content[700:900]) + content[900:]
            )
        case "other zip":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("a.txt", "a")
        case "bad json":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("config.json", "{")
        case "unknown class":
            config = {"module": "builtins", "class_name": "eval", "config": {}}
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("config.json", json.dumps(config))
        case "folder":
            path.mkdir()
        case "unsafe":
            function = layers.Lambda(lambda x: x + 1)
            keras.Sequential([keras.Input((2,)), function]).save(path)


KINDS = ["truncated", "foreign", "empty", "flipped", "other zip", "bad json",
         "unknown class", "folder", "unsafe"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["audit", "init"])
def test_bad_files_are_one_line(kind, command, model_file, tmp_path, capsys):
    bad, out = tmp_path / "bad.keras", tmp_path / "out.keras"
    damaged(bad, kind, model_file)
    out.write_text("kept")
    extra = ["-o", str(out)] if command == "init" else ["--json"]
    assert main([command, str(bad), *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("keras-glorot: error: ")
    assert out.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["bad.keras", "out.keras"]


@pytest.mark.parametrize("name", ["NoSuchModel", "missing.keras", "vgg16", "__doc__", ""])
def test_unknown_models_are_one_line(name, capsys):
    assert main(["audit", name]) == 2
    assert "MODEL must be a .keras file or the name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["audit"],
        ["audit", "x", "--fail-on", "disaster"],
        ["init", "x"],
        ["init", "x", "-o", "out.h5"],
        ["init", "x", "-o", "no/such/folder/out.keras"],
        ["init", "x", "-o", "out.keras", "--seed", "one"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("gain", ["0", "-1", "nan", "softmax", "nonsense"])
def test_wrong_gains(gain, model_file, tmp_path, capsys):
    out = tmp_path / "out.keras"
    assert main(["init", model_file, "-o", str(out), f"--gain={gain}"]) == 2
    assert "Argument `gain` must be" in capsys.readouterr().err
    assert not out.exists()


def test_a_crash_leaves_the_old_file(model_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.keras"
    out.write_text("kept")

    def crash(self, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(keras.Model, "save", crash)
    assert main(["init", model_file, "-o", str(out)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert out.read_text() == "kept"
    assert os.listdir(tmp_path) == ["out.keras"]


@pytest.mark.parametrize("command", [[], ["audit"], ["init"]])
def test_help_says_it_all(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes" in text
    assert ".keras file" in text


@pytest.mark.slow
def test_as_a_process(model_file):
    command = [sys.executable, "-m", "keras_glorot", "audit", model_file, "--json"]
    done = subprocess.run(
        [*command, "--fail-on", "warning"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["findings"]) == 1
