"""The only place that touches what Keras does not export.

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
    "Target",
    "blueprint",
    "consumers",
    "copy_mask",
    "current_target",
    "custom_objects_in_scope",
    "is_shape_inference",
    "owned_variables",
    "seed_generators",
    "seed_words",
    "sublayers",
]


class Target(NamedTuple):
    """What an initializer is called for: None is what can't be known.

    The variable is known when Keras fills it late, not while it is being created.
    """

    layer: keras.Layer | None = None
    variable: keras.Variable | None = None


def current_target(initializer: keras.initializers.Initializer) -> Target:
    """Finds out for what Keras is calling this initializer."""
    if not _is_keras_as_expected():
        return Target()
    scopes = get_global_attribute("name_scope_stack") or ()
    callers = [scope.caller for scope in scopes if scope.caller is not None]
    outermost = next((c for c in callers if isinstance(c, keras.Layer)), None)
    if get_global_attribute("stateless_scope") is not None:
        if outermost is not None:
            _late.roots[id(outermost)] = outermost
    elif (variable := _late_variable(initializer)) is not None:
        layer = _late.owner(variable, outermost)
        if layer is not None:
            return Target(layer, variable)
    # Metrics and optimizers open scopes too; their variables belong to no layer.
    is_layer = bool(callers) and isinstance(callers[-1], keras.Layer)
    return Target(callers[-1] if is_layer else None)


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


class _Late(threading.local):
    """What symbolic calls in this thread saw of models that are built late."""

    def __init__(self) -> None:
        # Keyed by `id`: layers and variables need not be hashable. Weak, so that no
        # model is kept alive; ids are used again, so a hit is checked before use.
        self.roots = weakref.WeakValueDictionary()
        self.owners: dict[int, tuple[weakref.ref, weakref.ref]] = {}

    def owner(self, variable: keras.Variable, outermost: keras.Layer | None):
        """The layer that made `variable`, if it is the one being filled, else None."""
        if self._look_up(variable) is None:
            roots = [*self.roots.values(), *([] if outermost is None else [outermost])]
            self.roots.clear()
            self.owners = {
                id(owned): (weakref.ref(layer), weakref.ref(root))
                for root in roots
                for layer, owned in owned_variables(root)
                if layer is not None
            }
        layer, root = self._look_up(variable) or (None, None)
        # Keras fills variables with no scope open, or in that of the model they are in.
        # Inside another layer it draws a weight of that one, and this one was left over.
        return layer if outermost is None or outermost is root else None

    def _look_up(self, variable: keras.Variable):
        layer, root = (reference() for reference in self.owners.get(id(variable), _NOTHING))
        # `in` would compare the values of variables.
        if layer is not None and any(own is variable for own in _own_variables(layer)):
            return layer, root
        return None


_NOTHING = (lambda: None, lambda: None)
_late = _Late()


def _late_variable(
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


def copy_mask(source: Any, target: Any) -> None:
    """Marks a tensor as another one is marked: which of its timesteps count."""
    with contextlib.suppress(ImportError):
        from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

        set_keras_mask(target, get_keras_mask(source))


def seed_generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """The seed generators that the layer holds itself."""
    return list(layer._seed_generators)


def consumers(layer: keras.Layer) -> list[keras.Operation]:
    """What takes the layer's outputs where Keras knows the graph, else nothing."""
    return [node.operation for node in layer._outbound_nodes]


def blueprint(original: Any) -> list[tuple[keras.Variable, Any]]:
    """Each variable of a layer or an optimizer with what it would be made from anew.

    That is an initializer, or a tensor where there was none. A copy is built in a scope in
    which variables get no values, and in a thread of its own: the names that Keras counts
    and the variables that it has yet to fill are one set per thread.
    """

    def build_layer() -> Any:
        with keras.StatelessScope(initialize_variables=False):
            copy = type(original).from_config(original.get_config())
            if original.get_build_config():
                copy.build_from_config(original.get_build_config())
        return copy

    def build_optimizer() -> Any:
        copy = type(original).from_config(original.get_config())
        with keras.StatelessScope(initialize_variables=False):
            # A LossScaleOptimizer does not always keep its own list.
            of = getattr(original, "inner_optimizer", original)
            copy.build(of._trainable_variables)
        return copy

    is_layer = isinstance(original, keras.Layer)
    with ThreadPoolExecutor(1) as pool:
        copy = pool.submit(build_layer if is_layer else build_optimizer).result()
    old, new = (
        _own_variables(each) if is_layer else each.variables for each in (original, copy)
    )
    pairs = list(zip(old, new, strict=True))
    # An automatic name ends in a number, counted anew.
    if any(
        re.sub(r"_\d+$", "", mine.name) != re.sub(r"_\d+$", "", its.name)
        or mine.shape != its.shape
        for mine, its in pairs
    ):
        raise ValueError(f"A copy of {original.name} has other variables.")
    return [
        (mine, its._initializer if its._value is None else its._value)
        for mine, its in pairs
    ]
