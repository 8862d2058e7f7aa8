"""The command line: `keras-glorot audit MODEL`, `keras-glorot init MODEL -o OUT.keras`.

It stands outside of the package, whose import is that of Keras: arguments that are wrong,
`--help` and `--version` need not wait for it. To add a command: a function here that adds
its arguments, and one in `keras_glorot/cli.py` that runs it.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["main"]

EPILOG = """\
MODEL is a .keras file, loaded in Keras's safe mode, or the name of a
keras.applications architecture such as MobileNetV2, built with random weights.
Set KERAS_BACKEND to tensorflow, jax or torch to choose the backend.

exit codes:
  0  done; with --fail-on: and nothing of that severity was found
  1  --fail-on: something was found
  2  the arguments are wrong, or the model can't be read or written
"""
PROGRAM = "keras-glorot"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(_with_values_joined(arguments))
    options.arguments = arguments
    # TensorFlow's remarks about the machine are no answer to anything asked here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _without_early_log_lines():
            from keras_glorot import cli
        return cli.run(options)
    except ModuleNotFoundError as error:  # of a backend
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    text = "Audit, reinitialize or look through the weights of a Keras model."
    parser = argparse.ArgumentParser(
        PROGRAM, description=text, **_style("audit MobileNetV2")
    )
    text = "show the versions of this package and of Keras, and the backend"
    parser.add_argument("--version", action=_ShowVersions, help=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_init(commands)
    _add_propagate(commands)
    return parser


def _style(example: str) -> dict[str, Any]:
    epilog = f"example:\n  {PROGRAM} {example}\n\n{EPILOG}"
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


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
    example = "audit model.keras --fail-on warning --ignore twin relu-gain"
    add = _add_command(commands, "audit", text, example).add_argument
    _add_output(add)
    text = "leave out findings of these codes (they stand in brackets)"
    add("--ignore", action="append", default=[], metavar="CODE ...", help=text)
    text = "leave out findings of all other codes"
    add("--only", action="append", default=[], metavar="CODE ...", help=text)
    text = "compare with what `init --how HOW` draws, not with what the layers declare"
    add("--expect", metavar="HOW", help=text)
    text = "write a page with findings, pictures and a table to sort and filter"
    add("--html", type=_page, metavar="OUT.html", help=text)


def _add_init(commands: Any) -> None:
    text = "redraw all kernels, reset the rest, and save the model"
    example = "init model.keras -o fresh.keras --gain auto --seed 1"
    command = _add_command(commands, "init", text, example)
    add = command.add_argument
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
    one_of("--how", metavar="HOW", help=text)
    text = "factor on the std: a number, an activation's, or auto: that of each layer's"
    add("--gain", default=1.0, type=_gain, metavar="auto|NAME|FLOAT", help=text)
    add("--seed", type=int, metavar="N", help="the same seed gives the same weights")
    text = (
        "then scale the kernels so that signal and gradient keep their scale on this batch "
        "(.npy, or .npz with the names of the inputs); without a file, on unit noise"
    )
    add("--calibrate", nargs="?", const="", type=_file, metavar="X.npy", help=text)


def _add_propagate(commands: Any) -> None:
    text = "show how the signal and its gradient change from layer to layer"
    example = "propagate model.keras --data x.npy --all"
    add = _add_command(commands, "propagate", text, example).add_argument
    _add_output(add)
    text = (
        "the batch to call it on (.npy, or .npz with the names of the inputs); without a "
        "file, unit noise"
    )
    add("--data", default="", type=_file, metavar="X.npy", help=text)


def _add_command(commands: Any, name: str, text: str, example: str) -> Any:
    command = commands.add_parser(name, help=text, description=text, **_style(example))
    text = "a .keras file or an architecture"
    command.add_argument("model", metavar="MODEL", type=_model, help=text)
    return command


def _add_output(add: Any) -> None:
    """The options of commands that find something."""
    add("--json", action="store_true", help="print JSON, and nothing else")
    text = (
        "exit with 1 if there is a finding of this severity (error, warning, info) or worse"
    )
    add("--fail-on", choices=["error", "warning", "info"], metavar="SEVERITY", help=text)
    add("--all", action="store_true", help="print all rows, and not only kernels")


def _is_code(text: str) -> bool:
    is_code = re.fullmatch("[a-z]+(-[a-z]+)*", text)
    return is_code is not None and not os.path.exists(text)


# By option, the form of its values, and how many it takes at most.
_VALUES: dict[str, tuple[Callable[[str], bool], int | None]] = {
    "--ignore": (_is_code, None),
    "--only": (_is_code, None),
    "--calibrate": (lambda text: text.endswith((".npy", ".npz")), 1),
}


def _with_values_joined(arguments: list[str]) -> list[str]:
    """`--ignore std twin MODEL` as `--ignore=std --ignore=twin MODEL`.

    Where an option takes any number of values, argparse would take MODEL for one of them.
    """
    joined, rest = [], list(arguments)
    while rest:
        option = rest.pop(0)
        if option not in _VALUES:
            joined.append(option)
            continue
        is_value, most = _VALUES[option]
        values = list(itertools.takewhile(is_value, rest[:most]))
        joined += [f"{option}={value}" for value in values or [""]]
        del rest[: len(values)]
    return joined


def _model(text: str) -> str:
    """A file that is there, or what can be the name of an architecture."""
    return text if text.isidentifier() else _file(text)


def _file(text: str) -> str:
    if text and not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"no such file: {text!r}")
    return text


def _output(text: str) -> Path:
    return _target(text, ".keras")


def _page(text: str) -> Path:
    return _target(text, ".html")


def _target(text: str, ending: str) -> Path:
    if not text.endswith(ending):  # `--html` with the name of the model would lose it
        raise argparse.ArgumentTypeError(f"must end in {ending}. Received: {text}")
    target = Path(os.path.realpath(text))
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a file in an existing folder that can be written. Received: {text}"
        )
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a directory" if target.is_dir() else "a device"
        raise argparse.ArgumentTypeError(f"must be a file, not {kind}. Received: {text}")
    return Path(text)


def _gain(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


# Lines of TensorFlow's libraries while they are loaded: no level of logging holds yet.
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
