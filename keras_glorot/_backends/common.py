"""The package's questions to a backend, as any backend of Keras can answer them.

`__all__` has the names that a file of one backend may have, too.
"""

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import keras
import numpy as np

from keras_glorot._backends.signals import Differentiator, Run, to_numpy
from keras_glorot._backends.traced import Program
from keras_glorot._backends.values import Values
from keras_glorot._drawing.stream import Bounds

__all__ = [
    "assign",
    "check_same",
    "current_trace",
    "differentiator",
    "held_value",
    "is_symbolic",
    "is_tracing",
    "new_value",
    "numpy",
    "outside_traces",
    "process_count",
    "program",
    "python_function",
    "readable",
    "shares_new_variables",
    "symbols_beside_values",
    "to_sharded_tensor",
    "to_tensor",
    "unmoved_generators",
    "untouched",
    "values",
    "without_compilation",
    "writable",
]

_Scope = contextlib.AbstractContextManager[Any]
_Result = TypeVar("_Result")

program = Program()  # draws in the program that the backend makes
numpy: Any = np  # computes with `readable` values


def to_tensor(array: np.ndarray) -> Any:
    """Hands an array over to the backend, with as few copies as it allows.

    The tensor may go on living in the array's memory, which must be aligned to 64 bytes
    and which the caller must not touch again.
    """
    return keras.ops.convert_to_tensor(array)


def to_sharded_tensor(
    shape: tuple[int, ...], layout: Any, draw_region: Callable[[Bounds], np.ndarray]
) -> Any:
    """Assembles a tensor from the regions that its devices hold, each drawn once.

    Args:
        shape: The whole tensor's shape.
        layout: A `keras.distribution.TensorLayout` or a `jax.sharding.Sharding`.
        draw_region: Called with a start and a stop for each axis.
    """
    return program.spread(None, layout)


def values(variable: keras.Variable) -> Values:
    """The values of a variable, read part by part: nothing of them stays on the host."""
    return Values.of(held_value(variable))


def held_value(variable: keras.Variable) -> Any:
    """The present value, to be read only: later assignments do not change it."""
    return np.asarray(keras.ops.convert_to_tensor(variable))


def new_value(variable: keras.Variable, draw_region: Callable[[Bounds], np.ndarray]) -> Any:
    """A value for a variable, spread as it is: devices draw their own parts."""
    return draw_region(tuple((0, size) for size in variable.shape))


def assign(variable: keras.Variable, value: Any) -> None:
    """Gives a variable a value, a NumPy array or a tensor, on the device that it has."""
    variable.assign(value)


def writable(variables: Iterable[keras.Variable]) -> _Scope:
    """Where they can be assigned."""
    return contextlib.nullcontext()


def process_count() -> int:
    """How many processes run this program together."""
    return 1


def shares_new_variables() -> bool:
    """Whether a new variable gets the same value in all processes, whatever they draw."""
    return False


def check_same(variable: keras.Variable, value: Any) -> None:
    """Raises an error if a variable that spans processes gets another value in each."""


def is_tracing() -> bool:
    """Whether the backend makes a program here, in which an array would be a constant."""
    return False


def is_symbolic(tensor: Any) -> bool:
    """Whether a tensor has no value yet, because the backend is tracing."""
    return False


def current_trace() -> Any:
    """A mark that stays equal until the backend enters another trace, or leaves this one.

    A traced loop, a vectorized function, a derivative on JAX, a compiled program and a call
    that is made again on the way back (remat) are traces of their own. Without the private
    names in it fewer traces are told apart.
    """
    return None


def outside_traces(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls a function where no trace, device scope or scope of Keras is open.

    All of these are open in one thread only, and the call is made in another one. Where no
    thread can be had, it is made in this one.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            call = pool.submit(function, *arguments)
        except RuntimeError:  # no more threads, or the interpreter is shutting down
            call = None
    return function(*arguments) if call is None else call.result()


def untouched(function: Callable) -> Callable:
    """Keeps AutoGraph and Dynamo from rewriting a function when they trace its caller.

    In a program of `torch.compile` the function is called as it is, between two graphs.
    """
    return function


def without_compilation() -> _Scope:
    """Where `torch.compile` leaves Python functions as they are."""
    return contextlib.nullcontext()


def python_function(value: Any) -> Callable | None:
    """The function of Python in one of `tf.function` or `jax.jit`; None for all else."""
    return None


def differentiator(run: Run) -> Differentiator:
    """Runs and differentiates `run`; on JAX compiled once for all calls.

    `run(tap, *arguments)` is a context that gives the objective and extras. Eager backends
    differentiate in the context: there they may call layers again.

    Returns:
        A function of the arguments, which fills the signals of all taps and returns the
        extras as arrays.
    """
    raise RuntimeError("Gradients need KERAS_BACKEND to be tensorflow, jax or torch.")


def readable(tensor: Any) -> Any:
    """The values of a tensor in a pass, apart from its gradient, for use with `numpy`."""
    return to_numpy(tensor)


def unmoved_generators() -> _Scope:
    """Puts back the backend's global generators of random numbers."""
    return contextlib.nullcontext()


def symbols_beside_values() -> _Scope:
    """Where `value + symbol` is a symbol, as `symbol + value` is. One thread at a time."""
    return contextlib.nullcontext()
