"""The command line: one line and exit code 2 for whatever is wrong, and no half file."""

import errno
import html
import importlib.metadata
import io
import json
import os
import re
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_glorot
import keras_glorot_cli
from keras_glorot_cli import main

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
    assert main([*arguments, "--ignore", "twin", "std"]) == 0
    assert "[std]" not in capsys.readouterr().out


def test_only_findings_of_one_code(model_file):
    assert main(["audit", model_file, "--fail-on", "info", "--only", "std"]) == 1
    assert main(["audit", model_file, "--fail-on", "info", "--only", "twin", "form"]) == 0


@pytest.mark.parametrize(
    "option", [["audit", "--ignore", "std"], ["audit", "--only", "std", "twin"],
               ["init", "-o", "{out}", "--calibrate"]],
)  # fmt: skip
def test_an_option_does_not_take_the_model_for_a_value(option, model_file, tmp_path):
    option = [part.format(out=tmp_path / "out.keras") for part in option]
    assert main([*option, model_file]) == 0


def test_propagate_fails_on_a_finding(tmp_path):
    hidden = [layers.Dense(9, "relu", kernel_initializer="zeros") for _ in range(3)]
    path = str(tmp_path / "dead.keras")
    keras.Sequential([keras.Input((9,)), *hidden[:1], layers.Dense(9)]).save(path)
    assert main(["propagate", path]) == 0
    assert main(["propagate", path, "--fail-on", "warning"]) == 1


def test_what_was_written_is_said(model_file, tmp_path, capsys):
    out = tmp_path / "out.keras"
    assert main(["init", model_file, "-o", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"\nWrote {out}.\n")


def test_a_page_that_was_written_is_said(model_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "the page.html"
    assert main(["audit", "--only", "std", model_file, "--html", str(page)]) == 0
    assert f"Wrote {page}.\n" in capsys.readouterr().out
    command = f"keras-glorot audit --only std {model_file} --html '{page}'"
    assert html.escape(command) in page.read_text(encoding="utf-8")


def test_a_compiled_model_without_a_step_is_loaded_without_a_word(tmp_path, capsys):
    model = small()
    model.compile("adam", "mse")
    model.save(tmp_path / "fresh.keras")
    assert main(["audit", str(tmp_path / "fresh.keras")]) == 0
    assert capsys.readouterr().err == ""


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


def test_isometric_init_then_audit(model_file, tmp_path, capsys):
    out = tmp_path / "out.keras"
    arguments = ["init", model_file, "-o", str(out), "--seed", "1", "--how", "isometric"]
    assert main(arguments) == 0
    assert "0 of 2 kernels make pairs" in " ".join(capsys.readouterr().out.split())
    assert main(["audit", str(out), "--fail-on", "info"]) == 0
    assert main(["audit", str(out), "--fail-on", "info", "--expect", "isometric"]) == 0
    first = weights(out)
    assert main(arguments) == 0
    for one, other in zip(first, weights(out), strict=True):
        np.testing.assert_array_equal(one, other)
    out.unlink()
    assert main([*arguments, "--gain", "2"]) == 2
    assert "--gain must be left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--distribution", "normal"])
    assert not out.exists()


def test_init_and_audit_by_a_mapping_in_a_file(model_file, tmp_path, capsys):
    out, how, page = (tmp_path / name for name in ("out.keras", "how.json", "page.html"))
    normal = {"class_name": "RandomNormal", "config": {"stddev": 0.02}}
    how.write_text(json.dumps({"depthwise": normal, "dense/bias": None, ".*": "zeros"}))
    check = ["audit", str(out), "--fail-on", "warning", "--expect", str(how)]
    main(["init", model_file, "-o", str(out)])
    assert main(check) == 1
    assert main(["init", model_file, "-o", str(out), "--how", str(how)]) == 0
    assert main(check) == 0
    assert abs(weights(out)[0].std() / 0.02 - 1) < 0.1
    assert not weights(out)[2].any()
    pytest.importorskip("matplotlib")
    assert main([*check, "--html", str(page)]) == 0
    assert f"--expect {how}" in page.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "is no mapping"),
        ("null", "is no mapping"),
        ("{}", "must have a pattern"),
        ('{"(": "zeros"}', "regular expressions"),
        ('{"dence": "zeros"}', "Did you mean 'dense'"),
        ('{"dense": "zeroes"}', "how['dense']='zeroes'. Did you mean 'zeros'"),
        ('{"dense": {"class_name": "Zeroes"}}', "how['dense']="),
    ],
)
@pytest.mark.parametrize("command", ["audit", "init"])
def test_bad_mappings_are_one_line(command, content, message, model_file, tmp_path, capsys):
    how, out = tmp_path / "how.json", tmp_path / "out.keras"
    if content is not None:
        how.write_text(content)
    extra = ["--expect", how] if command == "audit" else ["-o", out, "--how", how]
    assert main([command, model_file, *map(str, extra)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("keras-glorot: error: ")
    assert message in line
    assert not out.exists()


def test_an_unknown_recipe(model_file, no_work, capsys):
    assert main(["audit", model_file, "--expect", "isometri"]) == 2
    assert "Received: isometri. Did you mean 'isometric'?" in capsys.readouterr().err


def test_an_architecture_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.applications, "MobileNet", lambda weights: small())
    assert main(["init", "MobileNet", "-o", str(tmp_path / "out.keras")]) == 0
    assert main(["audit", "MobileNet", "--fail-on", "warning"]) == 1


class Unknown(layers.Layer):
    """Is registered nowhere."""

    def call(self, x):
        return x


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
        case "unknown layer":
            inner = keras.Sequential([keras.Input((2,)), Unknown()])
            keras.Sequential([keras.Input((2,)), layers.Dense(2), inner]).save(path)
        case "folder":
            path.mkdir()
        case "unsafe":
            function = layers.Lambda(lambda x: x + 1)
            keras.Sequential([keras.Input((2,)), function]).save(path)


KINDS = ["truncated", "foreign", "empty", "flipped", "other zip", "bad json",
         "unknown class", "unknown layer", "folder", "unsafe"]  # fmt: skip


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
    if kind == "unknown layer":  # the reason comes first, whatever stands around it
        assert lines[0].startswith("keras-glorot: error: Could not locate class 'Unknown'")
    assert out.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["bad.keras", "out.keras"]


def test_a_file_of_another_keras(tmp_path, capsys):
    foreign = tmp_path / "foreign.keras"
    with zipfile.ZipFile(foreign, "w") as file:
        file.writestr("metadata.json", '{"keras_version": "4.0.0"}')
        file.writestr("config.json", '{"module": "keras", "class_name": "New"}')
    assert main(["audit", str(foreign)]) == 2
    versions = f" (saved by Keras 4.0.0, loaded by {keras.__version__})\n"
    assert capsys.readouterr().err.endswith(versions)


@keras.saving.register_keras_serializable("test_cli")
class Broken(layers.Layer):
    """Fails on examples; on torch, which builds with some, when it is built."""

    error: Any = None

    def call(self, x):
        if self.error is not None and x.shape[0] is not None:
            raise self.error
        return x


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("The reason."), "The reason"), (AssertionError(), "AssertionError")],
)
def test_the_cause_of_a_failed_call_comes_first(
    error, reason, tmp_path, monkeypatch, capsys
):
    inner = keras.Sequential([keras.Input((2,)), layers.Dense(2), Broken()])
    path = str(tmp_path / "model.keras")
    keras.Sequential([keras.Input((2,)), inner]).save(path)
    monkeypatch.setattr(Broken, "error", error)
    assert main(["propagate", path]) == 2
    start = rf"keras-glorot: error: (Calling `model` failed: )?{reason}\b"
    assert re.match(start, capsys.readouterr().err)


def test_the_cause_of_a_failed_load_comes_first(model_file, tmp_path, capsys):
    """Keras says first how many objects could not be loaded."""
    bare = tmp_path / "bare.keras"
    keras.Sequential([keras.Input((2,)), layers.ReLU()]).save(bare)
    with zipfile.ZipFile(model_file) as file:
        config = file.read("config.json")
    with zipfile.ZipFile(bare, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("config.json", config)
    assert main(["audit", str(bare)]) == 2
    reason = "Layer 'depthwise' expected 2 variables, but received 0 variables"
    assert capsys.readouterr().err.startswith(f"keras-glorot: error: {reason}")


@pytest.mark.parametrize("name", ["NoSuchModel", "vgg16", "__doc__", ""])
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
        ["audit", "missing.keras"],
        ["audit", "no/such/folder"],
        ["propagate", "x", "--data", "missing.npy"],
        ["init", "x", "-o", "out.keras", "--calibrate", "missing.npy"],
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


@pytest.mark.parametrize("command", [[], ["audit"], ["init"], ["propagate"]])
def test_help_says_it_all(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as error:
        main([*command, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes" in text
    assert ".keras file" in text
    assert f"example:\n  keras-glorot {' '.join(command)}" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_as_a_process(model_file):
    # With `-m`, which the other processes here are started without.
    command = [sys.executable, "-m", "keras_glorot", "audit", model_file, "--json"]
    done = subprocess.run(
        [*command, "--fail-on", "warning"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["findings"]) == 1


# Names from files of others, and terminals that can't show them -------------------------

ROOT = Path(__file__).parent.parent


def save_with_name(path, name):
    dense = layers.Dense(3, name=name)
    keras.Sequential([keras.Input((2,)), dense]).save(path)
    return str(path)


@pytest.mark.parametrize("command", ["audit", "init"])
def test_a_terminal_that_lacks_the_characters(command, tmp_path, monkeypatch):
    file = save_with_name(tmp_path / "model.keras", "密")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    out = tmp_path / "密.keras"
    extra = ["-o", str(out)] if command == "init" else ["--all"]
    assert main([command, file, *extra]) == 0
    assert out.exists() == (command == "init")
    assert b"\\u5bc6/kernel" in stdout.buffer.getvalue()


def test_the_model_is_saved_before_anything_is_printed(model_file, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise ValueError("nowhere to write")

    monkeypatch.setattr(sys, "stdout", Full())
    out = tmp_path / "out.keras"
    assert main(["init", model_file, "-o", str(out), "--seed", "1"]) == 2
    assert len(weights(out)) == 4


def test_escape_sequences_do_not_reach_the_terminal(tmp_path, capsys):
    file = save_with_name(tmp_path / "model.keras", "\x1b[2Jgone\x9b31m\u202e")
    model = keras.saving.load_model(file)
    model.layers[0].kernel.assign(np.full((2, 3), np.nan))
    model.save(file)
    assert main(["audit", file]) == 0
    text = capsys.readouterr().out
    assert text.count(r"\x1b[2Jgone\x9b31m\u202e/kernel") == 2  # the row and the finding
    with pytest.raises(SystemExit):
        main(["audit", "\x1b]0;title\x07"])
    error = capsys.readouterr().err
    assert r"\x1b]0;title\x07" in error
    shown = [*text, *error]
    assert all(sign.isprintable() or sign == "\n" for sign in shown)


def test_a_warning_is_one_line(model_file, monkeypatch, capsys):
    def load(name, safe_mode):
        warnings.warn("careful:\n\x1b[2J", stacklevel=2)
        return small()

    monkeypatch.setattr(keras.saving, "load_model", load)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        assert main(["audit", model_file]) == 0
    assert capsys.readouterr().err == "keras-glorot: warning: careful: \\x1b[2J\n"


# The output ------------------------------------------------------------------------------


def test_a_symbolic_link_stays_one(model_file, tmp_path):
    target, link = tmp_path / "there" / "model.bin", tmp_path / "link.keras"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    assert main(["init", model_file, "-o", str(link)]) == 0
    assert link.is_symlink()
    assert zipfile.is_zipfile(target)
    assert os.listdir(target.parent) == ["model.bin"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(mode, model_file, tmp_path):
    out = tmp_path / "out.keras"
    out.write_text("old")
    out.chmod(mode)
    assert main(["init", model_file, "-o", str(out)]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert zipfile.is_zipfile(out)


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if a model is loaded."""
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("loaded"))


def test_a_directory_as_output_fails_before_the_work(model_file, tmp_path, no_work, capsys):
    (tmp_path / "out.keras").mkdir()
    with pytest.raises(SystemExit):
        main(["init", model_file, "-o", str(tmp_path / "out.keras")])
    message = capsys.readouterr().err
    assert f"must be a file, not a directory. Received: {tmp_path}" in message


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("folder.html", "not a directory"),
        ("no/page.html", "existing folder"),
        ("model.keras", "must end in .html"),
    ],
)
def test_a_page_that_can_not_be_written_fails_before_the_work(
    place, fault, model_file, tmp_path, no_work, capsys
):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(SystemExit):
        main(["audit", model_file, "--html", str(tmp_path / place)])
    assert fault in capsys.readouterr().err


def test_a_name_that_is_too_long_is_one_line(model_file, tmp_path, capsys):
    out = tmp_path / f"{'x' * 300}.keras"
    assert main(["init", model_file, "-o", str(out)]) == 2
    assert "-o must be a file that can be written" in capsys.readouterr().err


def test_an_unwritable_folder_fails_before_the_work(
    model_file, tmp_path, no_work, monkeypatch, capsys
):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to any
    with pytest.raises(SystemExit):
        main(["init", model_file, "-o", str(tmp_path / "out.keras")])
    assert "existing folder that can be written" in capsys.readouterr().err


def test_a_failed_save_names_the_path_that_was_given(
    model_file, tmp_path, monkeypatch, capsys
):
    def fail(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(keras.Model, "save", fail)
    out = tmp_path / "out.keras"
    assert main(["init", model_file, "-o", str(out)]) == 2
    assert f"Received: {out} (No space left on device)\n" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_behind(model_file, tmp_path, monkeypatch):
    out = tmp_path / "out.keras"
    out.write_text("kept")

    def save(self, path):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "save", save)
    assert main(["init", model_file, "-o", str(out)]) == 130
    assert os.listdir(tmp_path) == ["out.keras"]
    assert out.read_text() == "kept"


def test_ctrl_c_while_keras_is_imported(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(keras_glorot_cli, "_without_early_log_lines", interrupted)
    assert main(["audit", "MobileNet"]) == 130


# A closed pipe ---------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--json"]])
@pytest.mark.parametrize(("severity", "code"), [("error", 0), ("warning", 1)])
def test_a_reader_that_has_gone(extra, severity, code, model_file, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["audit", model_file, "--fail-on", severity, *extra]) == code
        monkeypatch.undo()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("extra", [[], ["--json"]])
@pytest.mark.parametrize(("severity", "code"), [("error", 0), ("warning", 1)])
def test_a_closed_stdout(extra, severity, code, model_file, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["audit", model_file, "--fail-on", severity, *extra]) == code
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_a_closed_stderr(model_file, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["audit", "NoSuchModel"]) == 2
    assert main(["audit", model_file, "--json"]) == 0
    monkeypatch.undo()
    json.loads(capfd.readouterr().out)


@pytest.mark.slow
def test_head(model_file):
    program = f"{sys.executable} -c 'import keras_glorot_cli as c; c.main()'"
    command = f"{program} audit {model_file} --json | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert done.stdout == "{\n"
    assert done.stderr == ""


# Before Keras is imported ----------------------------------------------------------------

# As the script does that an installation makes.
SCRIPT = ["-c", "import sys; from keras_glorot_cli import main; sys.exit(main())"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "exit codes"),
        (["audit", "--help"], 0, "--fail-on"),
        (["init", "--help"], 0, "--gain"),
        (["--version"], 0, f"keras-glorot {keras_glorot.__version__}, drawing with "),
        (["--version"], 0, f"Keras {keras.__version__}, backend {keras.backend.backend()}"),
        (["paint"], 2, "invalid choice: 'paint'"),
        (["init", "x", "-o", "y"], 2, "must end in .keras"),
        (["audit", "no.keras"], 2, "argument MODEL: no such file: 'no.keras'"),
        (["propagate", "x", "--data", "n.npy"], 2, "--data: no such file: 'n.npy'"),
    ],
)
def test_no_import_of_keras_and_no_log_line(arguments, code, text):
    command = [sys.executable, "-X", "importtime", *SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    rest = [line for line in done.stderr.splitlines() if line not in times]
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert rest == [] or code == 2
    slow = {"keras", "rich", "tensorflow", "jax", "torch"}
    if arguments != ["--version"]:  # which asks what draws
        slow.add("numpy")
    assert {line.split("|")[-1].strip() for line in times}.isdisjoint(slow)


@pytest.mark.slow
def test_the_import_looks_at_no_command_line(tmp_path):
    """Of another program, which may have our name among its own arguments."""
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("import keras_glorot\n")
    (tmp_path / "tool" / "run.py").write_text("import sys; print(sys.argv[1:])\n")
    command = [sys.executable, "-m", "tool.run", "--package", "keras_glorot"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == "['--package', 'keras_glorot']\n"
    assert done.returncode == 0


def test_the_backend_of_the_version_is_that_of_keras_own_file(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for content, backend in [
        (None, "tensorflow"),
        ('{"backend": "jax"}', "jax"),
        ("[]", "tensorflow"),
        ("{", "tensorflow"),
    ]:
        if content is not None:
            (tmp_path / "keras.json").write_text(content)
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out.endswith(f", backend {backend}\n")


def test_the_version_of_a_nightly(monkeypatch, capsys):
    versions = {"keras-glorot": "1", "keras-nightly": "3.16.0.dev1"}  # there is no keras

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert "\nKeras 3.16.0.dev1, backend " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backend", "there", "ways"),
    [
        (
            "tensorflow",
            [],
            'pip install "keras-glorot[tensorflow]" and set KERAS_BACKEND=tensorflow.',
        ),
        (
            "tensorflow",
            ["torch"],
            "set KERAS_BACKEND=torch before Keras is imported, or pip install "
            '"keras-glorot[tensorflow]" and set KERAS_BACKEND=tensorflow.',
        ),
        (
            "tensorfow",
            [],
            'pip install "keras-glorot[tensorflow]" and set KERAS_BACKEND=tensorflow.',
        ),
    ],
)
@pytest.mark.parametrize("is_program", [False, True])
def test_a_missing_backend_is_one_line(backend, there, ways, is_program, tmp_path):
    # A finder that knows of no backend but those that are there, in place of a machine.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"known = dict.fromkeys(('tensorflow', 'jax', 'torch', {backend!r}))\n"
        f"known.update(dict.fromkeys({there}, True))\n"
        "def find_spec(name):\n"
        "    return known[name] if name in known else find(name)\n"
        "importlib.util.find_spec = find_spec\n"
    )
    command = [sys.executable, "-c", "import keras_glorot"]
    if is_program:
        command = [sys.executable, *SCRIPT, "audit", "MobileNetV2"]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == (2 if is_program else 1)
    text = f"Keras's backend {backend!r} is not installed: {ways}"
    assert done.stderr.splitlines()[-1].endswith(f"rror: {text}")
    if is_program:
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [("vgg16", "VGG16"), ("MobileNetv2", "MobileNetV2"), ("ResNet5", "ResNet50")],
)
def test_did_you_mean(name, meant, capsys):
    assert main(["audit", name]) == 2
    assert f"Received: {name}. Did you mean '{meant}'?\n" in capsys.readouterr().err


def test_an_unknown_code_to_ignore(model_file, no_work, capsys):
    assert main(["audit", model_file, "--ignore", "stds"]) == 2
    assert "`--ignore` must be one of" in capsys.readouterr().err
