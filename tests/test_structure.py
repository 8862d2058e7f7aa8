"""Imports point downwards, and what is public is what is exported.

A room is a module or a folder of modules. `python tests/test_structure.py` prints who
imports whom.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_glorot"
FILES = {
    "keras_glorot_cli": ROOT / "keras_glorot_cli.py",
    **{
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    },
}
ROOMS = sorted({name.split(".")[0] for name in FILES})


def rooms():
    """Those that CONTRIBUTING.md lists, from the top down."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def imports(module):
    """The modules of the package that a module imports, also inside functions."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            source = node.module.removeprefix("keras_glorot.")
            for alias in node.names:
                name = f"{node.module}.{alias.name}".removeprefix("keras_glorot.")
                found.add(name if name in FILES else source)
    return found & set(FILES)


def test_the_map_has_every_room_once():
    assert sorted(rooms()) == ROOMS


def test_imports_point_downwards():
    order = rooms()
    for module in FILES:
        room = module.split(".")[0]
        reached = {name.split(".")[0] for name in imports(module)} - {room}
        upward = reached - set(order[order.index(room) + 1 :])
        assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


def test_an_import_looks_at_no_command_line():
    """The program that imports this package has arguments of its own."""
    for module in FILES.keys() - {"keras_glorot_cli"}:
        assert "sys.argv" not in FILES[module].read_text(encoding="utf-8")


def test_no_circle():
    """Not inside of a folder either."""
    TopologicalSorter({module: imports(module) for module in FILES}).prepare()


def functions(module):
    """The public functions of a module, with their arguments."""
    return {
        node.name: ast.unparse(node.args)
        for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def test_backends_have_the_same_names():
    """A file of one backend answers to what the package asks of each, and to no more."""
    asked = functions("_backends.common")
    for backend in ("tensorflow", "jax", "torch"):
        answered = functions(f"_backends.{backend}")
        assert answered == {name: asked.get(name) for name in answered}


def test_only_the_backends_know_which_one_it_is():
    """In a report it is a word, and in `_fitting` a fault of Keras."""
    asking = {
        module
        for module, path in FILES.items()
        if "backend.backend()" in path.read_text(encoding="utf-8")
    }
    allowed = {"_backends", "_backends.traced", "tools.report", "tools._fitting"}
    assert asking <= allowed


def test_only_public_names_are_visible():
    import keras_glorot

    assert dir(keras_glorot) == sorted(keras_glorot.__all__)
    for name in keras_glorot.__all__:
        assert hasattr(keras_glorot, name)


if __name__ == "__main__":
    for name in sorted(FILES, key=lambda name: rooms().index(name.split(".")[0])):
        print(f"{name:16} imports {', '.join(sorted(imports(name))) or 'nothing'}")
