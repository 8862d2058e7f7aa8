"""Whose weight is being drawn.

Keras hands an initializer a shape and a dtype, and not the layer that asks. It does know:
each open name scope remembers its caller.

A model without a `build` method makes its weights later, when those scopes are closed:
Keras calls the model symbolically, lists the variables that this creates, and fills
them in order afterwards. Such a variable is looked up in the model that the symbolic
call was seen in.
"""

import functools
import threading
import warnings
import weakref
from bisect import bisect_left
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._drawing.stream import state_words
from keras_glorot._keras.calls import get_keras_mask, set_keras_mask
from keras_glorot._keras.state import get_global_attribute
from keras_glorot._keras.tree import Tree, downstream_operations, own_variables

try:
    from keras.src.initializers import ALL_OBJECTS_DICT
except ImportError:
    ALL_OBJECTS_DICT: dict[str, Any] = {}  # where Keras finds nothing


__all__ = [
    "CallSite",
    "current_call_site",
    "initializer_tables",
    "owned_weights",
    "seed_words",
]


class CallSite(NamedTuple):
    """The layer and the variable that an initializer is called for; None if not known.

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


def owned_weights(
    tree: Tree,
) -> list[tuple[keras.Layer | None, keras.Variable]]:
    """Each weight with the layer that made it; None in its place if Keras does not tell."""
    if not _is_keras_as_expected():
        return [(None, variable) for variable in tree.root.weights]
    return tree.owned_weights


class _Deferred(threading.local):
    """Models that are built late, as symbolic calls in this thread saw them."""

    def __init__(self) -> None:
        # By `id`: layers and variables need not be hashable. Weak, so that no model is
        # kept alive; ids are used again, so a hit is checked before use.
        self.seen_models = weakref.WeakValueDictionary()
        self.owners = weakref.WeakValueDictionary()  # of variables
        self.models = weakref.WeakValueDictionary()  # that variables are in

    def owner(self, variable: keras.Variable, outermost: keras.Layer | None):
        """The layer that made `variable`, if it is the one being filled, else None."""
        if not self._is_known(variable):
            models = [*self.seen_models.values()]
            self._learn(models if outermost is None else [*models, outermost])
        # Keras fills variables with no scope open, or in that of the model they are in.
        # Inside another layer it draws a weight of that one, and this one was left over.
        is_filled = outermost is None or outermost is self.models.get(id(variable))
        return self.owners[id(variable)] if is_filled and self._is_known(variable) else None

    def _is_known(self, variable: keras.Variable) -> bool:
        layer = self.owners.get(id(variable))
        # `in` would compare the values of variables.
        return layer is not None and any(own is variable for own in own_variables(layer))

    def _learn(self, models: list[keras.Layer]) -> None:
        for table in (self.seen_models, self.owners, self.models):
            table.clear()
        for model in models:
            for layer, owned in Tree(model).owned_weights:
                if layer is not None:
                    self.owners[id(owned)], self.models[id(owned)] = layer, model


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
            "version that this version of keras_glorot was tested with. Tables "
            "of whole models are not complete either.",
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
        options: Any = {"kernel_initializer": initializer, "dtype": "float32"}
        inner = keras.layers.Dense(1, use_bias=False, name="probe_inner", **options)
        # With a seed: to make one up would advance the user's `random`.
        dropout = keras.layers.Dropout(0.5, seed=0, dtype="float32", name="probe_dropout")
        # Has no `build`, so that Keras makes the weights of its sublayers late.
        model = keras.layers.Pipeline([inner, dropout], name="probe")
        # All of one dtype, whatever floatx is: a cast would come between them.
        entry = keras.layers.InputLayer(
            batch_shape=(1, 1), dtype="float32", name="probe_input"
        )
        model(entry.output)
        kernel = inner.weights[0]
        tree = Tree(model)
        found = (
            # The symbolic call asks first, if at all.
            all(site is not None and site.layer is inner for site in sites),
            sites[-1] == CallSite(inner, kernel),
            tree.owned_weights == [(inner, kernel)],
            own_variables(inner) == [kernel],
            set(map(id, tree.layers)) == set(map(id, (model, inner, dropout))),
            downstream_operations(entry) == [model],
            get_keras_mask is not None and set_keras_mask is not None,
        )
    except Exception:  # whatever a change inside Keras brings about
        return False
    return all(found)


@functools.cache
def initializer_tables() -> list[dict[str, Any]]:
    """Where Keras looks for an initializer by name. Empty if that can't be found out.

    For configs it looks first among the registered objects. There it looks for strings
    too, up to Keras 3.15; from then on in a table of its own alone.
    """
    tables = [keras.saving.get_custom_objects(), ALL_OBJECTS_DICT]
    if _are_searched(tables):
        return tables
    warnings.warn(
        f"keras_glorot can't tell Keras {keras.__version__} what its strings such as "
        '"xavier_uniform" stand for, and `as_default` does not work. Write '
        "`GlorotUniform()` and `GlorotNormal()` in their place, or install a Keras version "
        "that this version of keras_glorot was tested with.",
        stacklevel=2,
    )
    return []


def _are_searched(tables: list[dict[str, Any]]) -> bool:
    """Tries if Keras takes an initializer from these, even in place of its own."""
    name = "STFTInitializer"  # of Keras's own names one that hardly anyone uses
    before = [{key: table[key] for key in table.keys() & {name}} for table in tables]
    try:
        for table in tables:
            table[name] = _probe_initializer
        return keras.initializers.get(name) is _probe_initializer
    except Exception:  # whatever a change inside Keras brings about
        return False
    finally:
        for table, own in zip(tables, before, strict=True):
            del table[name]
            table.update(own)


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
