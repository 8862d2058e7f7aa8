"""The only module that touches what Keras does not export.

Above all: whose weight is being drawn. Keras hands an initializer a shape and a dtype,
and not the layer that asks. It does know: each open name scope remembers its caller.

A model without a `build` method makes its weights later, when those scopes are closed:
Keras calls the model symbolically, lists the variables that this creates, and fills
them in order afterwards. Such a variable is looked up in the model that the symbolic
call was seen in.
"""

import contextlib
import functools
import inspect
import random
import re
import sys
import threading
import types
import warnings
import weakref
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._drawing.stream import state_words
from keras_glorot._keras.isolation import (
    NotIsolatedError,
    Reach,
    copy_object,
    is_immutable,
    is_library,
)

# `_is_keras_as_expected` notices what is missing, and warns.
try:
    from keras.src.backend.common.global_state import (
        get_global_attribute,
        set_global_attribute,
    )
except ImportError:

    def get_global_attribute(name, default=None, set_to_default=False) -> Any:
        return None

    def set_global_attribute(name, value) -> None:
        pass


try:
    from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
except ImportError:
    get_keras_mask = set_keras_mask = None

try:
    from keras.src.initializers import ALL_OBJECTS_DICT
except ImportError:
    ALL_OBJECTS_DICT: dict[str, Any] = {}  # where Keras finds nothing


__all__ = [
    "BuildValue",
    "CallSite",
    "NotIsolatedError",
    "build_values",
    "canonical_name",
    "canonical_paths",
    "copy_mask",
    "current_call_site",
    "direct_sublayers",
    "downstream_operations",
    "error_reason",
    "initial_state",
    "initializer_tables",
    "is_random_seeded",
    "is_shape_inference",
    "may_assign",
    "may_hold_given_vectors",
    "metrics",
    "optimizer_values",
    "optimizers",
    "owned_variables",
    "rebuild_sources",
    "seed_generators",
    "seed_words",
    "sublayer_paths",
    "sublayers",
    "unmoved_generators",
    "untracked_variables",
    "used_learning_rates",
    "without_remat",
]


class CallSite(NamedTuple):
    """What an initializer is called for: None is what can't be known.

    The variable is known when Keras fills it late, not while it is being created.
    """

    layer: keras.Layer | None = None
    variable: keras.Variable | None = None


def current_call_site(initializer: keras.initializers.Initializer) -> CallSite:
    """Finds out for what Keras is calling this initializer."""
    return _find_call_site(initializer) if _is_keras_as_expected() else CallSite()


def _find_call_site(initializer: Any) -> CallSite:
    scopes = get_global_attribute("name_scope_stack") or ()
    callers = [scope.caller for scope in scopes if scope.caller is not None]
    outermost = next((c for c in callers if isinstance(c, keras.Layer)), None)
    if get_global_attribute("stateless_scope") is not None:
        if outermost is not None:
            _deferred.seen_models[id(outermost)] = outermost
    elif (variable := _deferred_variable(initializer)) is not None:
        layer = _deferred.owner(variable, outermost)
        if layer is not None:
            return CallSite(layer, variable)
    # Metrics and optimizers open scopes too; their variables belong to no layer.
    is_layer = bool(callers) and isinstance(callers[-1], keras.Layer)
    return CallSite(callers[-1] if is_layer else None)


def owned_variables(
    layer: keras.Layer,
) -> list[tuple[keras.Layer | None, keras.Variable]]:
    """Each of `layer.weights` with the layer, in any nested model, that made it.

    None in its place where Keras does not tell.
    """
    if not _is_keras_as_expected():
        return [(None, variable) for variable in layer.weights]
    return _find_owners(layer)


def _find_owners(
    layer: keras.Layer,
) -> list[tuple[keras.Layer | None, keras.Variable]]:
    makers: dict[int, tuple[int, keras.Layer]] = {}
    for holder in sublayers(layer):
        for variable in _own_variables(holder):
            # Wrappers and tied layers hold the variables of others. The path tells who
            # made one; else the innermost holder did, and that one comes last.
            likelihood = _maker_likelihood(holder, variable)
            best = makers.get(id(variable))
            if best is None or likelihood >= best[0]:
                makers[id(variable)] = (likelihood, holder)
    return [
        (makers[id(variable)][1] if id(variable) in makers else None, variable)
        for variable in layer.weights
    ]


def _maker_likelihood(holder: keras.Layer, variable: keras.Variable) -> int:
    """A path ends in the maker's name; what comes before depends on when it was made."""
    if variable.path == f"{holder.path}/{variable.name}":
        return 2
    return int(f"/{variable.path}".endswith(f"/{holder.name}/{variable.name}"))


class _Deferred(threading.local):
    """What symbolic calls in this thread saw of models that are built late."""

    def __init__(self) -> None:
        # Keyed by `id`: layers and variables need not be hashable. Weak, so that no
        # model is kept alive; ids are used again, so a hit is checked before use.
        self.seen_models = weakref.WeakValueDictionary()
        self.owners: dict[int, tuple[weakref.ref, weakref.ref]] = {}

    def owner(self, variable: keras.Variable, outermost: keras.Layer | None):
        """The layer that made `variable`, if it is the one being filled, else None."""
        if self._look_up(variable) is None:
            models = [
                *self.seen_models.values(),
                *([] if outermost is None else [outermost]),
            ]
            self.seen_models.clear()
            self.owners = {
                id(owned): (weakref.ref(layer), weakref.ref(model))
                for model in models
                for layer, owned in _find_owners(model)
                if layer is not None
            }
        layer, model = self._look_up(variable) or (None, None)
        # Keras fills variables with no scope open, or in that of the model they are in.
        # Inside another layer it draws a weight of that one, and this one was left over.
        return layer if outermost is None or outermost is model else None

    def _look_up(self, variable: keras.Variable):
        references = self.owners.get(id(variable), _DEAD_REFERENCES)
        layer, model = (reference() for reference in references)
        # `in` would compare the values of variables.
        if layer is not None and any(own is variable for own in _own_variables(layer)):
            return layer, model
        return None


_DEAD_REFERENCES = (lambda: None, lambda: None)
_deferred = _Deferred()


def _deferred_variable(initializer: Any) -> keras.Variable | None:
    """The variable that Keras fills belatedly by this call, if it does so."""
    pending = get_global_attribute("uninitialized_variables")
    if not pending:
        return None
    # Filled in order: the first one without a value is the one being filled.
    position = bisect_left(pending, True, key=lambda variable: variable._value is None)
    if position < len(pending) and pending[position]._initializer is initializer:
        return pending[position]
    return None


def _own_variables(layer: keras.Layer) -> list[keras.Variable]:
    lists = ("_trainable_variables", "_non_trainable_variables")
    return [variable for name in lists for variable in getattr(layer, name, ())]


@functools.cache
def _is_keras_as_expected() -> bool:
    """Tries, once, if the names that this module takes from inside Keras still work."""
    as_expected = backends.outside_traces(_probe)
    if not as_expected:
        warnings.warn(
            f"keras_glorot can't tell in Keras {keras.__version__} which layer a "
            "weight belongs to, so it takes fan_in and fan_out from the weight's shape "
            "alone. That is wrong for depthwise, grouped, transposed and einsum "
            "kernels: give those `input_axes` and `output_axes`, or install a Keras "
            "version that this version of keras_glorot was tested with. What it says "
            "about whole models is not complete either.",
            stacklevel=2,
        )
    return as_expected


def _probe() -> bool:
    """Builds a small model without a `build` method and looks at what is found in it."""
    if get_global_attribute("stateless_scope") is not None:
        return True  # no thread could be had for it, and in this one it can't be tried
    sites: list[CallSite | None] = []

    def initializer(shape: Any, dtype: Any = None) -> Any:
        try:
            sites.append(_find_call_site(initializer))
        except Exception:  # Keras would add a warning of its own to it
            sites.append(None)
        return keras.ops.zeros(shape, dtype)

    try:
        model = _LateModel(initializer)
        # All of one dtype, whatever floatx is: a cast would come between them.
        entry = keras.layers.InputLayer(
            batch_shape=(1, 1), dtype="float32", name="probe_input"
        )
        model(entry.output)
        dropout, kernel = model.dropout, model.inner.weights[0]
        found = (
            # The symbolic call asks first, if at all.
            all(site is not None and site.layer is model.inner for site in sites),
            sites[-1] == CallSite(model.inner, kernel),
            _find_owners(model) == [(model.inner, kernel)],
            _own_variables(model.inner) == [kernel],
            set(map(id, sublayers(model))) == set(map(id, (model, model.inner, dropout))),
            dropout._seed_generators == [dropout.seed_generator],
            downstream_operations(entry) == [model],
            get_keras_mask is not None and set_keras_mask is not None,
        )
    except Exception:  # whatever a change inside Keras brings about
        return False
    return all(found)


class _LateModel(keras.Layer):
    """Has no `build`, so that Keras makes the weights of its sublayers late."""

    def __init__(self, initializer: Any):
        super().__init__(dtype="float32", name="probe")
        self.inner = keras.layers.Dense(
            1,
            use_bias=False,
            kernel_initializer=initializer,
            dtype="float32",
            name="probe_inner",
        )
        # With a seed: to make one up would advance the user's `random`.
        self.dropout = keras.layers.Dropout(
            0.5, seed=0, dtype="float32", name="probe_dropout"
        )

    def call(self, x: Any) -> Any:
        return self.dropout(self.inner(x))


@functools.cache
def initializer_tables() -> list[dict[str, Any]]:
    """Where Keras looks for an initializer by name. Empty if that can't be found out.

    Keras 3.16 looks for strings in a table of its own alone; for configs it looks first,
    as before, among the registered objects.
    """
    registered = keras.saving.get_custom_objects()
    if _is_searched(registered):
        return [registered]
    if _is_searched(ALL_OBJECTS_DICT):
        return [registered, ALL_OBJECTS_DICT]
    warnings.warn(
        f"keras_glorot can't tell Keras {keras.__version__} what its strings such as "
        '"xavier_uniform" stand for, and `as_default` does not work. Write '
        "`GlorotUniform()` and `GlorotNormal()` in their place, or install a Keras version "
        "that this version of keras_glorot was tested with.",
        stacklevel=2,
    )
    return []


def _is_searched(table: dict[str, Any]) -> bool:
    """Tries if Keras takes an initializer from a table, even in place of its own."""
    name = "STFTInitializer"  # of Keras's own names one that hardly anyone uses
    previous = table.get(name)
    table[name] = _probe_initializer
    try:
        return keras.initializers.get(name) is _probe_initializer
    except Exception:  # whatever a change inside Keras brings about
        return False
    finally:
        table.pop(name)
        if previous is not None:
            table[name] = previous


def _probe_initializer(shape: Any, dtype: Any = None) -> Any:
    return keras.ops.zeros(shape, dtype)


def seed_words(seed: "int | keras.random.SeedGenerator") -> tuple[int, ...] | Any:
    """The integers that a seed stands for; a `SeedGenerator` advances.

    Its state, as a tensor, where that is only a symbol, because the backend is tracing.
    """
    if isinstance(seed, int):
        return (seed,)
    state = seed.next()
    if backends.is_symbolic(state):
        return state
    return state_words(np.asarray(keras.ops.convert_to_numpy(state)))


@contextlib.contextmanager
def unmoved_generators() -> Iterator[None]:
    """Puts back whatever global generators of numbers and of names were moved inside.

    They are those of Python, NumPy, the backend and Keras; of Keras's, this thread's.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global one
    names = dict(get_global_attribute("object_name_uids") or {})
    generator = get_global_attribute("global_seed_generator")
    drawn = None if generator is None else np.array(backends.to_array(generator.state))
    try:
        with backends.unmoved_generators():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        counts = get_global_attribute("object_name_uids")
        if counts is not None:
            counts.clear()
            counts.update(names)
        if generator is not None:
            backends.assign(generator.state, drawn)
        elif get_global_attribute("global_seed_generator") is not None:
            # Made inside, of a seed that the user has not drawn.
            set_global_attribute("global_seed_generator", None)


def is_random_seeded() -> bool:
    """Whether `keras.utils.set_random_seed` has been called, as far as Keras tells.

    Keras forgets it in `clear_session` and in other threads. Python's `random`, which it
    seeds, does not: once seen is enough.
    """
    global _is_random_seeded
    if get_global_attribute("global_random_seed") is not None:
        _is_random_seeded = True
    return _is_random_seeded


_is_random_seeded = False


def is_shape_inference() -> bool:
    """Whether Keras runs here for shapes alone, so that no value is looked at.

    A weight that is still to be filled is then asked of its initializer at every use.
    """
    is_meta = get_global_attribute("torch_device") == "meta"
    return is_meta or get_global_attribute("symbolic_scope") is not None


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer itself and all layers in it, at any depth, each once; parents first."""
    found = {id(layer): layer}
    waiting = deque(_children(layer))
    while waiting:
        child = waiting.popleft()
        if id(child) not in found:
            found[id(child)] = child
            waiting.extendleft(_children(child))  # backwards, as Keras does it
    return list(found.values())


def _children(layer: keras.Layer) -> list[keras.Layer]:
    if hasattr(layer, "_layers"):
        return layer._layers
    return getattr(layer, "layers", [])  # models show them, other layers don't


def additions(model: keras.Layer) -> list[Any]:
    """What adds tensors in functional models: `Add` layers, and the `+` between layers."""
    found = {id(layer): layer for layer in sublayers(model)}
    for layer in list(found.values()):
        found |= {id(each): each for each in getattr(layer, "operations", [])}
    return [each for each in found.values() if type(each).__name__ == "Add"]


def direct_sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that the layer holds itself."""
    return list(_children(layer))


def sublayer_paths(layer: keras.Layer) -> dict[int, str]:
    """By `id`, the path of each sublayer: the names from below `layer` down to it.

    `layer` itself goes by its name. A layer with several parents has the path of the first.
    Unlike Keras's own `path`, this does not depend on how and when a layer was built.
    """

    def names(holders: list[keras.Layer], children: list[keras.Layer]) -> list[str]:
        return [child.name for child in children]

    return {**_tree_paths(layer, names), id(layer): layer.name}


def canonical_paths(layer: keras.Layer) -> dict[int, str]:
    """As `sublayer_paths`, but the same for each model that is built alike.

    Automatic names are replaced by the order of occurrence in the parent: `dense#2` is
    the second Dense. The name of `layer` itself is left out, and that of a parent at the
    start of its sublayers' names, with or without what Keras counts in it: the author of
    `Encoder` can name a sublayer `f"{self.name}_proj"` or `"encoder_proj"`.
    """
    return _tree_paths(layer, _canonical_names)


def _tree_paths(
    layer: keras.Layer,
    names: Callable[[list[keras.Layer], list[keras.Layer]], list[str]],
) -> dict[int, str]:
    """`names` takes the layers from `layer` down to a parent, and the parent's children."""
    paths = {id(layer): ""}

    def walk(holders: list[keras.Layer], prefix: str) -> None:
        children = list(_children(holders[-1]))
        for child, name in zip(children, names(holders, children), strict=True):
            if id(child) not in paths:
                paths[id(child)] = prefix + name
                walk([*holders, child], f"{prefix}{name}/")

    walk([layer], "")
    return paths


def _canonical_names(holders: list[keras.Layer], children: list[keras.Layer]) -> list[str]:
    counts = Counter()
    names = []
    for child in children:
        kind = _automatic_kind(child)
        if kind is not None:
            counts[kind] += 1
            names.append(f"{kind}#{counts[kind]}")
        else:
            parent = _automatic_kind(holders[-1]) or holders[-1].name
            names.append(_without_counts(child.name, holders).removeprefix(f"{parent}_"))
    return names


def _automatic_kind(layer: keras.Layer) -> str | None:
    """An automatic name without what Keras counts in it; None if the name was chosen."""
    kind = _without_count(layer.name)
    # `Bidirectional` puts its own word in front of the automatic name.
    plain = re.sub("^(forward|backward)_", "", kind).replace("_", "")
    is_automatic = plain == type(layer).__name__.replace("_", "").lower()
    return kind if is_automatic else None


def _without_counts(name: str, holders: Iterable[keras.Layer]) -> str:
    """A name that was chosen, without what Keras counts in a holder's name in front.

    A letter or a separator follows there: `encoder_1` can be the first of an author's own.
    """
    for holder in holders:
        kind = _automatic_kind(holder)
        if kind is not None:
            name = re.sub(f"^{re.escape(holder.name)}(?=\\D)", kind, name)
    return name


def _without_count(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def canonical_name(variable: keras.Variable, owner: keras.Layer | None = None) -> str:
    """The variable's name, without what Keras counts in it or in its owner's name."""
    plain = _without_count(variable.name)
    if plain.replace("_", "") == type(variable).__name__.lower():
        return "variable"  # JAX's class has another name
    return _without_counts(variable.name, [] if owner is None else [owner])


def copy_mask(source: Any, target: Any) -> None:
    """Copies the Keras mask, which says which timesteps count, from source to target."""
    if get_keras_mask is not None and set_keras_mask is not None:
        set_keras_mask(target, get_keras_mask(source))


@contextlib.contextmanager
def without_remat(layer: keras.Layer) -> Iterator[None]:
    """Lets a layer of a `RematScope` keep its activations: it is then called once only."""
    mode = getattr(layer, "_remat_mode", None)
    if mode is None:
        yield
        return
    attributes: Any = vars(layer)
    attributes["_remat_mode"] = None
    try:
        yield
    finally:
        attributes["_remat_mode"] = mode


def error_reason(error: Exception) -> str:
    """The message, without the text and the colors that Keras puts around the reason."""
    # The text of a KeyError is a quoted one.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = text.rpartition("Exception encountered: ")[2]  # in loading
    text = re.sub(r"\s*Exception encountered when calling .*\(\)\.\s+", "", text)
    text = text.partition("\n\nArguments received by ")[0].strip()
    if text.startswith("in user code:"):  # TensorFlow quotes it first
        text = text.splitlines()[-1].strip()
    if isinstance(error, LookupError) or not text:
        return f"{type(error).__name__}: {text}".removesuffix(": ")
    return text


def seed_generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """The seed generators that the layer holds itself."""
    held = _attributes(layer, keras.random.SeedGenerator)
    listed = getattr(layer, "_seed_generators", ())
    return _unique([*listed, *held.values()])


def optimizers(layer: keras.Layer) -> list[keras.optimizers.Optimizer]:
    """The optimizers among the attributes of a layer, of its sublayers, of each other."""
    found: list[keras.optimizers.Optimizer] = []
    holders: list[Any] = sublayers(layer)
    for holder in holders:
        for optimizer in _attributes(holder, keras.optimizers.Optimizer).values():
            if all(optimizer is not other for other in found):
                found.append(optimizer)
                holders.append(optimizer)
    return found


def metrics(layer: keras.Layer) -> list[keras.metrics.Metric]:
    """The metrics of a model, compiled ones too, and of all layers in it."""
    own = [
        metric for member in sublayers(layer) for metric in getattr(member, "_metrics", ())
    ]
    return _unique([*layer.metrics, *own])


def may_hold_given_vectors(layer: keras.Layer, variable: keras.Variable) -> bool:
    """Whether an `Embedding` may have got these values as its argument `weights`.

    Keras keeps no trace of the argument, but it makes the layer build itself at once: no
    shape is known then, and no other layer is being built.
    """
    return (
        isinstance(layer, keras.layers.Embedding)
        and variable.path == f"{layer.name}/embeddings"
        and layer.get_build_config() == {"shapes_dict": {}}
    )


def untracked_variables(layer: keras.Layer) -> list[tuple[keras.Layer, keras.Variable]]:
    """Variables that are neither weights, nor of seed generators, metrics or optimizers.

    Each with the layer that holds it: the states of an RNN, say, which Keras leaves out
    of `variables`.
    """
    members = sublayers(layer)
    known = {id(variable) for variable in layer.weights}
    known |= {id(each.state) for member in members for each in seed_generators(member)}
    known |= {id(variable) for each in metrics(layer) for variable in each.variables}
    untracked = []
    for member in members:
        held = _attributes(member, keras.Variable).values()
        rest = layer.variables if member is layer else []
        for variable in [*held, *rest]:
            if id(variable) not in known:
                known.add(id(variable))
                untracked.append((member, variable))
    return untracked


def initial_state(layer: keras.Layer, variable: keras.Variable) -> Any:
    """The value that a state of a recurrent layer starts with; None of anything else."""
    if not isinstance(layer, keras.layers.RNN) or not layer.states:
        return None
    states = keras.tree.flatten(layer.states)
    starts = keras.tree.flatten(layer.get_initial_state(states[0].shape[0]))
    for state, start in zip(states, starts, strict=False):
        if state is variable and tuple(start.shape) == tuple(state.shape):
            return start
    return None


def _attributes(holder: Any, kind: type) -> dict[tuple[Any, ...], Any]:
    """The objects of a kind among the attributes, also in lists and dictionaries there.

    By where they are: the name of the attribute, then keys and indices.
    """
    found, seen = {}, set()

    def walk(value: Any, place: tuple[Any, ...]) -> None:
        if isinstance(value, kind):
            found[place] = value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                walk(item, (*place, key))

    for name, value in vars(holder).items():
        # TensorFlow keeps lists of the same things under names that begin so.
        if name not in _TRACKING and not name.startswith("_self_"):
            walk(value, (name,))
    return found


# Keras's own lists of what stands in other attributes too.
_TRACKING = {"_layers", "_trainable_variables", "_non_trainable_variables", "_variables"}


def _unique(objects: list[Any]) -> list[Any]:
    return list({id(each): each for each in objects}.values())


def downstream_operations(layer: keras.Layer) -> list[keras.Operation]:
    """What takes the layer's outputs where Keras knows the graph, else nothing."""
    return [node.operation for node in getattr(layer, "_outbound_nodes", ())]


class BuildValue:
    """What a layer assigns to a variable in `build`, or makes it of.

    Called as an initializer, it gives what `build` would assign if each weight of the
    layer had been made with its present value.

    Attributes:
        declared: The initializer that the variable was made with before.
        variable: The variable.
        rebuild: What builds a copy of the layer.
    """

    def __init__(self, declared: Any, variable: keras.Variable, rebuild: "_Rebuild"):
        self.declared, self.variable, self.rebuild = declared, variable, rebuild

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        (value,) = build_values([self])
        return value


def build_values(sources: list[BuildValue]) -> list[Any]:
    """The value of each, all from the same weights: build copies each layer once."""
    assigned: dict[int, dict[int, Any]] = {}
    for source in sources:
        if id(source.rebuild) not in assigned:
            assigned[id(source.rebuild)] = source.rebuild.assigned_values()
    return [assigned[id(each.rebuild)][id(each.variable)] for each in sources]


def rebuild_sources(original: keras.Layer) -> tuple[dict[int, Any], Exception | None]:
    """By `id`, what the variables of a layer and of its sublayers are made from.

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
    for copy, children in (
        (_copy_from_attributes, _attribute_children),
        (_copy_beside_built, _attribute_children),
        (_copy_from_config, _tracked_children),
    ):
        try:
            rebuild = _Rebuild(original, copy, children)
            sources = rebuild.sources() | sources
            errors += rebuild.errors
        except Exception as error:  # from a layer of the user: anything
            errors.append(error)
        if all(id(variable) in sources for variable in original.weights):
            return sources, None
    return sources, errors[0] if errors else None


class _Rebuild:
    """Builds copies of a layer in which variables have no values of their own."""

    def __init__(
        self,
        original: keras.Layer,
        copy: "Callable[[keras.Layer, _Replica], tuple[keras.Layer, Callable[[], None]]]",
        children: Callable[[keras.Layer], dict[Any, keras.Layer]],
    ):
        self.original, self.copy, self.children = original, copy, children
        self.created: list[keras.Variable | None] = []
        self.errors: list[Exception] = []

    def sources(self) -> dict[int, Any]:
        """As `rebuild_sources`; notes which variable is made in which turn."""
        scope = _ReplayScope([])
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
        """By `id` of the variable, what `build` assigns if the weights are as now."""
        scope = _ReplayScope(self.created)
        pairs, *_ = backends.outside_traces(self._build, scope)
        values = {id(variable): scope.final_value(copy) for variable, copy in pairs}
        return {key: value for key, value in values.items() if value is not None}

    def _build(self, scope: "_ReplayScope"):
        replica = _Replica(self.original)
        # What the layer warns of, it has said of the original.
        ignored = warnings.catch_warnings(action="ignore")
        with unmoved_generators(), scope, ignored:
            copy, build = self.copy(self.original, replica)
            with scope.values_allowed():
                try:
                    build()
                except Exception as error:  # before it, some variables can be made
                    self.errors = [replica.explain(error)]
        created = list(get_global_attribute("uninitialized_variables") or ())
        new = {id(variable) for variable in (*created, *scope.made_of_values)}
        pairs = []
        for one, other in _layer_pairs(self.original, copy, self.children):
            made = [variable for variable in _own_variables(other) if id(variable) in new]
            pairs += _variable_pairs(_own_variables(one), made)
        return pairs, created, replica


def _as_built(value: Any, shape: Any, dtype: Any = None) -> Any:
    return value


class _ReplayScope(keras.StatelessScope):
    """Notes assignments; lets the n-th variable made read as the n-th one given."""

    def __init__(self, created: list[keras.Variable | None]):
        super().__init__(initialize_variables=False)
        self.created = created
        self.made_of_values: list[keras.Variable] = []

    def final_value(self, variable: keras.Variable) -> Any:
        """What `build` assigns to a variable or makes it of; None if it does neither."""
        assigned = super().get_current_value(variable)
        return variable._value if assigned is None else assigned

    @contextlib.contextmanager
    def values_allowed(self) -> Iterator[None]:
        """Lets a variable be made of a value, which Keras forbids in such a scope.

        This thread is told of each call, and the scope is closed during such a one.
        """
        before = sys.getprofile()
        sys.setprofile(self._note_call)
        try:
            yield
        finally:
            sys.setprofile(before)

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
                # What changes it in place must not reach the original.
                return None if original is None else keras.ops.copy(original._value)
        return None


@functools.cache
def _variable_makers() -> set[Any]:
    """The code that makes a variable, in Keras's class and in the backend's."""
    makers = [vars(kind).get("__init__") for kind in keras.Variable.__mro__]
    codes = [getattr(maker, "__code__", None) for maker in makers]
    return {code for code in codes if code and "initializer" in code.co_varnames}


def _copy_from_config(original: keras.Layer, replica: "_Replica"):
    replica.check()
    config = replica.of(original.get_config())
    if any(isinstance(part, keras.Variable) for part in keras.tree.flatten(config)):
        # `build` has put it where an argument was.
        raise ValueError(f"The config of {original.name} holds a variable.")
    parameters = inspect.signature(type(original).__init__).parameters.values()
    if all(each.kind is not each.VAR_KEYWORD for each in parameters):
        # Keras puts these into every config, whether the layer takes them or not.
        accepted = {each.name for each in parameters}
        for name in {"name", "trainable", "dtype"} - accepted:
            config.pop(name, None)
    replica.check()
    copy = type(original).from_config(config)
    return copy, functools.partial(_build_like, copy, original, replica)


def _build_like(copy: keras.Layer, original: keras.Layer, replica: "_Replica") -> None:
    if _has_build(original) and original.get_build_config():
        copy.build_from_config(replica.of(original.get_build_config()))


def _has_build(layer: keras.Layer) -> bool:
    return type(layer).build not in (keras.Layer.build, keras.Model.build)


def may_assign(layer: keras.Layer) -> bool:
    """Whether making it runs code that is not Keras's, other than of its sublayers.

    Keras's own layers assign nothing in `build`.
    """
    is_foreign = not type(layer).__module__.startswith("keras.")
    has_build = not type(layer).build.__module__.startswith("keras.")
    return is_foreign and (has_build or bool(_own_variables(layer)))


def _copy_from_attributes(original: keras.Layer, replica: "_Replica"):
    if not _has_build(original) or not original.get_build_config():
        raise NotImplementedError(f"{original.name} has no config and no `build`.")
    replica.check()
    copy = replica.of(original)
    replica.check()
    return copy, functools.partial(_build_like, copy, original, replica)


def _copy_beside_built(original: keras.Layer, replica: "_Replica"):
    """The layers in it keep their weights: it can tie its own to them."""
    replica.keeps_built = True
    return _copy_from_attributes(original, replica)


class _Replica:
    """Copies a layer as it was before `build`, with the objects in it.

    That is, without its variables: what `build` reads must not be what it made. No object
    that can change is shared. An attribute that can't be copied is left out.
    """

    def __init__(self, original: keras.Layer):
        self.original = original
        self.keeps_built = False
        self.copies: dict[int, tuple[Any, Any]] = {}  # with the original: `id`s come again
        members = sublayers(original)
        self.left_out = {id(each) for layer in members for each in _own_variables(layer)}
        self.code: list[tuple[str, Any]] = [(type(m).__name__, type(m)) for m in members]
        self.failed: list[str] = []
        self.stand_ins: list[tuple[keras.Variable, keras.Variable]] = []
        self.reach = Reach()

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
            copy = self._copy(value)
            self.copies[id(value)] = value, copy
        return self.copies[id(value)][1]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, keras.Layer):
            return self._copy_layer(value)
        if isinstance(value, keras.Variable):
            return self._stand_in(value)
        if isinstance(value, dict | list | set) and _is_plain(value):
            return self._copy_container(value)
        if type(value) is tuple:
            return tuple(self.of(item) for _, item in self._kept(enumerate(value)))
        if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
            return _copy_array(value)
        if _is_of_keras(value) or is_immutable(value):
            return value
        if isinstance(value, types.FunctionType | type | types.ModuleType):
            self.reach.holds_classes |= _is_users_class(value)
            return self._checked(value)
        self._checked(type(value))
        return copy_object(
            value, self.of, lambda item: id(item) in self.left_out, self._register(value)
        )

    def _checked(self, code: Any) -> Any:
        """Code stays as it is; by itself first: what it reaches can go, the layer stay."""
        if not any(code is checked for _, checked in self.code):
            named = (getattr(code, "__name__", "code"), code)
            Reach().add([named])
            self.code.append(named)
        return code

    def _register(self, value: Any) -> Callable[[Any], None]:
        def register(copy: Any) -> None:
            self.copies[id(value)] = value, copy

        return register

    def _stand_in(self, variable: keras.Variable) -> keras.Variable:
        """A variable that reads like another one, and can't change it."""
        copy = keras.Variable(
            "zeros", tuple(variable.shape), variable.dtype, name=variable.name
        )
        self.stand_ins.append((variable, copy))
        return copy

    def _copy_container(self, value: Any) -> Any:
        kind = next(each for each in (dict, list, set) if isinstance(value, each))
        copy: Any = kind()
        self._register(value)(copy)  # before its items: one of them can hold it
        is_dict = isinstance(value, dict)
        for key, item in self._kept(value.items() if is_dict else enumerate(value)):
            if is_dict:
                copy[self.of(key)] = self.of(item)
            else:
                (copy.add if kind is set else copy.append)(self.of(item))
        return copy

    def _kept(self, items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        return [(key, item) for key, item in items if id(item) not in self.left_out]

    def _copy_layer(self, layer: keras.Layer) -> keras.Layer:
        self._checked(type(layer))
        copy: Any = type(layer).__new__(type(layer))
        self._register(layer)(copy)
        is_built = self.keeps_built and layer is not self.original
        own = {id(variable) for variable in _own_variables(layer)}
        if is_built:
            self.left_out -= own
        else:
            self.left_out |= own
        # PyTorch's list of parameters would take in those of the copy.
        parameters = vars(layer).get("_modules", {}).get("_torch_params")
        self.left_out |= {id(parameters)} - {id(None)}
        # What is made before `__init__`: `build`, and the lists of what Keras tracks.
        fresh = set(vars(copy)) - {"_lock"}
        for name, value in self._kept(vars(layer).items()):
            if name not in fresh and not name.startswith("_self_"):  # TensorFlow's lists
                try:
                    vars(copy)[name] = self.of(value)
                except Exception:  # from an object of the user: anything
                    self.copies.pop(id(value), None)
                    self.failed.append(name)
        vars(copy)["built"] = is_built
        return copy


def _copy_array(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == object:
        raise NotIsolatedError("an array of objects can't be copied")
    if isinstance(value, np.ndarray):
        return value.copy()
    return value if backends.is_symbolic(value) else keras.ops.copy(value)


def _is_plain(container: Any) -> bool:
    """Whether it is Python's own, or one in its place that tracks what is put into it."""
    root = type(container).__module__.partition(".")[0]
    return root in ("builtins", "keras", "tensorflow", "wrapt")


def _is_users_class(value: Any) -> bool:
    return isinstance(value, type) and not is_library(value.__module__)


def _is_of_keras(value: Any) -> bool:
    return type(value).__module__.startswith("keras.")


def _tracked_children(layer: keras.Layer) -> dict[Any, keras.Layer]:
    return dict(enumerate(_children(layer)))


def _attribute_children(layer: keras.Layer) -> dict[Any, keras.Layer]:
    return _attributes(layer, keras.Layer)


def _layer_pairs(
    original: keras.Layer,
    copy: keras.Layer,
    children: Callable[[keras.Layer], dict[Any, keras.Layer]],
) -> list[tuple[keras.Layer, keras.Layer]]:
    """The layer and its sublayers, each with its counterpart in a copy."""
    pairs, seen = [(original, copy)], {id(original)}
    for one, other in pairs:
        others = children(other)
        for place, child in children(one).items():
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
        counterparts.setdefault(_signature(copy), []).append(copy)
    pairs = []
    for variable in originals:
        if waiting := counterparts.get(_signature(variable)):
            pairs.append((variable, waiting.pop(0)))
    return pairs


def _signature(variable: keras.Variable) -> tuple[Any, ...]:
    # An automatic name ends in a number, counted anew.
    return _without_count(variable.name), tuple(variable.shape), variable.dtype


def optimizer_values(
    original: keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, Callable[[], Any]]]:
    """The state of an optimizer, without its learning rate and without inner optimizers.

    Each variable comes with what makes its first value, from the weights as they are now.
    """
    state = _optimizer_state(original)
    if all(variable is original._iterations for variable in state):
        return [(variable, lambda: 0) for variable in state]
    try:
        scope = keras.StatelessScope(initialize_variables=False)
        rebuilt = backends.outside_traces(_rebuild_optimizer, original, scope)
    except Exception:  # some make variables of values, which needs a real copy
        scope = None
        rebuilt = backends.outside_traces(
            _rebuild_optimizer, original, contextlib.nullcontext()
        )
    copies = _optimizer_state(rebuilt)
    if list(map(_signature, state)) != list(map(_signature, copies)):
        raise ValueError(f"a copy of {original.name} has other variables")
    return [
        (variable, functools.partial(_first_value, copy, scope))
        for variable, copy in zip(state, copies, strict=True)
    ]


def _first_value(copy: keras.Variable, scope: keras.StatelessScope | None) -> Any:
    assigned = None if scope is None else scope.get_current_value(copy)
    return copy.value if assigned is None else assigned


def _rebuild_optimizer(original: Any, scope: Any) -> Any:
    with unmoved_generators():
        copy = type(original).from_config(original.get_config())
        # A LossScaleOptimizer does not always keep its own list.
        source = getattr(original, "inner_optimizer", original)
        with scope:
            copy.build(source._trainable_variables)
    return copy


def _optimizer_state(optimizer: Any) -> list[keras.Variable]:
    """Its own variables, also those that Keras does not list, as of Nadam."""
    inner = _attributes(optimizer, keras.optimizers.Optimizer).values()
    foreign = {id(variable) for each in inner for variable in each.variables}
    foreign |= {id(variable) for variable in optimizer._trainable_variables}
    foreign.add(id(optimizer._learning_rate))
    held = _attributes(optimizer, keras.Variable).values()
    return [
        variable
        for variable in _unique([*held, *optimizer._variables])
        if id(variable) not in foreign
    ]


# By optimizer, the learning rate that it had when it was seen before its first step.
_first_rates: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


def used_learning_rates(
    layer: keras.Layer,
) -> list[tuple[keras.optimizers.Optimizer, keras.Variable, float | None]]:
    """The learning rate of each optimizer that has made steps, with its first value.

    An optimizer does not keep that value: it is None if no call saw the optimizer before
    its first step.
    """
    found = []
    for optimizer in optimizers(layer):
        rate: Any = getattr(optimizer, "_learning_rate", None)
        if not isinstance(rate, keras.Variable):
            continue  # a schedule, which follows the steps
        if _attributes(optimizer, keras.optimizers.Optimizer):
            continue  # the inner ones have it
        if backends.to_array(optimizer.iterations).any():
            found.append((optimizer, rate, _first_rates.get(optimizer)))
        else:
            _first_rates[optimizer] = float(backends.to_array(rate))
    return found
