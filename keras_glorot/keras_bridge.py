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
import re
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import backends

try:
    from keras.src.backend.common.global_state import get_global_attribute
except ImportError:  # `_is_keras_as_expected` notices and warns

    def get_global_attribute(name, default=None, set_to_default=False) -> Any:
        return None


__all__ = [
    "CallSite",
    "copy_mask",
    "current_call_site",
    "custom_objects_in_scope",
    "downstream_operations",
    "is_shape_inference",
    "owned_variables",
    "rebuild_sources",
    "seed_generators",
    "seed_words",
    "sublayer_paths",
    "sublayers",
    "without_colors",
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
    if not _is_keras_as_expected():
        return CallSite()
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
    owners: dict[int, keras.Layer] = {}
    for holder in layer._flatten_layers():
        for variable in _own_variables(holder):
            # Wrappers and tied layers hold the variables of others. The path tells
            # who made one; else the innermost holder did, and that one comes last.
            owner = owners.get(id(variable))
            if owner is None or variable.path != f"{owner.path}/{variable.name}":
                owners[id(variable)] = holder
    return [(owners.get(id(variable)), variable) for variable in layer.weights]


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
                for layer, owned in owned_variables(model)
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


def _deferred_variable(
    initializer: keras.initializers.Initializer,
) -> keras.Variable | None:
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
    return [*layer._trainable_variables, *layer._non_trainable_variables]


@functools.cache
def _is_keras_as_expected() -> bool:
    """Tries, once, the names that this module takes from inside Keras."""
    caller = object()
    try:
        with keras.name_scope("keras_glorot_probe", caller=caller):
            as_expected = get_global_attribute("name_scope_stack")[-1].caller is caller
        layer = keras.layers.Identity(name="keras_glorot_probe")
        _own_variables(layer)
        layer._flatten_layers()
        as_expected = as_expected and hasattr(keras.Variable, "_deferred_initialize")
    except (AttributeError, IndexError, TypeError):
        as_expected = False
    if not as_expected:
        warnings.warn(
            f"keras_glorot can't tell in Keras {keras.__version__} which layer a "
            "weight belongs to, so it takes fan_in and fan_out from the weight's shape "
            "alone. That is wrong for depthwise, grouped, transposed and einsum "
            "kernels: give those `input_axes` and `output_axes`, or install a Keras "
            "version that this version of keras_glorot was tested with.",
            stacklevel=2,
        )
    return as_expected


def custom_objects_in_scope() -> dict[str, Any]:
    """The objects of the innermost `custom_object_scope`, which a new one would hide."""
    return get_global_attribute("custom_objects_scope_dict") or {}


def seed_words(seed: "int | keras.random.SeedGenerator") -> tuple[int, ...] | None:
    """The numbers that a seed stands for; a `SeedGenerator` advances.

    None where a generator's state is only a symbol, because the backend is tracing.
    """
    if isinstance(seed, int):
        return (seed,)
    state = seed.next()
    if backends.is_symbolic(state):
        return None
    return tuple(np.asarray(keras.ops.convert_to_numpy(state)).tolist())


def is_shape_inference() -> bool:
    """Whether Keras runs here for shapes alone, so that no value is looked at.

    A weight that is still to be filled is then asked of its initializer at every use.
    """
    is_meta = get_global_attribute("torch_device") == "meta"
    return is_meta or get_global_attribute("symbolic_scope") is not None


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer itself and all layers in it, at any depth, each once."""
    return list(layer._flatten_layers())


def sublayer_paths(layer: keras.Layer) -> dict[int, str]:
    """By `id`, the path of each sublayer: the names from below `layer` down to it.

    `layer` itself goes by its name. A layer with several parents has the path of the first.
    Unlike Keras's own `path`, this does not depend on how and when a layer was built.
    """
    paths = {id(layer): layer.name}

    def walk(parent: keras.Layer, prefix: str) -> None:
        for child in parent._layers:
            if id(child) not in paths:
                paths[id(child)] = prefix + child.name
                walk(child, f"{prefix}{child.name}/")

    walk(layer, "")
    return paths


def copy_mask(source: Any, target: Any) -> None:
    """Copies the Keras mask, which says which timesteps count, from source to target."""
    with contextlib.suppress(ImportError):
        from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

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


def without_colors(message: str) -> str:
    """A message of Keras without the codes that print it bold."""
    return re.sub(r"\x1b\[[0-9;]*m", "", message)


def seed_generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """The seed generators that the layer holds itself."""
    return list(layer._seed_generators)


def downstream_operations(layer: keras.Layer) -> list[keras.Operation]:
    """What takes the layer's outputs where Keras knows the graph, else nothing."""
    return [node.operation for node in layer._outbound_nodes]


def rebuild_sources(
    original: keras.Layer | keras.optimizers.Optimizer,
) -> list[tuple[keras.Variable, Any]]:
    """Each variable of a layer or an optimizer, and what a rebuilt one is made from.

    That is an initializer, or a tensor where there was none. The copy is built in a scope
    in which variables get no values, and in a thread of its own: the names that Keras
    counts and the variables that it has yet to fill are one set per thread.
    """
    is_layer = isinstance(original, keras.Layer)
    with ThreadPoolExecutor(1) as pool:
        copy_source = _rebuild_layer if is_layer else _rebuild_optimizer
        rebuilt = pool.submit(copy_source, original).result()
    if is_layer:
        pairs = zip(_own_variables(original), _own_variables(rebuilt), strict=True)
    else:
        pairs = zip(original.variables, rebuilt.variables, strict=True)
    sources = []
    for variable, copy in pairs:
        if not _is_same_variable(variable, copy):
            raise ValueError(f"A copy of {original.name} has other variables.")
        source = copy._initializer if copy._value is None else copy._value
        sources.append((variable, source))
    return sources


def _rebuild_layer(original: keras.Layer) -> keras.Layer:
    with keras.StatelessScope(initialize_variables=False):
        copy = type(original).from_config(original.get_config())
        if original.get_build_config():
            copy.build_from_config(original.get_build_config())
    return copy


def _rebuild_optimizer(original: Any) -> Any:
    copy = type(original).from_config(original.get_config())
    with keras.StatelessScope(initialize_variables=False):
        # A LossScaleOptimizer does not always keep its own list.
        source = getattr(original, "inner_optimizer", original)
        copy.build(source._trainable_variables)
    return copy


def _is_same_variable(original: keras.Variable, rebuilt: keras.Variable) -> bool:
    # An automatic name ends in a number, counted anew.
    names = [re.sub(r"_\d+$", "", variable.name) for variable in (original, rebuilt)]
    return names[0] == names[1] and original.shape == rebuilt.shape
