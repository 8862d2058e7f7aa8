"""PyTorch's own ways."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import torch
from torch import distributed

from keras_glorot._backends.signals import Differentiator, EagerSignals, Run, to_numpy
from keras_glorot._backends.values import Values

untouched = torch.compiler.disable
without_compilation = functools.partial(torch.compiler.set_stance, "force_eager")


def to_tensor(array: np.ndarray) -> Any:
    if array.dtype.kind == "V":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return keras.ops.convert_to_tensor(tensor)  # moves it to Keras's device


def values(variable: keras.Variable) -> Values:
    return Values.of(held_value(variable))


def held_value(variable: keras.Variable) -> Any:
    _check_values(variable)
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))


def _check_values(variable: keras.Variable) -> None:
    tensor: Any = variable.value
    if tensor.is_meta:
        raise ValueError(
            f"{variable.path} must have values, but it is on PyTorch's meta device: make "
            "the layer again on a real one."
        )


def assign(variable: keras.Variable, value: Any) -> None:
    _check_values(variable)
    if isinstance(value, np.ndarray):
        value = to_tensor(value)
    with writable([variable]):
        variable.assign(value)


def writable(variables: Iterable[keras.Variable]) -> contextlib.AbstractContextManager[Any]:
    """Those that were made in inference mode can be assigned only there."""
    tensors: list[Any] = [variable.value for variable in variables]
    if any(tensor.is_inference() for tensor in tensors):
        return torch.inference_mode()
    return contextlib.nullcontext()


def process_count() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def current_trace() -> Any:
    try:
        from torch._C._autograd import _top_saved_tensors_default_hooks
        from torch._C._functorch import maybe_current_level
        from torch.autograd.forward_ad import _current_level
    except ImportError:
        return None
    hooks = _top_saved_tensors_default_hooks(True)
    return maybe_current_level(), _current_level, hooks


def unmoved_generators() -> contextlib.AbstractContextManager[Any]:
    # Devices that are not in use yet have nothing to put back.
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count() if in_use else 0)
    return torch.random.fork_rng(list(devices))


def differentiator(run: Run) -> Differentiator:
    def differentiate(*arguments: Any) -> list[np.ndarray]:
        seen = EagerSignals()

        def tap(tensor, of_value, of_gradient):
            signal, see_gradient = seen.see(tensor.detach(), of_value, of_gradient)
            return _Identity.apply(tensor, leaf, see_gradient), signal

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # Layers may be called again on the way back, where this thread's scopes hold.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            leaf = torch.zeros((), requires_grad=True)
            detached: Any = keras.tree.map_structure(_detach, arguments)
            objective, extras = stack.enter_context(run(tap, *detached))
            seen.is_called = True
            if objective.requires_grad:
                torch.autograd.grad(objective, leaf, allow_unused=True)
            seen.finish()
            return list(map(to_numpy, extras))

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
