"""The singular values of a network's Jacobian, by one random direction back and forth."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from keras_glorot._backends.signals import Outcome, Tap, Tensor, is_float
from keras_glorot._models.passes import Batch, Pass, Recorder, largest_size, record
from keras_glorot._models.survey import Survey

__all__ = ["singular_spread"]

ops: Any = keras.ops
tree: Any = keras.tree

# Of the inputs: at small steps activations are straight, at large ones rounding vanishes.
_STEPS = (3e-4, 3e-5, 1e-2)
_ROUGHNESS = 0.1


def singular_spread(
    survey: Survey, batch: Batch, seen: Pass, training: bool
) -> float | None:
    """E[σ⁴] / E[σ²]² of the singular values σ of the Jacobian J: 1 if all are equal.

    For a random c of variance 1 at each output, E[cᵀ J Jᵀ c] is the sum of σ², and
    E[|J Jᵀ c|²] that of σ⁴. The gradients of the objective are Jᵀ c; J is applied to them
    by a difference, (f(x + h) - f(x - h)) / 2, on the whole batch: its J is that of all
    examples. As many σ count as there are inputs or outputs, whichever are fewer.

    With λ = σ², and 0 where there are more outputs than inputs, the square of the relative
    error is about 2 sum (λ² / sum λ² - 2 λ / sum λ + 1 / n)²: 0 for an isometry.

    Args:
        survey: Of the model.
        batch: The inputs; a loss is left aside.
        seen: A pass over them.
        training: As in `record`.

    Returns:
        None where it can't be told: nothing depends on a float input, the output jumps, or
        it is too coarse, as in half precision.
    """
    if seen.gradients and batch.loss is not None:  # its gradient has no random direction
        batch = batch._replace(y=None, loss=None)
        seen = record(survey, batch, training)
    size = max(map(largest_size, seen.gradients), default=0.0)
    if not 0 < size < math.inf:
        return None
    # Of a size at which no step is beyond float32, however much the signal vanishes.
    gradients = [(each / np.float64(size)).astype(np.float32) for each in seen.gradients]
    floats = list(filter(is_float, tree.flatten(batch.x)))
    scale = min(map(_relative_step, floats, gradients))
    if scale == math.inf:
        return None

    def move(
        tap: Tap, scope: Any, x: Any, gradients: list[Tensor], step: Tensor
    ) -> tuple[Any, dict[int, Callable]]:
        left = iter(gradients)
        moved = [
            each + ops.cast(step * next(left), each.dtype) if is_float(each) else each
            for each in tree.flatten(x)
        ]
        return tree.pack_sequence_as(batch.x, moved), {}

    def keep(batch: Batch, outputs: Any) -> Outcome:
        return ops.zeros(()), list(filter(is_float, tree.flatten(outputs)))

    recorder = Recorder(survey, training, move, keep)
    tensors = [ops.convert_to_tensor(each) for each in gradients]

    def outputs(step: float) -> np.ndarray:
        return _joined(recorder(batch, tensors, ops.convert_to_tensor(np.float32(step))))

    c, center = _joined(batch.directions(seen.outputs)), _joined(seen.outputs)
    back = _joined(gradients)
    for step in _STEPS:
        step *= scale
        ahead, behind = outputs(step), outputs(-step)
        forth, bend = (ahead - behind) / (2 * step), (ahead + behind - 2 * center) / step
        squares = size * (back @ back)
        is_smooth = bend @ bend <= _ROUGHNESS * (forth @ forth)
        overlap = c @ forth  # the same, but its error goes with that of `forth`
        if is_smooth and abs(overlap - squares) <= _ROUGHNESS * squares:
            count = min(len(back), len(c))
            return float((c @ c) * (forth @ forth) / overlap**2 * count / len(c))
    return None


def _relative_step(tensor: Tensor, gradient: np.ndarray) -> float:
    """By what a gradient at an input is multiplied to be as large as the input."""
    largest = float(ops.max(ops.abs(tensor))) if math.prod(tensor.shape) else 0.0
    step = largest_size(gradient)
    return largest / step if largest and step else math.inf


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(array).astype(np.float64) for array in arrays])
