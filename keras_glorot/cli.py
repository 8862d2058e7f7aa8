"""The commands of the command line, whose arguments `keras_glorot_cli.py` reads."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import rich

from keras_glorot._keras.calls import error_reason
from keras_glorot.arguments import check_choice, suggestion
from keras_glorot.initializers import GlorotNormal, GlorotUniform
from keras_glorot.recipes import RECIPES
from keras_glorot.tables import Table, printable
from keras_glorot.tables.findings import SEVERITIES
from keras_glorot.tools._files import write_whole
from keras_glorot.tools.audit import CODES, audit
from keras_glorot.tools.calibrate import calibrate
from keras_glorot.tools.initialize import initialize
from keras_glorot.tools.propagate import propagate
from keras_glorot.tools.report import audit_section, write_page

__all__ = ["run"]

PROGRAM = "keras-glorot"
# Keras quotes whole configs.
LONGEST_LINE = 1000


def run(options: argparse.Namespace) -> int:
    """Runs the command that was asked for, and returns the exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        # A model that was compiled and has made no step: it has no state to be loaded.
        text = "Skipping variable loading .* saved optimizer has [12] variables"
        warnings.filterwarnings("ignore", text)
        try:
            return _COMMANDS[options.command](options)
        except Exception as error:
            _complain("error", error_reason(error))
            return 2


def _audit(options: argparse.Namespace) -> int:
    for name in ("ignore", "only"):
        for code in getattr(options, name):
            check_choice(f"--{name}", code, list(CODES))
    codes = set(options.only or CODES) - set(options.ignore)
    how = None if options.expect is None else _read_how(options.expect, "--expect")
    with contextlib.redirect_stdout(sys.stderr):  # what layers print is not JSON
        table = audit(_load(options.model), how)
    table.findings = [each for each in table.findings if each.code in codes]
    said = _write_page(options, table) if options.html is not None else ""
    return _show(options, table, said)


def _write_page(options: argparse.Namespace, table: Table) -> str:
    command = shlex.join([PROGRAM, *options.arguments])
    sections = [audit_section({"": table})]
    write_page(options.html, Path(options.model).name, sections, command)
    return _wrote(options.html)


def _show(options: argparse.Namespace, table: Table, said: str = "") -> int:
    """Prints a table, and returns the exit code that its findings ask for."""
    _write(table.to_json() + "\n" if options.json else said + _render(table, options.all))
    worst = SEVERITIES[: SEVERITIES.index(options.fail_on) + 1] if options.fail_on else ()
    return int(any(finding.severity in worst for finding in table.findings))


def _init(options: argparse.Namespace) -> int:
    how = _how(options)  # may fail: before the work
    model = _load(options.model)
    tables = [initialize(model, how, seed=options.seed)]
    said = ""
    if options.calibrate is not None:
        x, said = _batch(model, options.calibrate)
        tables.append(calibrate(model, x))
    write_whole(options.output, "-o", model.save)
    _write(said + "\n".join([*map(_render, tables), _wrote(options.output)]))
    return 0


def _how(options: argparse.Namespace) -> Any:
    if options.how is not None:
        if options.gain != 1.0:
            raise ValueError("--gain must be left out with --how, which has its own.")
        return _read_how(options.how, "--how")
    kind = GlorotNormal if options.distribution == "normal" else GlorotUniform
    return kind(gain=options.gain)


def _read_how(name: str, argument: str) -> Any:
    """The name of a recipe, or the mapping in a JSON file."""
    if name in RECIPES:
        return name
    reason = suggestion(name, RECIPES)
    if name.endswith(".json"):
        try:
            how = json.loads(Path(name).read_text(encoding="utf-8"))
            if isinstance(how, dict):
                return how
            reason = f" ({how!r} is no mapping)"
        except (OSError, ValueError) as error:
            reason = f" ({error})"
    raise ValueError(
        f"{argument} must be a recipe, {' or '.join(RECIPES)}, or a .json file with a "
        f"mapping from patterns to initializers. Received: {name}.{reason}"
    )


def _propagate(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # what layers print is not JSON
        model = _load(options.model)
        x, said = _batch(model, options.data)
        table = propagate(model, x)
    return _show(options, table, said)


_COMMANDS = {"audit": _audit, "init": _init, "propagate": _propagate}

# Examples of unit noise: enough for a std to be right to a few percent.
_EXAMPLES = 16


def _batch(model: Any, name: str) -> tuple[Any, str]:
    """The batch in a file, or unit noise; and a line that says so."""
    if name:
        try:
            content = np.load(name)  # without pickle: a foreign file runs no code
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The batch must be a .npy or .npz file. Received: {name} ({error})"
            ) from None
        return (dict(content) if hasattr(content, "files") else content), ""
    rng = np.random.default_rng(0)
    batch = {}
    for tensor in getattr(model, "inputs", None) or ():
        if None in tensor.shape[1:] or "float" not in tensor.dtype:
            raise ValueError(
                "The batch must be given in a file for this model: its input "
                f"{tensor.name} has the shape {tensor.shape[1:]} and dtype {tensor.dtype}"
            )
        size = (_EXAMPLES, *tensor.shape[1:])
        batch[tensor.name] = rng.standard_normal(size).astype("float32")
    if not batch:
        raise ValueError("The batch must be given in a file: the model has no input shape.")
    said = f"The batch is unit noise: {_EXAMPLES} examples.\n"
    return (batch if len(batch) > 1 else next(iter(batch.values()))), said


def _load(name: str) -> Any:
    if os.path.exists(name):
        if not zipfile.is_zipfile(name):
            raise ValueError(f"MODEL must be a whole .keras file. Received: {name}")
        try:
            return keras.saving.load_model(name, safe_mode=True)
        except Exception as error:  # a damaged file makes Keras raise anything
            raise ValueError(error_reason(error) + _other_keras(name)) from error
    architectures = {
        name: build for name, build in vars(keras.applications).items() if callable(build)
    }
    if name in architectures:
        return architectures[name](weights=None)
    raise ValueError(
        "MODEL must be a .keras file or the name of a keras.applications architecture. "
        f"Received: {name}.{suggestion(name, architectures)}"
    )


def _other_keras(name: str) -> str:
    """The Keras that saved a file, if it is not this one."""
    with contextlib.suppress(Exception), zipfile.ZipFile(name) as file:
        saver = json.loads(file.read("metadata.json"))["keras_version"]
        if saver != keras.__version__:
            return f" (saved by Keras {saver}, loaded by {keras.__version__})"
    return ""


def _render(table: Table, all: bool = False) -> str:
    """The table as this terminal shows it."""
    with rich.get_console().capture() as captured:
        table.show(all)
    return captured.get()


def _wrote(path: Path) -> str:
    return f"Wrote {printable(str(path))}.\n"


def _write(text: str) -> None:
    """Writes to stdout, at once. That nobody reads to the end (`| head`) is no error.

    Neither is it that stdout is closed: the exit code, or a file, can be all that is asked.
    """
    if sys.stdout is None:
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        # The rest of the buffer goes nowhere, without a word about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _complain(kind: str, message: str) -> None:
    """Writes one line to stderr."""
    if sys.stderr is None:
        return  # `print` would take stdout
    line = printable(" ".join(message.split()))
    line = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"
    print(f"{PROGRAM}: {kind}: {line}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any) -> None:
    _complain("warning", str(message))
