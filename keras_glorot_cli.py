"""The command line: `keras-glorot audit MODEL`, `keras-glorot init MODEL -o OUT.keras`.

It stands outside of the package, whose import is that of Keras: arguments that are wrong,
`--help` and `--version` need not wait for it. To add a command: a function here that adds
its arguments, and one in `keras_glorot/cli.py` that runs it.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main"]

EPILOG = """\
MODEL is a .keras file, loaded in Keras's safe mode, or the name of a keras.applications
architecture such as MobileNetV2, built with random weights. Set KERAS_BACKEND to
tensorflow, jax or torch to choose the backend.

exit codes:
  0  done; with --fail-on: and nothing of that severity was found
  1  audit --fail-on found something
  2  the arguments are wrong, or the model can't be read or written: the config in its file
     may have 100 MB
"""
PROGRAM = "keras-glorot"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_args(arguments)
    # TensorFlow's remarks about the machine are no answer to anything asked here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _without_early_log_lines():
            from keras_glorot import cli
    except ModuleNotFoundError as error:  # of a backend
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return cli.run(options)


def _parser() -> argparse.ArgumentParser:
    text = "Audit, reinitialize or look through the weights of a Keras model."
    parser = argparse.ArgumentParser(PROGRAM, description=text, **_STYLE)
    text = "show the versions of this package and of Keras, and the backend"
    parser.add_argument("--version", action=_ShowVersions, help=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_init(commands)
    _add_propagate(commands)
    return parser


_STYLE: Any = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}


class _ShowVersions(argparse.Action):
    def __init__(self, *names: Any, **options: Any):
        super().__init__(*names, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if "keras_glorot" not in sys.modules:
            _put_bare_package()
        from keras_glorot._drawing.stream import native_name  # NumPy only
        from keras_glorot.installed import backend_name

        version = importlib.metadata.version(PROGRAM)
        print(f"{PROGRAM} {version}, drawing with {native_name()}")
        print(f"Keras {_keras_version()}, backend {backend_name()}")
        parser.exit()


def _keras_version() -> str:
    try:
        return importlib.metadata.version("keras")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("keras-nightly")


def _put_bare_package() -> None:
    """The package without what it imports: this process ends before it is needed whole."""
    spec = importlib.util.find_spec("keras_glorot")
    assert spec is not None
    package = types.ModuleType("keras_glorot")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["keras_glorot"] = package


def _add_audit(commands: Any) -> None:
    text = "compare each weight with what its initializer should give"
    command = commands.add_parser("audit", help=text, description=text, **_STYLE)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    add("--json", action="store_true", help="print JSON, and nothing else")
    text = (
        "exit with 1 if there is a finding of this severity (error, warning, info) or worse"
    )
    add("--fail-on", choices=["error", "warning", "info"], metavar="SEVERITY", help=text)
    text = "leave out findings of this code (it stands in brackets), any number of times"
    add("--ignore", action="append", default=[], metavar="CODE", help=text)
    add("--all", action="store_true", help="print all rows, and not only kernels")
    text = "compare with what `init --how` draws, and not with what the layers declare"
    add("--expect", metavar="RECIPE|FILE.json", help=text)
    text = "write a page with findings, pictures and a table to sort and filter"
    add("--html", type=_page, metavar="OUT.html", help=text)


def _add_init(commands: Any) -> None:
    text = "redraw all kernels, reset the rest, and save the model"
    command = commands.add_parser("init", help=text, description=text, **_STYLE)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    text = "the file to write; replaced only on success"
    add("-o", "--output", required=True, type=_output, metavar="OUT.keras", help=text)
    one_of = command.add_mutually_exclusive_group().add_argument
    text = "of the kernels (default: uniform)"
    one_of("--distribution", choices=["uniform", "normal"], default="uniform", help=text)
    text = (
        "a recipe, such as isometric: orthogonal kernels, with units in pairs, for deep "
        "nets without normalization; or a JSON file that maps patterns over the paths of "
        "weights to initializers, or to null: leave these weights"
    )
    one_of("--how", metavar="RECIPE|FILE.json", help=text)
    text = "factor on the std: a number, an activation's, or auto: that of each layer's"
    add("--gain", default=1.0, type=_gain, metavar="auto|NAME|FLOAT", help=text)
    add("--seed", type=int, metavar="N", help="the same seed gives the same weights")
    text = (
        "then scale the kernels so that signal and gradient keep their scale on this batch "
        "(.npy, or .npz with the names of the inputs); without a file, on unit noise"
    )
    add("--calibrate", nargs="?", const="", metavar="X.npy", help=text)


def _add_propagate(commands: Any) -> None:
    text = "show how the signal and its gradient change from layer to layer"
    command = commands.add_parser("propagate", help=text, description=text, **_STYLE)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    text = (
        "the batch to call it on (.npy, or .npz with the names of the inputs); without a "
        "file, unit noise"
    )
    add("--data", default="", metavar="X.npy", help=text)
    add("--json", action="store_true", help="print JSON, and nothing else")
    add("--all", action="store_true", help="print all rows, and not only kernels")


def _output(text: str) -> Path:
    if not text.endswith(".keras"):
        raise argparse.ArgumentTypeError(f"must end in .keras. Received: {text}")
    return _page(text)


def _page(text: str) -> Path:
    target = Path(os.path.realpath(text))
    if not target.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file in an existing folder. Received: {text}"
        )
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "a device"
        raise argparse.ArgumentTypeError(f"must be a file, not {kind}. Received: {text}")
    return Path(text)


def _gain(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


# What TensorFlow's libraries write while they are loaded: no level of logging holds yet.
_LOG_LINE = re.compile(r"WARNING: All log messages before absl::|[IWE]\d{4} \d\d")


@contextlib.contextmanager
def _without_early_log_lines() -> Iterator[None]:
    """Holds back what is written to stderr, then writes it without TensorFlow's lines."""
    if sys.stderr is None or "keras" in sys.modules:  # closed, or all is written already
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            sys.stderr.writelines(line for line in file if not _LOG_LINE.match(line))
