"""TensorFlow's own ways."""

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_glorot._backends import common
from keras_glorot._backends.signals import (
    Differentiator,
    EagerSignals,
    Run,
    is_float,
    to_numpy,
)
from keras_glorot._backends.traced import Program

is_symbolic = tf.is_symbolic_tensor
shares_new_variables = tf.distribute.has_strategy
untouched = tf.autograph.experimental.do_not_convert


def to_tensor(array: np.ndarray) -> Any:
    # In a graph the array becomes a constant of it; a GPU takes a copy anyway.
    is_eager = array.size and tf.executing_eagerly()
    if not is_eager or tf.config.list_logical_devices("GPU"):
        return common.to_tensor(array)
    from_dlpack = tf.experimental.dlpack.from_dlpack
    if array.dtype.kind != "V":
        return from_dlpack(array.__dlpack__())
    # NumPy has no bfloat16, and so no DLPack for it.
    return tf.bitcast(from_dlpack(array.view(np.uint16).__dlpack__()), tf.bfloat16)


def assign(variable: keras.Variable, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.ctypes.data % 64 == 0:
        value = to_tensor(value)  # TensorFlow aborts on memory that is aligned worse
    variable.assign(value)


def process_count() -> int:
    # "/job:worker/replica:0/task:1/device:CPU:0", without a job in one process.
    names = [device.name for device in tf.config.list_logical_devices()]
    return len({name.rpartition("/device:")[0] for name in names})


def is_tracing() -> bool:
    return not tf.executing_eagerly()


def current_trace() -> Any:
    try:  # a call that is repeated on the way back is recorded by no tape now
        from tensorflow.python.eager.record import could_possibly_record
    except ImportError:
        return tf.executing_eagerly()
    return tf.executing_eagerly(), could_possibly_record()


def python_function(value: Any) -> Callable | None:
    is_compiled = isinstance(value, tf.types.experimental.PolymorphicFunction)
    return getattr(value, "python_function", None) if is_compiled else None


@contextlib.contextmanager
def unmoved_generators() -> Iterator[None]:
    """For operations without a seed of their own, after `set_random_seed`.

    Each gets a seed, and a kernel for it that also has a state. So seeds inside come from
    another generator: the kernels of the seeds to come stay as they are.
    """
    try:
        from tensorflow.python.eager.context import context

        holder: Any = vars(context())
        generator = holder["_rng"]
    except (ImportError, KeyError):  # nobody has set a seed
        yield
        return
    holder["_rng"] = random.Random(0)
    try:
        yield
    finally:
        holder["_rng"] = generator


class _Program(Program):
    def unknown_zero(self) -> Any:
        # TensorFlow has no public name for the barrier.
        from tensorflow.compiler.tf2xla.ops import gen_xla_ops

        # XLA stops at the barrier, TensorFlow itself at an operation it calls stateful.
        zero = tf.raw_ops.Empty(shape=[], dtype=tf.uint32, init=True)
        hidden: Any = gen_xla_ops.xla_optimization_barrier([zero])
        return hidden[0]

    def indices(self, shape: tuple[int, ...], zero: Any) -> tuple[Any, Any]:
        # Of one long range TensorFlow would make a constant.
        size = math.prod(shape)
        rows, columns = -(-size // (1 << 15)), 1 << 15
        row = tf.cast(tf.range(rows), tf.uint32)[:, None] + zero
        column = tf.cast(tf.range(columns), tf.uint32)

        def in_order(grid: Any) -> Any:
            flat = tf.reshape(tf.broadcast_to(grid, [rows, columns]), [-1])
            return tf.reshape(flat[:size], shape)

        low = in_order(row * np.uint32(columns) + column)
        if size <= 1 << 32:
            return low, zero
        return low, in_order(row // np.uint32((1 << 32) // columns))

    def take(self, table: np.ndarray, indices: Any) -> Any:
        return tf.gather(tf.constant(table), indices)

    def host_call(
        self, function: Callable, states: list[Any], shape: tuple[int, ...], dtype: str
    ) -> Any:
        tensor = tf.numpy_function(function, states, tf.as_dtype(dtype))
        tensor.set_shape(shape)
        return tensor

    def compiled(self, function: Callable) -> Callable:
        return tf.function(function, autograph=False, jit_compile=True)


program = _Program()


def differentiator(run: Run) -> Differentiator:
    def differentiate(*arguments: Any) -> list[np.ndarray]:
        seen = EagerSignals()

        def tap(tensor, of_value, of_gradient):
            signal, see_gradient = seen.see(tensor, of_value, of_gradient)

            @tf.custom_gradient
            def identity(tensor):
                def gradient(upstream):
                    see_gradient(tf.convert_to_tensor(upstream))
                    return upstream

                return tf.identity(tensor), gradient

            return identity(tensor), signal

        watched: Any = keras.tree.map_structure(
            lambda each: tf.convert_to_tensor(each) if is_float(each) else each, arguments
        )
        sources = [each for each in keras.tree.flatten(watched) if is_float(each)]
        with contextlib.ExitStack() as stack:
            # Keras compiles grouped convolutions anew: here they run once.
            logger = tf.get_logger()
            logger.addFilter(_tells_no_retracing)
            stack.callback(logger.removeFilter, _tells_no_retracing)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                objective, extras = stack.enter_context(run(tap, *watched))
            seen.is_called = True
            tape.gradient(objective, sources)
            seen.finish()
            return list(map(to_numpy, extras))

    return differentiate


def _tells_no_retracing(record: logging.LogRecord) -> bool:
    return "triggered tf.function retracing" not in record.getMessage()
