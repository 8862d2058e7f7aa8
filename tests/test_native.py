"""The native kernel, called as `sampling` never calls it: it refuses, and never crashes."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from keras_glorot._drawing import stream

NATIVE = stream.native
FUZZER = Path(__file__).parent / "helpers" / "fuzz_native.py"
SOURCE = Path(stream.__file__).parent / "_native.c"


def fuzz(file, count, **environment):
    command = [sys.executable, "-X", "faulthandler", FUZZER, file, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment or None)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(NATIVE is None, reason="about the native kernel")
def test_arguments_at_random_are_refused_or_fill_their_part():
    fuzz(NATIVE.__file__, 2000)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_compiles_without_a_warning(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    include = python_headers()
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    command = [compiler, "-c", *warnings, f"-I{include}", SOURCE, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def python_headers():
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    return include


def sanitizers(compiler):
    """The libraries that have to be loaded before Python."""
    names = ["libasan.so", "libubsan.so"]
    asked = [[compiler, f"-print-file-name={name}"] for name in names]
    paths = [
        subprocess.run(each, capture_output=True, text=True).stdout.strip()
        for each in asked
    ]
    # A compiler that does not have one prints its name alone.
    return [path for path in paths if Path(path).is_absolute() and Path(path).exists()]


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    libraries = sanitizers(compiler)
    if len(libraries) < 2:
        pytest.skip("gcc's libasan or libubsan is not installed")
    include = python_headers()
    file = tmp_path / "_native.so"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [compiler, "-O1", "-g", "-shared", "-fPIC", "-ffp-contract=off", *checks]
    subprocess.run([*command, f"-I{include}", SOURCE, "-o", file], check=True)
    # Python never frees all that it has.
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    fuzz(file, 30_000, **environment)
