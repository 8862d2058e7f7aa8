"""Whether code can reach what is outside of a copy.

To see how a layer makes its weights, a copy of it is built. That must touch nothing else.
Attributes of classes, functions and modules are put back. A change inside an object can't
be undone, so it is decided before, from the code: a function may run if no name in it, and
in what it calls, leads to an object that can change.
"""

import dis
import enum
import functools
import itertools
import sys
import types
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

__all__ = ["NotIsolatedError", "Reach", "is_immutable", "is_library"]


class NotIsolatedError(Exception):
    """Something outside of a copy can be reached from it: the message says what."""


_LIBRARIES = {
    *sys.stdlib_module_names,
    *("keras", "keras_glorot", "ml_dtypes", "numpy", "optree"),
    *("jax", "jaxlib", "tensorflow", "torch", "torchvision"),
} - {"__main__"}
# Of these, not all that is made of a class is immutable, but nearly all.
_HARMLESS = {
    *("abc", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools"),
    *("inspect", "jax", "jaxlib", "keras", "keras_glorot", "logging", "ml_dtypes", "numpy"),
    *("operator", "pathlib", "re", "types", "typing"),
}
_MUTABLE = (
    *(bytearray, dict, list, set, functools.partial, types.SimpleNamespace),
    *(np.ndarray, np.random.Generator, np.random.RandomState, np.random.BitGenerator),
    *(keras.Layer, keras.Variable, keras.Metric, keras.optimizers.Optimizer),
    keras.random.SeedGenerator,
)
_ATOMS = (
    *(type(None), type(...), type(NotImplemented), bool, int, float, complex),
    *(str, bytes, range, slice, object),
)
_BUILTIN_CODE = (
    *(types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType),
    type(vars(NamedTuple("_", [("field", int)]))["field"]),
)
# They lead to objects that the code does not name.
_LOOKUPS = {"__import__", "__subclasses__", "eval", "exec", "globals", "import_module"}
_LOOKUP_MODULES = ("ctypes", "gc", "sys")


def is_library(module: str | None) -> bool:
    """Whether a module is Python's, Keras's or a backend's own."""
    return (module or "").partition(".")[0] in _LIBRARIES


def is_immutable(value: Any) -> bool:
    """Whether an object can't change, as far as its class says."""
    if type(value) in _ATOMS or isinstance(value, enum.Enum):
        return True
    if isinstance(value, tuple | frozenset):
        return all(map(is_immutable, value))
    root = type(value).__module__.partition(".")[0]
    # A cache is a dictionary.
    is_cache = hasattr(value, "cache_clear")
    return root in _HARMLESS and not isinstance(value, _MUTABLE) and not is_cache


class _Uses(NamedTuple):
    """The names in the code of a function."""

    variables: set[str]  # global ones
    attributes: set[str]  # also methods, and what it imports from a module
    modules: set[str]
    rebound: set[str]  # global variables, and those of an outer function


@functools.lru_cache(4096)
def _uses(code: types.CodeType) -> _Uses:
    codes = [code]  # with those of the functions in it
    for each in codes:
        codes += [part for part in each.co_consts if isinstance(part, types.CodeType)]
    attributes = {name for each in codes for name in each.co_names}
    by_operation = defaultdict(set)
    for instruction in itertools.chain.from_iterable(map(dis.get_instructions, codes)):
        by_operation[instruction.opname].add(instruction.argval)
    variables = by_operation["LOAD_GLOBAL"] | by_operation["LOAD_NAME"]
    if variables & {"getattr", "setattr", "delattr", "vars", "attrgetter"}:
        constants = [part for each in codes for part in each.co_consts]
        attributes.update(part for part in constants if isinstance(part, str))
    rebound = by_operation["STORE_DEREF"] | by_operation["DELETE_DEREF"]
    rebound &= {*code.co_freevars}
    rebound |= by_operation["STORE_GLOBAL"] | by_operation["DELETE_GLOBAL"]
    return _Uses(variables, attributes, by_operation["IMPORT_NAME"], rebound)


class Reach:
    """Follows names from functions and classes to functions and classes.

    The methods of a class that Keras or Python knows are read, but for `call`,
    which runs later, and those that something names. Inside of `with` the code may run; its
    end puts back the attributes that it has set.

    Raises:
        NotIsolatedError: Of `add`, if something leads to an object that can change.
    """

    def __init__(self):
        self.names: set[str] = set()
        self.spaces: list[tuple[str, Any, dict[str, Any]]] = []  # with what was in them
        self.seen: dict[int, Any] = {}

    def add(self, values: Iterable[tuple[str, Any]]) -> None:
        waiting = list(values)
        while waiting:
            for label, value in waiting:
                self._add(label, value)
            waiting = self._named()

    def _named(self) -> list[tuple[str, Any]]:
        """Where the names lead in classes and modules that were not looked at yet."""
        return [
            (f"{label}.{name}", vars(holder)[name])
            for label, holder, _ in self.spaces
            for name in self.names & vars(holder).keys()
            if id(vars(holder)[name]) not in self.seen
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for _, holder, before in self.spaces:
            own: Any = type if isinstance(holder, type) else object
            now = dict(vars(holder))
            for name in self.names & (now.keys() | before.keys()):
                if name not in before:
                    own.__delattr__(holder, name)
                elif now.get(name, self) is not before[name]:
                    own.__setattr__(holder, name, before[name])

    def _add(self, label: str, value: Any) -> None:
        if id(value) in self.seen:
            return
        self.seen[id(value)] = value
        match value:
            case types.FunctionType():
                self._add_function(label, value)
            case type():
                self._add_class(value)
            case types.ModuleType():
                if value.__name__ in _LOOKUP_MODULES:
                    raise NotIsolatedError(f"its code uses `{label}`")
                if not is_library(value.__name__):
                    self._add_space(label, value)
            case property():
                self._add_all(label, (value.fget, value.fset, value.fdel))
            case classmethod() | staticmethod():
                self._add(label, value.__func__)
            case functools.cached_property():
                self._add(label, value.func)
            case types.MethodType():
                self._add_all(label, (value.__func__, value.__self__))
            case functools.partial():
                parts = (value.func, *value.args, *value.keywords.values())
                self._add_all(label, parts)
            case weakref.ref():
                self._add(label, value())
            case tuple() | frozenset():
                self._add_all(label, value)
            case enum.Enum():
                self._add(label, type(value))
            case types.BuiltinFunctionType():
                self._add(label, value.__self__)  # `append = REGISTRY.append`
            case _ if not is_immutable(value) and not isinstance(value, _BUILTIN_CODE):
                kind = type(value).__name__
                raise NotIsolatedError(f"its code uses `{label}`, a {kind} outside of it")

    def _add_all(self, label: str, values: Iterable[Any]) -> None:
        for value in values:
            self._add(label, value)

    def _add_class(self, cls: type) -> None:
        if is_library(cls.__module__):
            return
        bases = [base for base in cls.__mro__ if is_library(base.__module__)]
        for name, value in vars(cls).items():
            kinds = types.FunctionType | property | classmethod | staticmethod
            is_known = name.startswith("__") or any(hasattr(base, name) for base in bases)
            if is_known and name != "call" and isinstance(value, kinds):
                self._add(f"{cls.__name__}.{name}", value)
        self._add_space(cls.__name__, cls)
        for base in (*cls.__mro__[1:], type(cls)):
            self._add(base.__name__, base)

    def _add_space(self, label: str, holder: Any) -> None:
        self.spaces.append((label, holder, dict(vars(holder))))

    def _add_function(self, label: str, function: types.FunctionType) -> None:
        code, variables = function.__code__, function.__globals__
        cells = _cells(function)
        # Not by `__module__`: a decorator's function takes over that of yours.
        if is_library(variables.get("__name__")):
            self._add_all(label, filter(callable, cells.values()))
            return
        uses = _uses(code)
        if uses.rebound:
            raise NotIsolatedError(f"its code sets `{min(uses.rebound)}` outside of it")
        if lookups := uses.attributes & _LOOKUPS:
            raise NotIsolatedError(f"its code uses `{min(lookups)}`")
        self.names |= uses.attributes
        self._add_space(label, function)
        for name in sorted(uses.variables & variables.keys()):
            self._add(name, variables[name])
        for name in uses.modules:
            for module in _modules(name, variables.get("__package__") or ""):
                self._add(name, module)
        for name, value in cells.items():
            self._add(name, value)
        named = function.__kwdefaults__ or {}
        defaults = (*(function.__defaults__ or ()), *named.values())
        self._add_all(f"{label}'s defaults", defaults)


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """The variables of outer functions that a function uses, but what is not assigned."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    empty = types.CellType()
    return {
        name: cell.cell_contents
        for name, cell in zip(names, cells, strict=True)
        if cell != empty
    }


def _modules(name: str, package: str) -> list[types.ModuleType]:
    """The modules of `import name`: relative to the package, or to one above it."""
    parts = package.split(".") if package else []
    above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    names = [name, *(f"{each}.{name}".rstrip(".") for each in above)]
    return [sys.modules[each] for each in names if each in sys.modules]
