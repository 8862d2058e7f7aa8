"""Taps of differentiators: they look at tensors on their way, and at their gradients."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np

__all__ = [
    "Differentiator",
    "EagerSignals",
    "Outcome",
    "Run",
    "Signal",
    "Summary",
    "Tap",
    "Tensor",
    "is_float",
    "to_numpy",
]

Tensor = Any
Summary = Callable[[np.ndarray], Any]


@dataclasses.dataclass
class Signal:
    """Summaries of one tensor's values and of its gradient, there after the pass."""

    value: Any = None
    gradient: Any = None


class Tap(Protocol):
    """Hands a tensor on, with the signal that its summaries will be in."""

    def __call__(
        self, tensor: Tensor, of_value: Summary | None, of_gradient: Summary
    ) -> tuple[Tensor, Signal]: ...


Outcome = tuple[Tensor, list[Tensor]]  # the objective and extras
Run = Callable[..., contextlib.AbstractContextManager[Outcome]]  # of a tap and arguments
Differentiator = Callable[..., list[np.ndarray]]  # of the arguments: the extras


class EagerSignals:
    """Summarizes values as they come, and gradients as they come back."""

    def __init__(self) -> None:
        self.taps: list[tuple[Signal, tuple[int, ...], Summary]] = []
        self.is_called = False  # before, gradients are those of derivatives in the model

    def see(
        self, tensor: Tensor, of_value: Summary | None, of_gradient: Summary
    ) -> tuple[Signal, Callable[[Tensor], None]]:
        """The signal, and the function to call with the gradient."""
        signal = Signal(of_value and of_value(to_numpy(tensor)))
        self.taps.append((signal, tuple(tensor.shape), of_gradient))

        def see_gradient(gradient: Tensor) -> None:
            if self.is_called:
                signal.gradient = of_gradient(to_numpy(gradient))

        return signal, see_gradient

    def finish(self) -> None:
        """Where the objective does not depend on a tensor, its gradient is zero."""
        for signal, shape, of_gradient in self.taps:
            if signal.gradient is None:
                signal.gradient = of_gradient(np.zeros(shape, np.float32))


def is_float(value: Any) -> bool:
    is_tensor = keras.ops.is_tensor(value)
    return is_tensor and "float" in keras.backend.standardize_dtype(value.dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The values as float32, or as they are if they are doubles."""
    values = np.asarray(keras.ops.convert_to_numpy(tensor))
    return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)
