"""What PyTorch does in its own way."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch

from keras_glorot._backends.signals import (
    Differentiator,
    EagerSignals,
    Run,
    Signal,
    to_numpy,
)


def differentiator(run: Run) -> Differentiator:
    def differentiate(*arguments: Any) -> tuple[list[Signal], list[np.ndarray]]:
        seen = EagerSignals()

        def tap(tensor, of_value, of_gradient):
            position = seen.see(tensor.detach(), of_value, of_gradient)
            see_gradient = functools.partial(seen.see_gradient, position)
            return _Identity.apply(tensor, leaf, see_gradient), position

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # Layers may be called again on the way back, where this thread's scopes hold.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            leaf = torch.zeros((), requires_grad=True)
            detached = keras.tree.map_structure(_detach, arguments)
            objective, extras = stack.enter_context(run(tap, *detached))
            seen.is_called = True
            if objective.requires_grad:
                torch.autograd.grad(objective, leaf, allow_unused=True)
            return seen.signals(), list(map(to_numpy, extras))

    return differentiate


class _Identity(torch.autograd.Function):
    """Hangs on a leaf, whose gradient is asked for: so all of them are passed."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, leaf: Any, see_gradient: Callable) -> Any:
        ctx.see_gradient = see_gradient
        return tensor.clone()  # the layer may work in place

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        ctx.see_gradient(*grad_outputs)
        return *grad_outputs, None, None


def _detach(argument: Any) -> Any:
    if not torch.is_tensor(argument):
        return argument
    # Those of inference mode can't be saved for the way back.
    return argument.clone() if argument.is_inference() else argument.detach()
