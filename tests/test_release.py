"""What a release says of itself agrees, and its public names change on purpose only."""

import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import keras_glorot

ROOT = Path(__file__).parent.parent
LISTING = Path(__file__).parent / "golden" / "api.txt"


def public_names():
    """Each public function and class with its arguments, and what a class offers."""
    for name in sorted(set(keras_glorot.__all__) - {"__version__"}):
        value = getattr(keras_glorot, name)
        yield name + arguments(value)
        if inspect.isclass(value):
            yield from members(value)


def members(cls):
    """Those of its own and of our base classes, not of Keras's or Python's."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("keras_glorot.")]
    for member in sorted({name for base in ours for name in vars(base)}):
        if not member.startswith("_"):
            value = getattr(cls, member)
            call = arguments(value) if inspect.isfunction(value) else ""
            yield f"    {cls.__name__}.{member}{call}"


def arguments(function):
    """Names, order and defaults. Each Python prints types in its own way."""
    signature = inspect.signature(function)
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    empty = inspect.Signature.empty
    return str(signature.replace(parameters=plain, return_annotation=empty))


def test_signatures(request):
    """`pytest tests/test_release.py --overwrite` accepts a change: name it in CHANGELOG."""
    listing = "\n".join(public_names()) + "\n"
    if request.config.getoption("--overwrite"):
        LISTING.write_text(listing, encoding="utf-8")
    assert listing == LISTING.read_text(encoding="utf-8")


# Where the version of the release stands, and in which words.
VERSION_PLACES = {
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## (\S+)",
    "README.md": r"^keras-glorot (\S+) on Keras",
    "CONTRIBUTING.md": r"`git tag -s v(\S+) ",
}


@pytest.mark.parametrize("name", VERSION_PLACES)
def test_one_version(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / name).read_text(encoding="utf-8")
    first = re.search(VERSION_PLACES[name], text, re.MULTILINE)
    assert first is not None
    assert first[1] == project["project"]["version"]


# Of the table of versions in the guide to install, and the distributions that bring them.
TESTED = {
    "Keras": "keras",
    "Keras's nightly": "keras-nightly",
    "TensorFlow": "tensorflow",
    "JAX": "jax",
    "PyTorch": "torch",
}
# With the tests of draws, backends and tools. Not pinned: a build with CUDA, of gigabytes.
TESTED_BY_HAND = {"PyTorch": {"2.15.0"}}


@pytest.mark.parametrize("name", TESTED)
def test_the_tested_versions_are_those_of_the_pins(name):
    guide = (ROOT / "docs" / "guides" / "install.md").read_text(encoding="utf-8")
    listed = re.search(rf"^\| {name} \| [^|]+ \| ([\w., ]+) \|$", guide, re.MULTILINE)
    pins = [
        version
        for path in sorted((ROOT / "requirements").glob("*.txt"))
        for version in re.findall(
            rf"^{TESTED[name]}==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert listed is not None
    assert set(listed[1].split(", ")) == {*pins, *TESTED_BY_HAND.get(name, ())}


@pytest.mark.slow
def test_a_wheel_without_the_kernel_is_for_any_python(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "keras_glorot", source / "keras_glorot")
    for each in (source / "keras_glorot" / "_drawing").glob("_native.*"):
        each.unlink()  # also the source: no compiler finds it
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "keras_glorot_cli.py",
    ):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)],
        cwd=source,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: true" in archive.read(about)
    assert "keras_glorot/_drawing/stream.py" in names
    assert not any("_native" in name for name in names)


def test_actions_are_pinned_by_hash():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for action in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action), action
