"""What TensorFlow does in its own way."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_glorot._backends.signals import (
    Differentiator,
    EagerSignals,
    Run,
    Signal,
    is_float,
    to_numpy,
)

tree: Any = keras.tree


def differentiator(run: Run) -> Differentiator:
    def differentiate(*arguments: Any) -> tuple[list[Signal], list[np.ndarray]]:
        seen = EagerSignals()

        def tap(tensor, of_value, of_gradient):
            position = seen.see(tensor, of_value, of_gradient)

            @tf.custom_gradient
            def identity(tensor):
                def gradient(upstream):
                    seen.see_gradient(position, tf.convert_to_tensor(upstream))
                    return upstream

                return tf.identity(tensor), gradient

            return identity(tensor), position

        sources = [tensor for tensor in tree.flatten(arguments) if is_float(tensor)]
        sources = list(map(tf.convert_to_tensor, sources))
        quiet = _without_retracing_warnings(tf.get_logger())
        with quiet, contextlib.ExitStack() as stack:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                flat = iter(sources)
                watched = tree.map_structure(
                    lambda argument: next(flat) if is_float(argument) else argument,
                    arguments,
                )
                objective, extras = stack.enter_context(run(tap, *watched))
            seen.is_called = True
            tape.gradient(objective, sources)
            return seen.signals(), list(map(to_numpy, extras))

    return differentiate


@contextlib.contextmanager
def _without_retracing_warnings(logger: logging.Logger) -> Iterator[None]:
    """Hides that Keras compiles grouped convolutions anew: here they run once."""

    def is_worth_saying(record: logging.LogRecord) -> bool:
        return "triggered tf.function retracing" not in record.getMessage()

    logger.addFilter(is_worth_saying)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_saying)
