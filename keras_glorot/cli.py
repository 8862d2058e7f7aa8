"""The command line: `keras-glorot audit MODEL`, `keras-glorot init MODEL -o OUT.keras`.

Only commands import what takes seconds. To add one: a function that adds its arguments, and
in its defaults the function that runs it.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EPILOG = """\
MODEL is a .keras file, loaded in Keras's safe mode, or the name of a keras.applications
architecture such as MobileNetV2, built with random weights. Set KERAS_BACKEND to
tensorflow, jax or torch to choose the backend.

exit codes:
  0  done; with --fail-on: and nothing of that severity was found
  1  audit --fail-on found something
  2  the arguments are wrong, or the model can't be read or written
"""
BACKENDS = ("tensorflow", "jax", "torch")
SEVERITIES = ["error", "warning", "info"]
PROGRAM = "keras-glorot"


def is_starting() -> bool:
    """Whether Python is about to run this command line, by its name or with `-m`."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    # While Python looks for a module to run, this stands in place of the module's path.
    is_module = name == "-m" and "keras_glorot" in sys.orig_argv
    return is_module or name in (PROGRAM, f"{PROGRAM}.exe")


def start() -> None:
    """Ends `--help`, `--version` and wrong arguments, before Keras is imported."""
    # TensorFlow's remarks about the machine are no answer to anything asked here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _parser().parse_args()
    if text := missing_backend():
        _complain("error", text)
        sys.exit(2)
    with _without_early_log_lines():
        importlib.import_module("keras")


# What TensorFlow's libraries write while they are loaded: no level of logging holds yet.
_LOG_LINE = re.compile(r"WARNING: All log messages before absl::|[IWE]\d{4} \d\d")


@contextlib.contextmanager
def _without_early_log_lines() -> Iterator[None]:
    """Holds back what is written to stderr, then writes it without TensorFlow's lines."""
    if sys.stderr is None:  # closed
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


def missing_backend() -> str | None:
    """What to install or set, if Keras would end in a traceback: else None."""
    backend = _backend()
    if backend in sys.modules or importlib.util.find_spec(backend):
        return None
    there = [name for name in BACKENDS if importlib.util.find_spec(name)]
    ways = [f"set KERAS_BACKEND={name} before Keras is imported" for name in there]
    if backend in BACKENDS:
        ways.append(f'pip install "{PROGRAM}[{backend}]"')
        if not there:
            others = " or ".join(name for name in BACKENDS if name != backend)
            ways.append(f"install {others} and set KERAS_BACKEND to it")
    elif not there:
        ways.append(f'pip install "{PROGRAM}[tensorflow]" and set KERAS_BACKEND=tensorflow')
    return f"Keras's backend {backend!r} is not installed: {', or '.join(ways)}."


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = _parser().parse_args(arguments)
    with _signals_as_exceptions(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return options.run(options)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception as error:  # a damaged file makes Keras raise anything
            _complain("error", str(error) or type(error).__name__)
            return 2


def _parser() -> argparse.ArgumentParser:
    text = "Audit, reinitialize or look through the weights of a Keras model."
    parser = argparse.ArgumentParser(PROGRAM, description=text, **_STYLE)
    text = "show the versions of this package and of Keras, and the backend"
    parser.add_argument("--version", action=_ShowVersions, help=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_init(commands)
    _add_propagate(commands)
    return parser


_STYLE: Any = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}


class _ShowVersions(argparse.Action):
    def __init__(self, *names: Any, **options: Any):
        super().__init__(*names, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        version = importlib.metadata.version(PROGRAM)
        print(f"{PROGRAM} {version}, drawing with {_drawing()}")
        print(f"Keras {_keras_version()}, backend {_backend()}")
        parser.exit()


def _keras_version() -> str:
    try:
        return importlib.metadata.version("keras")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("keras-nightly")


def _drawing() -> str:
    from keras_glorot.sampling import native_name  # NumPy only

    return native_name()


def _backend() -> str:
    """The backend that Keras will take: by its own rules, without the time it takes."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name
    home = os.path.expanduser("~")
    folder = os.path.join(home if os.access(home, os.W_OK) else "/tmp", ".keras")
    folder = os.path.expanduser(os.environ.get("KERAS_HOME", folder))
    try:
        return json.loads(Path(folder, "keras.json").read_text("utf-8"))["backend"]
    except (OSError, ValueError, LookupError, TypeError):
        return "tensorflow"


def _add_audit(commands: Any) -> None:
    text = "compare each weight with what its initializer should give"
    command = commands.add_parser("audit", help=text, description=text, **_STYLE)
    command.set_defaults(run=_audit)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    add("--json", action="store_true", help="print JSON, and nothing else")
    text = (
        "exit with 1 if there is a finding of this severity (error, warning, info) or worse"
    )
    add("--fail-on", choices=SEVERITIES, metavar="SEVERITY", help=text)
    text = "leave out findings of this code (it stands in brackets), any number of times"
    add("--ignore", action="append", default=[], metavar="CODE", help=text)
    add("--all", action="store_true", help="print all rows, and not only kernels")
    text = "write a page with findings, pictures and a table to sort and filter"
    add("--html", type=Path, metavar="OUT.html", help=text)


def _audit(options: argparse.Namespace) -> int:
    from keras_glorot.arguments import check_choice
    from keras_glorot.auditing import CODES, audit

    for code in options.ignore:
        check_choice("--ignore", code, list(CODES))
    with contextlib.redirect_stdout(sys.stderr):  # what layers print is not JSON
        table = audit(_load(options.model))
    table.findings = [each for each in table.findings if each.code not in options.ignore]
    if options.html is not None:
        _write_page(options, table)
    _write(table.to_json() + "\n" if options.json else _render(table, options.all))
    worst = SEVERITIES[: SEVERITIES.index(options.fail_on) + 1] if options.fail_on else ()
    return int(any(finding.severity in worst for finding in table.findings))


def _write_page(options: argparse.Namespace, table: Any) -> None:
    from keras_glorot.report import audit_section, write_page

    ignored = "".join(f" --ignore {code}" for code in options.ignore)
    command = f"{PROGRAM} audit {options.model}{ignored} --html {options.html}"
    write_page(options.html, Path(options.model).name, [audit_section(table)], command)


def _add_init(commands: Any) -> None:
    text = "redraw all kernels, reset the rest, and save the model"
    command = commands.add_parser("init", help=text, description=text, **_STYLE)
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
    text = (
        "then scale the kernels so that signal and gradient keep their scale on this batch "
        "(.npy, or .npz with the names of the inputs); without a file, on unit noise"
    )
    add("--calibrate", nargs="?", const="", metavar="X.npy", help=text)


def _init(options: argparse.Namespace) -> int:
    from keras_glorot.initialization import initialize
    from keras_glorot.initializers import GlorotNormal, GlorotUniform

    kind = GlorotNormal if options.distribution == "normal" else GlorotUniform
    initializer = kind(gain=options.gain)  # may fail, as may the folder: before the work
    with _folder_beside(options.output) as folder:
        model = _load(options.model)
        tables = [initialize(model, initializer, seed=options.seed)]
        said = ""
        if options.calibrate is not None:
            from keras_glorot.calibration import calibrate

            x, said = _batch(model, options.calibrate)
            tables.append(calibrate(model, x))
        _save(model, folder, options.output)
    _write(said + "\n".join(map(_render, tables)))
    return 0


def _add_propagate(commands: Any) -> None:
    text = "show how the signal and its gradient change from layer to layer"
    command = commands.add_parser("propagate", help=text, description=text, **_STYLE)
    command.set_defaults(run=_propagate)
    add = command.add_argument
    add("model", metavar="MODEL", help="a .keras file or an architecture")
    text = (
        "the batch to call it on (.npy, or .npz with the names of the inputs); without a "
        "file, unit noise"
    )
    add("--data", default="", metavar="X.npy", help=text)
    add("--json", action="store_true", help="print JSON, and nothing else")
    add("--all", action="store_true", help="print all rows, and not only kernels")


def _propagate(options: argparse.Namespace) -> int:
    from keras_glorot.propagation import propagate

    with contextlib.redirect_stdout(sys.stderr):  # what layers print is not JSON
        model = _load(options.model)
        x, said = _batch(model, options.data)
        table = propagate(model, x)
    _write(table.to_json() + "\n" if options.json else said + _render(table, options.all))
    return 0


# Examples of unit noise: enough for a std to be right to a few percent.
_EXAMPLES = 16


def _batch(model: Any, name: str) -> tuple[Any, str]:
    """The batch in a file, or unit noise; and a line that says so."""
    import numpy as np

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


def _output(text: str) -> Path:
    target = Path(os.path.realpath(text))
    if not text.endswith(".keras") or not target.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file in an existing folder that ends in .keras. Received: {text}"
        )
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "a device"
        raise argparse.ArgumentTypeError(f"must be a file, not {kind}. Received: {text}")
    return Path(text)


def _gain(text: str) -> float | str:
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def _load(name: str) -> Any:
    import keras

    from keras_glorot.arguments import suggestion

    if os.path.isdir(name):
        raise ValueError(f"MODEL must be a .keras file, not a directory. Received: {name}")
    if os.path.exists(name):
        if not zipfile.is_zipfile(name):
            raise ValueError(f"MODEL must be a whole .keras file. Received: {name}")
        return keras.saving.load_model(name, safe_mode=True)
    architectures = {
        name: build for name, build in vars(keras.applications).items() if callable(build)
    }
    if name in architectures:
        return architectures[name](weights=None)
    raise ValueError(
        "MODEL must be a .keras file or the name of a keras.applications architecture. "
        f"Received: {name}.{suggestion(name, architectures)}"
    )


@contextlib.contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """A new folder on the disk where the output will be; it is removed in any case."""
    # Beside the file that a symbolic link points to, so that the link stays one.
    parent = Path(os.path.realpath(output)).parent
    # Its name is known before it is there: a signal at any moment finds what to remove.
    folder = parent / f".keras-glorot-{secrets.token_hex(8)}"
    try:
        try:
            folder.mkdir(0o700)
        except OSError as error:
            raise ValueError(_explain_unwritable(output, error)) from None
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(model: Any, folder: Path, output: Path) -> None:
    """Saves whole, then replaces: nobody ever sees half a file."""
    path, target = folder / "model.keras", Path(os.path.realpath(output))
    try:
        model.save(path)
        if target.exists():
            shutil.copymode(target, path)
        os.replace(path, target)
    except OSError as error:
        raise ValueError(_explain_unwritable(output, error)) from None


def _explain_unwritable(output: Path, error: OSError) -> str:
    # Without the path that the error has: it is that of our own folder.
    reason = error.strerror or str(error)
    return f"-o must be a file that can be written. Received: {output} ({reason})"


def _render(table: Any, all: bool = False) -> str:
    """The table as this terminal shows it."""
    from rich.console import Console

    console = Console()
    with console.capture() as captured:
        console.print(table.view(all))
    return captured.get()


def _write(text: str) -> None:
    """Writes to stdout, at once. That nobody reads to the end (`| head`) is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer goes nowhere, without a word about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def _complain(kind: str, message: str) -> None:
    """Writes one line to stderr."""
    from keras_glorot.tables import printable

    line = printable(" ".join(message.split()))
    print(f"{PROGRAM}: {kind}: {line[:300]}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any) -> None:
    _complain("warning", str(message))


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Lets a signal that would end the process at once clean up first."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + number)

    numbers = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # `nohup` has it ignored, and so it stays.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                numbers.append(number)
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
