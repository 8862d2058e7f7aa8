"""Imports point downwards, and what is public is what is exported.

A room is a module or a folder of modules. `python tests/test_structure.py` prints who
imports whom.
"""

import ast
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
# From the top down.
ORDER = [
    "__main__",
    "keras_glorot_cli",
    "cli",
    "tools",
    "recipes",
    "_models",
    "initializers",
    "layer_rules",
    "_keras",
    "gains",
    "_backends",
    "_drawing",
    "tables",
    "fans",
    "installed",
    "arguments",
]


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


def test_the_order_has_every_room_once():
    assert sorted(ORDER) == sorted({name.split(".")[0] for name in FILES})


def test_imports_point_downwards():
    for module in FILES:
        room = module.split(".")[0]
        reached = {name.split(".")[0] for name in imports(module)} - {room}
        upward = reached - set(ORDER[ORDER.index(room) + 1 :])
        assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


def test_an_import_looks_at_no_command_line():
    """The program that imports this package has arguments of its own."""
    for module in FILES.keys() - {"keras_glorot_cli"}:
        assert "sys.argv" not in FILES[module].read_text(encoding="utf-8")


def test_no_circle():
    """Not inside of a folder either."""
    TopologicalSorter({module: imports(module) for module in FILES}).prepare()


def taken(module):
    """By module, the names that others take from it: by import, or as an attribute."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    modules, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_gl"):
            source = node.module.removeprefix("keras_glorot.")
            for alias in node.names:
                name = f"{node.module}.{alias.name}".removeprefix("keras_glorot.")
                if name in FILES:
                    modules[alias.asname or alias.name] = name
                else:
                    found.add((source, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add((modules.get(node.value.id), node.attr))
    return {(source, name) for source, name in found if name not in ("*", "__all__")}


def test_each_module_lists_the_names_that_others_take():
    used = {module: taken(path) for module, path in FILES.items()}
    for module, path in FILES.items():
        listed = all_of(FILES["_backends.common"] if module == "_backends" else path)
        folder = module.rpartition(".")[0]
        names = {
            name
            for user, pairs in used.items()
            for source, name in pairs
            if source == module and not (folder and user.startswith(folder))
        }
        assert names <= listed, f"{module} does not list {sorted(names - listed)}"


def all_of(path):
    """The names in the `__all__` of a file, or of the one that it takes all from."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name("__all__")]):
                return set(ast.literal_eval(node.value))
            case ast.ImportFrom(names=[ast.alias("*")], module=str(source)):
                return all_of(FILES[source.removeprefix("keras_glorot.")])
    return set()


def test_tests_import_neither_tests_nor_benchmarks():
    """What two of them need is a helper."""
    tests = ROOT / "tests"
    files = [*tests.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in tests.rglob("*.py"):
        others = {each.stem for each in files} - {path.stem}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=names):
                    sources = {alias.name for alias in names}
                case ast.ImportFrom(module=module):
                    sources = {module}
                case _:
                    continue
            assert not sources & others, f"{path.name} imports {sorted(sources & others)}"


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
    for name in sorted(FILES, key=lambda name: ORDER.index(name.split(".")[0])):
        print(f"{name:16} imports {', '.join(sorted(imports(name))) or 'nothing'}")
