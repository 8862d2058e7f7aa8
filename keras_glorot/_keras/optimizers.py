"""The first state and the first learning rates of optimizers."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras

from keras_glorot import _backends as backends
from keras_glorot._keras.state import unmoved_generators
from keras_glorot._keras.tree import attributes, signature, unique

__all__ = ["optimizer_values", "used_learning_rates"]


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
    if list(map(signature, state)) != list(map(signature, copies)):
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
    inner = attributes(optimizer, keras.optimizers.Optimizer).values()
    foreign = {id(variable) for each in inner for variable in each.variables}
    foreign |= {id(variable) for variable in optimizer._trainable_variables}
    foreign.add(id(optimizer._learning_rate))
    held = attributes(optimizer, keras.Variable).values()
    return [
        variable
        for variable in unique([*held, *optimizer._variables])
        if id(variable) not in foreign
    ]


# By optimizer, the learning rate that it had when it was seen before its first step.
_first_rates: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


def used_learning_rates(
    optimizers: list[keras.optimizers.Optimizer],
) -> list[tuple[keras.optimizers.Optimizer, keras.Variable, float | None]]:
    """The learning rate of each optimizer that has made steps, with its first value.

    An optimizer does not keep that value: it is None if no call saw the optimizer before
    its first step.
    """
    found = []
    for optimizer in optimizers:
        rate: Any = getattr(optimizer, "_learning_rate", None)
        if not isinstance(rate, keras.Variable):
            continue  # a schedule, which follows the steps
        if attributes(optimizer, keras.optimizers.Optimizer):
            continue  # the inner ones have it
        # With accumulated gradients they are no variable.
        steps: Any = keras.ops.convert_to_numpy(optimizer.iterations)
        if steps.any():
            found.append((optimizer, rate, _first_rates.get(optimizer)))
        else:
            _first_rates[optimizer] = float(backends.held_value(rate))
    return found
