"""The command line: `keras-glorot audit MODEL`, `keras-glorot init MODEL -o OUT.keras`."""

import argparse
import contextlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import keras
import rich

from keras_glorot.auditing import CODES, audit
from keras_glorot.initialization import initialize
from keras_glorot.initializers import GlorotNormal, GlorotUniform

EPILOG = """\
MODEL is a .keras file, loaded in Keras's safe mode, or the name of a keras.applications
architecture such as MobileNetV2, built with random weights. Set KERAS_BACKEND to
tensorflow, jax or torch to choose the backend.

exit codes:
  0  done; with --fail-on: and nothing of that severity was found
  1  audit --fail-on found something
  2  the arguments are wrong, or the model can't be read or written
"""
SEVERITIES = ["error", "warning", "info"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except Exception as error:  # a damaged file makes Keras raise anything
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"keras-glorot: error: {message[:300]}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    style: Any = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    text = "Audit or reinitialize the weights of a Keras model."
    parser = argparse.ArgumentParser("keras-glorot", description=text, **style)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "compare each weight with what its initializer should give"
    command = commands.add_parser("audit", help=text, description=text, **style)
    command.set_defaults(run=_audit)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    add("--json", action="store_true", help="print JSON, and nothing else")
    text = (
        "exit with 1 if there is a finding of this severity (error, warning, info) or worse"
    )
    add("--fail-on", choices=SEVERITIES, metavar="SEVERITY", help=text)
    text = f"leave out findings of this code, any number of times: {', '.join(CODES)}"
    add("--ignore", choices=CODES, action="append", default=[], metavar="CODE", help=text)

    text = "redraw all kernels, reset the rest, and save the model"
    command = commands.add_parser("init", help=text, description=text, **style)
    command.set_defaults(run=_init)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    text = "the file to write; replaced only on success"
    add("-o", "--output", required=True, type=_output, metavar="OUT.keras", help=text)
    text = "of the kernels (default: uniform)"
    add("--distribution", choices=["uniform", "normal"], default="uniform", help=text)
    text = "factor on the std: a number, an activation's, or auto: that of each layer's"
    add("--gain", default=1.0, type=_gain, metavar="auto|NAME|FLOAT", help=text)
    add("--seed", type=int, metavar="N", help="the same seed gives the same weights")
    return parser


def _output(text: str) -> Path:
    if not text.endswith(".keras") or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file in an existing folder that ends in .keras. Received: {text}"
        )
    return Path(text)


def _gain(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def _load(name: str) -> Any:
    if os.path.exists(name):
        if not zipfile.is_zipfile(name):
            raise ValueError(f"MODEL must be a whole .keras file. Received: {name}")
        return keras.saving.load_model(name, safe_mode=True)
    build = getattr(keras.applications, name, None)
    if callable(build):
        return build(weights=None)
    raise ValueError(
        "MODEL must be a .keras file or the name of a keras.applications architecture. "
        f"Received: {name}"
    )


def _audit(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # what layers print is not JSON
        table = audit(_load(options.model))
    table.findings = [each for each in table.findings if each.code not in options.ignore]
    if options.json:
        print(table.to_json())
    else:
        rich.print(table)
    worst = SEVERITIES[: SEVERITIES.index(options.fail_on) + 1] if options.fail_on else ()
    return int(any(finding.severity in worst for finding in table.findings))


def _init(options: argparse.Namespace) -> int:
    kind = GlorotNormal if options.distribution == "normal" else GlorotUniform
    initializer = kind(gain=options.gain)  # may fail, so before the model is loaded
    model = _load(options.model)
    rich.print(initialize(model, initializer, seed=options.seed))
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        path = Path(folder) / options.output.name
        model.save(path)
        os.replace(path, options.output)
    return 0
