"""What JAX does in its own way."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._backends.signals import (
    Differentiator,
    Run,
    Signal,
    Summary,
    to_numpy,
)


def differentiator(run: Run) -> Differentiator:
    taps: list[tuple[Summary | None, Summary]] = []

    def objective(probes: Sequence[Any], *arguments: Any) -> Any:
        """What a probe is added to has the gradient of the probe."""
        left, values = iter(probes), []
        taps.clear()

        def tap(tensor, of_value, of_gradient):
            taps.append((of_value, of_gradient))
            values.append(tensor if of_value else None)
            return tensor + next(left), len(taps) - 1

        with run(tap, *arguments) as (target, extras):
            return target, (values, extras)

    def shapes_of_taps(*arguments: Any) -> list[Any]:
        shapes = []

        def tap(tensor, of_value, of_gradient):
            shapes.append((tensor.shape, tensor.dtype))
            return tensor + 0, len(shapes) - 1

        def target(*arguments: Any) -> Any:
            with run(tap, *arguments) as (target, _):
                return target

        jax.eval_shape(target, *arguments)
        return shapes

    def program(*arguments: Any) -> Any:
        probes = [jax.numpy.zeros(*shape) for shape in shapes_of_taps(*arguments)]
        return jax.grad(objective, has_aux=True)(probes, *arguments)

    @functools.cache
    def compiled(placement: Any) -> Callable:
        # It runs a few times at most: most of the time goes into compiling it.
        options: Any = {"xla_backend_optimization_level": 0}
        return jax.jit(program, compiler_options=options, out_shardings=placement)

    def differentiate(*arguments: Any) -> tuple[list[Signal], list[np.ndarray]]:
        arguments, placement = backends.with_all_processes(arguments)
        gradients, (values, extras) = compiled(placement)(*arguments)
        signals = []
        while gradients:  # frees each as it goes
            of_value, of_gradient = taps[len(signals)]
            value, gradient = values.pop(0), gradients.pop(0)
            signals.append(
                Signal(
                    of_value and of_value(to_numpy(value)), of_gradient(to_numpy(gradient))
                )
            )
        return signals, list(map(to_numpy, extras))

    return differentiate
