"""Imports point downwards, and what is public is what is exported.

`python tests/test_structure.py` prints who imports whom.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keras_glorot"
FILES = {
    path.stem: path
    for path in [ROOT / "keras_glorot_cli.py", *PACKAGE.glob("*.py")]
    if path.stem != "__init__"
}
MODULES = sorted(FILES)


def layers():
    """The modules as CONTRIBUTING.md lists them, from the top down."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def imports(module):
    """The modules of the package that a module imports, also inside functions."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module == "keras_glorot":
            found |= {alias.name for alias in node.names}
        elif node.module:
            found.add(node.module.removeprefix("keras_glorot."))
    return found & set(MODULES)


def test_the_map_has_every_module_once():
    assert sorted(layers()) == MODULES


def test_imports_point_downwards():
    order = layers()
    for module in order:
        below = set(order[order.index(module) + 1 :])
        upward = imports(module) - below
        # A table draws itself: matplotlib is imported when it is asked for a picture.
        if module == "tables":
            upward -= {"plots"}
        assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


def test_an_import_looks_at_no_command_line():
    """The program that imports this package has arguments of its own."""
    for module in FILES.keys() - {"keras_glorot_cli"}:
        assert "argv" not in FILES[module].read_text(encoding="utf-8")


def test_only_public_names_are_visible():
    import keras_glorot

    assert dir(keras_glorot) == sorted(keras_glorot.__all__)
    for name in keras_glorot.__all__:
        assert hasattr(keras_glorot, name)


if __name__ == "__main__":
    for name in layers():
        print(f"{name:16} imports {', '.join(sorted(imports(name))) or 'nothing'}")
