"""Arguments and results of differentiators, which tap tensors on their way and back."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

__all__ = [
    "Differentiator",
    "EagerSignals",
    "Outcome",
    "Results",
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


class Signal(NamedTuple):
    """Summaries of one tensor's values and of its gradient."""

    value: Any
    gradient: Any


class Tap(Protocol):
    """Hands a tensor on; its summaries are in the result at the position returned."""

    def __call__(
        self, tensor: Tensor, of_value: Summary | None, of_gradient: Summary
    ) -> tuple[Tensor, int]: ...


Outcome = tuple[Tensor, list[Tensor]]  # the objective and extras
Run = Callable[..., contextlib.AbstractContextManager[Outcome]]  # of a tap and arguments
Results = tuple[list[Signal], list[np.ndarray]]  # all taps, and the extras
Differentiator = Callable[..., Results]  # of the arguments


class EagerSignals:
    """Summarizes values as they come, and gradients as they come back."""

    def __init__(self) -> None:
        self.taps: list[tuple[Any, tuple[int, ...], Summary]] = []
        self.gradients: dict[int, Any] = {}
        self.is_called = False  # before, gradients are those of derivatives in the model

    def see(self, tensor: Tensor, of_value: Summary | None, of_gradient: Summary) -> int:
        value = of_value and of_value(to_numpy(tensor))
        self.taps.append((value, tuple(tensor.shape), of_gradient))
        return len(self.taps) - 1

    def see_gradient(self, position: int, gradient: Tensor) -> None:
        if not self.is_called:
            return
        of_gradient = self.taps[position][2]
        self.gradients[position] = of_gradient(to_numpy(gradient))

    def results(self, extras: list[Tensor]) -> Results:
        for position, (_, shape, of_gradient) in enumerate(self.taps):
            if position not in self.gradients:  # the objective does not depend on it
                self.gradients[position] = of_gradient(np.zeros(shape, np.float32))
        signals = [Signal(tap[0], self.gradients[i]) for i, tap in enumerate(self.taps)]
        return signals, list(map(to_numpy, extras))


def is_float(value: Any) -> bool:
    is_tensor = keras.ops.is_tensor(value)
    return is_tensor and "float" in keras.backend.standardize_dtype(value.dtype)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The values as float32, or as they are if they are doubles."""
    values = np.asarray(keras.ops.convert_to_numpy(tensor))
    return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)
