"""How a layer makes its weights: seen by building a copy of it."""

import dataclasses
import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._keras.isolation import (
    NotIsolatedError,
    Reach,
    is_immutable,
    is_library,
)
from keras_glorot._keras.state import (
    get_global_attribute,
    set_global_attribute,
    unmoved_generators,
)
from keras_glorot._keras.tree import (
    Tree,
    attributes,
    own_variables,
    signature,
)

__all__ = [
    "BuildValue",
    "NotIsolatedError",
    "build_values",
    "may_assign",
    "may_hold_given_vectors",
    "rebuild_sources",
]


@dataclasses.dataclass(frozen=True, eq=False)
class BuildValue:
    """The value that a layer assigns to a variable in `build`, or makes it of.

    Attributes:
        declared: The initializer that the variable was made with before.
        variable: The variable.
        rebuild: The `_Rebuild` that builds a copy of the layer.
    """

    declared: Any
    variable: keras.Variable
    rebuild: "_Rebuild"


def build_values(sources: list[BuildValue]) -> list[Any]:
    """The value of each, all from the same weights: build copies each layer once."""
    rebuilds = {id(source.rebuild): source.rebuild for source in sources}
    assigned = {key: rebuild.assigned_values() for key, rebuild in rebuilds.items()}
    return [assigned[id(each.rebuild)][id(each.variable)] for each in sources]


def may_hold_given_vectors(
    layer: keras.Layer, variable: keras.Variable, is_in_graph: bool
) -> bool:
    """Whether an `Embedding` may have got these values as its argument `weights`.

    Keras keeps no trace of the argument, but it makes the layer build itself at once: no
    shape is known then, and no other layer is being built, unless a model is loaded: from
    3.16 on Keras builds the layers of a `Sequential` in its name scope.

    Args:
        layer: The layer.
        variable: Its weight.
        is_in_graph: Whether it stands in a graph of Keras, which builds layers on shapes.
    """
    return (
        isinstance(layer, keras.layers.Embedding)
        and variable.name == "embeddings"
        and (is_in_graph or variable.path == f"{layer.name}/embeddings")
        and layer.get_build_config() == {"shapes_dict": {}}
    )


def may_assign(layer: keras.Layer) -> bool:
    """Whether making it runs code that is not Keras's, other than of its sublayers.

    Keras's own layers assign nothing in `build`.
    """
    is_foreign = not type(layer).__module__.startswith("keras.")
    has_build = not type(layer).build.__module__.startswith("keras.")
    return is_foreign and (has_build or bool(own_variables(layer)))


def rebuild_sources(original: keras.Layer) -> tuple[dict[int, Any], Exception | None]:
    """By `id`, the sources of the variables of a layer and of its sublayers.

    That is an initializer, or a `BuildValue` where `build` assigns or makes a variable of a
    value. A copy is built from the layer's attributes: a config can lack something. Only
    what `__init__` makes needs the config, and only a layer that reads the weights of
    another one needs that one built. The copy gets no values, and a thread of its own: the
    names that Keras counts and the variables that it has yet to fill are one set per
    thread. It shares no object that can change; a layer whose code could reach one is not
    rebuilt. Variables that no copy has are left out.

    Returns:
        The sources, and the first error: whatever the layer raises. None if all is known.
    """
    sources: dict[int, Any] = {}
    errors: list[Exception] = []
    for way in (_Replica.from_attributes, _Replica.beside_built, _Replica.from_config):
        try:
            rebuild = _Rebuild(original, way)
            sources = rebuild.sources() | sources
            errors += rebuild.errors
        except Exception as error:  # from a layer of the user: anything
            errors.append(error)
        if all(id(variable) in sources for variable in original.weights):
            return sources, None
    return sources, errors[0] if errors else None


class _Rebuild:
    """Builds copies of a layer in which variables have no values of their own."""

    def __init__(self, original: keras.Layer, copy: "Callable[[_Replica], keras.Layer]"):
        self.original, self.copy = original, copy
        self.created: list[keras.Variable | None] = []
        self.errors: list[Exception] = []

    def sources(self) -> dict[int, Any]:
        """As `rebuild_sources`; notes which variable is made in which turn."""
        scope = _ReplayScope()
        pairs, created, replica = backends.outside_traces(self._build, scope)
        counterparts = {id(copy): variable for variable, copy in pairs}
        counterparts |= {id(copy): variable for variable, copy in replica.stand_ins}
        self.created = [counterparts.get(id(copy)) for copy in created]
        if self.errors and any(name.startswith("assign") for name in replica.reach.names):
            return {}  # the rest could have assigned
        sources = {}
        for variable, copy in pairs:
            source = copy._initializer
            if scope.final_value(copy) is not None:
                value = functools.partial(_as_built, copy._value)
                source = BuildValue(source or value, variable, self)
            sources[id(variable)] = source
        return sources

    def assigned_values(self) -> dict[int, Any]:
        """By `id` of the variable, the value that `build` assigns if the weights stay."""
        scope = _ReplayScope(self.created)
        pairs, *_ = backends.outside_traces(self._build, scope)
        values = {id(variable): scope.final_value(copy) for variable, copy in pairs}
        return {key: value for key, value in values.items() if value is not None}

    def _build(self, scope: "_ReplayScope"):
        replica = _Replica(self.original)
        # The layer has warned of the same when the original was built.
        ignored = warnings.catch_warnings(action="ignore")
        with unmoved_generators(), scope, ignored, replica.reach:
            replica.check()
            copy = self.copy(replica)
            replica.check()
            try:
                if config := _build_config(self.original):
                    copy.build_from_config(replica.of(config))
            except Exception as error:  # before it, some variables can be made
                self.errors = [replica.explain(error)]
        created = list(get_global_attribute("uninitialized_variables") or ())
        new = {id(variable) for variable in (*created, *scope.made_of_values)}
        pairs = []
        for one, other in _layer_pairs(self.original, copy):
            made = [variable for variable in own_variables(other) if id(variable) in new]
            pairs += _variable_pairs(own_variables(one), made)
        return pairs, created, replica


def _as_built(value: Any, shape: Any, dtype: Any = None) -> Any:
    return value


class _ReplayScope(keras.StatelessScope):
    """Notes assignments; lets the n-th variable made read as the n-th one given.

    A variable can be made of a value, which Keras forbids in such a scope: this thread is
    told of each call, and the scope is closed during such a one.
    """

    def __init__(self, created: Sequence[keras.Variable | None] = ()):
        super().__init__(initialize_variables=False)
        self.created = created
        self.made_of_values: list[keras.Variable] = []

    def final_value(self, variable: keras.Variable) -> Any:
        """The value that `build` gives a variable; None if it gives none."""
        assigned = super().get_current_value(variable)
        return variable._value if assigned is None else assigned

    def __enter__(self) -> Self:
        super().__enter__()
        self.profiler = sys.getprofile()
        sys.setprofile(self._note_call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self.profiler)
        super().__exit__(*error)

    def _note_call(self, frame: Any, event: str, argument: Any) -> None:
        if event not in ("call", "return") or frame.f_code not in _variable_makers():
            return
        initializer = frame.f_locals["initializer"]
        if event == "call" and not callable(initializer) and type(initializer) is not str:
            set_global_attribute("stateless_scope", None)
        elif event == "return" and get_global_attribute("stateless_scope") is None:
            set_global_attribute("stateless_scope", self)
            self.made_of_values.append(frame.f_locals["self"])

    def get_current_value(self, variable: keras.Variable) -> Any:
        assigned = super().get_current_value(variable)
        if assigned is not None or variable._value is not None:
            return assigned
        pending = get_global_attribute("uninitialized_variables") or ()
        for made, original in zip(pending, self.created, strict=False):
            if made is variable:
                # A change in place must not reach the original.
                return None if original is None else keras.ops.copy(original._value)
        return None


@functools.cache
def _variable_makers() -> set[Any]:
    """The code that makes a variable, in Keras's class and in the backend's."""
    makers = [vars(kind).get("__init__") for kind in keras.Variable.__mro__]
    codes = [getattr(maker, "__code__", None) for maker in makers]
    return {code for code in codes if code and "initializer" in code.co_varnames}


def _build_config(layer: keras.Layer) -> dict[str, Any] | None:
    """The shapes that its own `build` was called with."""
    is_own = type(layer).build not in (keras.Layer.build, keras.Model.build)
    return layer.get_build_config() if is_own else None


class _Replica:
    """Copies a layer as it was before `build`, with the objects in it.

    That is, without its variables: `build` must not read those that it made. No object that
    can change is shared. An attribute that can't be copied is left out.
    """

    def __init__(self, original: keras.Layer):
        self.original = original
        self.keeps_built = False
        self.copies: dict[int, tuple[Any, Any]] = {}  # with the original: `id`s come again
        members = Tree(original).layers
        self.left_out = {id(each) for layer in members for each in own_variables(layer)}
        self.code: list[tuple[str, Any]] = [(type(m).__name__, type(m)) for m in members]
        self.failed: list[str] = []
        self.stand_ins: list[tuple[keras.Variable, keras.Variable]] = []
        self.reach = Reach()

    def from_attributes(self) -> keras.Layer:
        if not _build_config(self.original):
            raise NotImplementedError("It has no config and no `build`.")
        return self.of(self.original)

    def beside_built(self) -> keras.Layer:
        """The layers in it keep their weights: it can tie its own to them."""
        self.keeps_built = True
        return self.from_attributes()

    def from_config(self) -> keras.Layer:
        config = self.of(self.original.get_config())
        if any(isinstance(part, keras.Variable) for part in keras.tree.flatten(config)):
            # `build` has put it where an argument was.
            raise ValueError("Its config holds a variable.")
        kind: Any = type(self.original)
        parameters = inspect.signature(kind.__init__).parameters.values()
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            # Keras puts these into every config, whether the layer takes them or not.
            accepted = {each.name for each in parameters}
            for name in {"name", "trainable", "dtype"} - accepted:
                config.pop(name, None)
        self.check()
        return kind.from_config(config)

    def check(self) -> None:
        """Raises an error if the code of the copies can reach something outside."""
        self.reach.add(self.code)

    def explain(self, error: Exception) -> Exception:
        """An error of `build`, by an attribute that is left out where there is one."""
        if not self.failed:
            return error
        return NotIsolatedError(f"its `{self.failed[0]}` can't be copied")

    def of(self, value: Any) -> Any:
        if id(value) not in self.copies:
            self._register(value, self._copy(value))
        return self.copies[id(value)][1]

    def _register(self, value: Any, copy: Any) -> None:
        self.copies[id(value)] = value, copy

    def _copy(self, value: Any) -> Any:
        if isinstance(value, keras.Layer):
            return self._copy_layer(value)
        if isinstance(value, keras.Variable):
            return self._stand_in(value)
        if keras.ops.is_tensor(value):
            return value if backends.is_symbolic(value) else keras.ops.copy(value)
        if type(value) is tuple:
            return tuple(self.of(item) for item in value if not self._is_left_out(item))
        for kind in (dict, list, set):
            if isinstance(value, kind) and _is_plain(value):
                return self._copy_object(value, kind(value))
        if _is_of_keras(value) or is_immutable(value):
            return value
        if isinstance(value, types.FunctionType | type | types.ModuleType):
            return self._checked(value)
        self._checked(type(value))
        return self._copy_object(value, value)

    def _is_left_out(self, value: Any) -> bool:
        return id(value) in self.left_out

    def _checked(self, code: Any) -> Any:
        """Code stays as it is. Alone first: if it reaches too far, only its object goes."""
        if not any(code is checked for _, checked in self.code):
            named = (getattr(code, "__name__", "code"), code)
            Reach().add([named])
            self.code.append(named)
        return code

    def _stand_in(self, variable: keras.Variable) -> keras.Variable:
        """A variable that reads like another one, and can't change it."""
        copy = keras.Variable(
            "zeros", tuple(variable.shape), variable.dtype, name=variable.name
        )
        self.stand_ins.append((variable, copy))
        return copy

    def _copy_object(self, value: Any, source: Any) -> Any:
        """As `copy.deepcopy` does it. The source is the object, or a plain one like it."""
        reduced: list[Any] = [*source.__reduce_ex__(4), None, None, None]
        make, arguments, state, items, pairs = reduced[:5]
        is_own = make is type(source) or is_library(getattr(make, "__module__", None))
        # NumPy counts on it that none of an array's objects is left out.
        is_array = isinstance(value, np.ndarray) and value.dtype.hasobject
        can_be_made = is_own and not is_array and not any(map(self._is_left_out, arguments))
        copy: Any = make(*map(self.of, arguments)) if can_be_made else value
        if copy is value:
            raise NotIsolatedError(f"a {type(value).__name__} can't be copied")
        self._register(value, copy)  # before what is in it, which can hold it
        if state is not None and hasattr(copy, "__setstate__"):
            copy.__setstate__(self.of(state))
        elif state is not None:
            for part in state if isinstance(state, tuple) else (state,):
                for name, item in self._kept(part or {}):
                    object.__setattr__(copy, name, self.of(item))
        for item in items or ():
            if not self._is_left_out(item):
                copy.append(self.of(item))
        for key, item in self._kept(dict(pairs or ())):
            copy[self.of(key)] = self.of(item)
        return copy

    def _kept(self, items: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        return [each for each in items.items() if not self._is_left_out(each[1])]

    def _copy_layer(self, layer: keras.Layer) -> keras.Layer:
        self._checked(type(layer))
        copy: Any = type(layer).__new__(type(layer))
        self._register(layer, copy)
        is_built = self.keeps_built and layer is not self.original
        own = {id(variable) for variable in own_variables(layer)}
        if is_built:
            self.left_out -= own
        else:
            self.left_out |= own
        # PyTorch's list of parameters would take in those of the copy.
        parameters = vars(layer).get("_modules", {}).get("_torch_params")
        self.left_out |= {id(parameters)} - {id(None)}
        # Made before `__init__`: `build`, and the lists of what Keras tracks.
        fresh = set(vars(copy)) - {"_lock"}
        for name, value in self._kept(vars(layer)):
            if name not in fresh and not name.startswith("_self_"):  # TensorFlow's lists
                try:
                    vars(copy)[name] = self.of(value)
                except Exception:  # from an object of the user: anything
                    self.copies.pop(id(value), None)
                    self.failed.append(name)
        vars(copy)["built"] = is_built
        return copy


def _is_plain(container: Any) -> bool:
    """Whether it is Python's own, or one in its place that tracks what is put into it."""
    root = type(container).__module__.partition(".")[0]
    return root in ("builtins", "keras", "tensorflow", "wrapt")


def _is_of_keras(value: Any) -> bool:
    return type(value).__module__.startswith("keras.")


def _layer_pairs(
    original: keras.Layer, copy: keras.Layer
) -> list[tuple[keras.Layer, keras.Layer]]:
    """The layer and its sublayers, each with its counterpart in a copy."""
    pairs: list[tuple[Any, Any]] = [(original, copy)]
    seen = {id(original)}
    for one, other in pairs:
        others = attributes(other, keras.Layer)
        for place, child in attributes(one, keras.Layer).items():
            counterpart = others.get(place)
            if type(counterpart) is type(child) and id(child) not in seen:
                seen.add(id(child))
                pairs.append((child, counterpart))
    return pairs


def _variable_pairs(
    originals: list[keras.Variable], copies: list[keras.Variable]
) -> list[tuple[keras.Variable, keras.Variable]]:
    """Each variable with its counterpart: same name and shape, made in the same turn."""
    counterparts: dict[Any, list[keras.Variable]] = {}
    for copy in copies:
        counterparts.setdefault(signature(copy), []).append(copy)
    pairs = []
    for variable in originals:
        if waiting := counterparts.get(signature(variable)):
            pairs.append((variable, waiting.pop(0)))
    return pairs
