"""What passes through the layers of a model, forward and back, in numbers, on any backend.

For one pass each layer's `call` is replaced by one that sends the layer's input and output
through an identity whose gradient is a statistic: what autodiff returns as the gradient of
the identity's second argument, the probe, is mean and std of the gradient that came by.
Nothing is kept but a few numbers per tensor, and almost all is the same on every backend.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from keras_glorot.keras_bridge import copy_mask, sublayers
from keras_glorot.sampling import TRUNCATED_STD, draw
from keras_glorot.variables import describe

__all__ = ["NOTHING", "moments", "record"]

ops: Any = keras.ops  # Keras declares that many of these may return None
tree: Any = keras.tree

# These call the layer inside them in a loop, which backends trace: it can't be looked into.
_LOOPS = (keras.layers.RNN, keras.layers.TimeDistributed)
# |f'(z)| of what saturates, from y = f(z).
_SLOPES: dict[str, Callable[[Any], Any]] = {
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
    "softsign": lambda y: (1 - ops.abs(y)) ** 2,
}
NOTHING = ((None, None), (None, None))  # for what has no float tensor


def record(
    model: Any, x: Any, y: Any, loss: Any, seed: int, statistic: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """The calls; of their tensors, `statistic` and that of the gradient in a pair."""
    differentiate = _DIFFERENTIATE.get(keras.backend.backend())
    if differentiate is None:
        raise RuntimeError("Gradients need KERAS_BACKEND to be tensorflow, jax or torch.")
    layers, kernels = _audible(model)
    x, y = _checked(x, y, loss)
    variables, listeners = model.variables, []

    def run(new_probe: Callable, values: list[Any], x: Any) -> tuple[Any, tuple[Any, Any]]:
        """What to differentiate, and what was seen. JAX runs it on symbols, and twice."""
        listeners.append(listener := _Listener(statistic, new_probe))
        state = dict(zip(map(id, variables), values, strict=True))
        for layer, kernel in kernels.items():
            state[kernel], listener.kernels[layer] = listener.tap(state[kernel])
        # What the model would change, such as a random state, stays in the scope.
        scope = keras.StatelessScope(zip(variables, state.values(), strict=True))
        with scope, contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(listener.listen(layer, layer is model))
            outputs = _call(model, x)
        return _target(outputs, y, loss, seed), (listener.seen, listener.fractions)

    (seen, fractions), gradients = differentiate(run, [v.value for v in variables], x)
    pairs = dict(enumerate(zip(_to_lists(seen), _to_lists(gradients), strict=True)))
    for call, fraction in zip(listeners[-1].calls, _to_lists(fractions), strict=True):
        call |= {
            key: pairs.get(call[key], NOTHING) for key in ("input", "output", "kernel")
        }
        call |= {"saturated": None, "dead": None} | fraction
    return listeners[-1].calls


def moments(tensor: Any) -> Any:
    """Mean and std, in float32."""
    values = ops.cast(tensor, "float32")
    # Scaled, so that squares neither vanish nor overflow.
    scale = ops.max(ops.abs(values))
    scale = ops.where(scale > 0, scale, ops.ones_like(scale))
    values = values / scale
    return ops.stack([ops.mean(values) * scale, ops.std(values) * scale])


class _Listener:
    """Takes a statistic of tensors on their way, and notes the calls of layers."""

    def __init__(self, statistic: Callable[[Any], Any], new_probe: Callable[[int], Any]):
        @ops.custom_gradient
        def identity(tensor, probe):
            def gradient(*args, upstream=None):  # a keyword in torch alone
                upstream = args[0] if upstream is None else upstream
                return upstream, statistic(upstream)

            return tensor, gradient

        self.identity, self.statistic, self.new_probe = identity, statistic, new_probe
        self.seen, self.fractions, self.calls = [], [], []
        self.kernels: dict[int, int | None] = {}
        self.names: list[str] = []  # of the calls that have not returned
        self.latest: list[Any] = []  # what the call before returned

    def tap(self, structure: Any) -> tuple[Any, int | None]:
        """Sends the first float tensor through the identity; says where in `seen` it is."""
        tensors = tree.flatten(structure)
        first = next(filter(_is_float, tensors), None)
        if first is None:
            return structure, None
        self.seen.append(self.statistic(ops.stop_gradient(first)))
        tapped = self.identity(first, self.new_probe(self.seen[-1].shape[0]))
        copy_mask(first, tapped)
        tensors = [tapped if tensor is first else tensor for tensor in tensors]
        return tree.pack_sequence_as(structure, tensors), len(self.seen) - 1

    @contextlib.contextmanager
    def listen(self, layer: keras.Layer, always: bool) -> Iterator[None]:
        """Replaces the `call` of this one object; its class stays as it is."""
        name = "quantized_call" if layer.quantization_mode else "call"
        call = getattr(layer, name)
        attributes: Any = vars(layer)
        before = {name: attributes[name]} if name in attributes else {}
        always |= isinstance(layer, _LOOPS) or len(sublayers(layer)) == 1

        def listening_call(*args: Any, **kwargs: Any) -> Any:
            (args, kwargs), inputs = self.tap((args, kwargs))
            self.names.append(layer.name)
            outputs = call(*args, **kwargs)
            path = "/".join(self.names[1:]) or layer.name
            self.names.pop()
            handed_on = {id(tensor) for tensor in self.latest}
            if not always and handed_on.issuperset(map(id, tree.flatten(outputs))):
                return outputs
            outputs, output = self.tap(outputs)
            self.latest = tree.flatten(outputs)
            self.fractions.append(_fraction(layer, self.latest[0]))
            count = 1 + sum(path == call["path"].split(" (")[0] for call in self.calls)
            path += f" ({count})" if count > 1 else ""
            self.calls.append(
                {
                    "path": path,
                    "layer": type(layer).__name__,
                    "shape": tuple(self.latest[0].shape),
                    "input": inputs,
                    "output": output,
                    "kernel": self.kernels.get(id(layer)),
                }
            )
            return outputs  # fmt: skip

        attributes[name] = listening_call
        try:
            yield
        finally:
            del attributes[name]
            attributes.update(before)


def _tensorflow(run, values, x):
    import tensorflow as tf

    probes = []
    with tf.GradientTape() as tape:

        def new_probe(size):
            probes.append(tf.zeros(size))
            tape.watch(probes[-1])
            return probes[-1]

        target, seen = run(new_probe, values, x)
    zero = tf.UnconnectedGradients.ZERO
    return seen, tape.gradient(target, probes, unconnected_gradients=zero)


def _jax(run, values, x):
    import jax

    def target(probes, values, x):
        left = iter(probes)
        return run(lambda size: next(left), values, x)

    sizes = []  # the probes have to be there before
    jax.eval_shape(lambda: run(lambda n: sizes.append(n) or np.zeros(n, "f"), values, x))
    # Compiled for this one run, and not eagerly one operation after another: most of the
    # time goes there.
    once = {"xla_backend_optimization_level": 0}
    gradient = jax.jit(jax.grad(target, has_aux=True), compiler_options=once)
    return gradient([np.zeros(size, "f") for size in sizes], values, x)[::-1]


def _torch(run, values, x):
    import torch

    probes = []

    def new_probe(size):
        probes.append(ops.zeros(size).requires_grad_())
        return probes[-1]

    with torch.enable_grad():
        target, seen = run(new_probe, values, x)
        return seen, torch.autograd.grad(target, probes, materialize_grads=True)


_DIFFERENTIATE = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def _audible(model: keras.Layer) -> tuple[list[keras.Layer], dict[int, int]]:
    """Layers that can be listened to; by `id` of each, the `id` of its first kernel."""
    weights = describe(model)  # checks the model
    loops: dict[int, keras.Layer] = {}
    for layer in sublayers(model):
        if isinstance(layer, _LOOPS):
            loops = {id(inner): layer for inner in sublayers(layer)} | loops
    kernels: dict[int, int] = {}
    for weight in weights:
        owner, variable = weight.owner, weight.variable
        if weight.fans and owner is not None and "float" in variable.dtype:
            kernels.setdefault(id(loops.get(id(owner), owner)), id(variable))
    return [each for each in sublayers(model) if loops.get(id(each), each) is each], kernels


def _checked(x: Any, y: Any, loss: Any) -> tuple[Any, Any]:
    """x and y as tensors, if all is as it must be."""
    if (y is None) != (loss is None):
        raise ValueError(
            "Arguments `y` and `loss` must be given together or not at all. "
            f"Received: loss={loss}, y={y}"
        )
    shapes = [tuple(getattr(array, "shape", ())) for array in tree.flatten(x)]
    if not all(map(math.prod, shapes)) or () in shapes:
        raise ValueError(
            "Argument `x` must be a batch of at least one example: an array or a structure "
            f"of arrays. Received: x of type {type(x)} with shapes {shapes[:4]}"
        )
    x = tree.map_structure(ops.convert_to_tensor, x)
    if not all(ops.all(ops.isfinite(t)) for t in tree.flatten(x) if _is_float(t)):
        raise ValueError(f"Argument `x` must be finite. Received: x={x}")
    return x, None if y is None else tree.map_structure(ops.convert_to_tensor, y)


def _call(model: keras.Layer, x: Any) -> Any:
    try:
        return model(x, training=False)
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in tree.flatten(x)]
        raise ValueError(
            "Argument `x` must be a batch that the model can be called on. "
            f"Received: x of shape {str(shapes)[1:-1]}. The model says: {error}"
        ) from error


def _target(outputs: Any, y: Any, loss: Any, seed: int) -> Any:
    if loss is not None:
        function: Any = keras.losses.get(loss)
        return ops.mean(function(y, outputs))
    floats = [tensor for tensor in tree.flatten(outputs) if _is_float(tensor)]
    if not floats:
        raise ValueError("Argument `model` must return floats, which have a gradient.")
    total, std = 0.0, 1 / TRUNCATED_STD
    for i, tensor in enumerate(floats):
        c = draw("truncated_normal", tuple(tensor.shape), std, "float32", (seed, i))
        total += ops.sum(ops.cast(tensor, "float32") * ops.convert_to_tensor(c))
    return total


def _fraction(layer: keras.Layer, y: Any) -> dict[str, Any]:
    """What fraction is saturated, or dead, where the activation is such that it can be."""
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    if name in _SLOPES and not isinstance(layer, _LOOPS):
        return {"saturated": ops.mean(ops.cast(_SLOPES[name](y) < 0.1, "float32"))}
    if name in ("relu", "relu6") or isinstance(layer, keras.layers.ReLU):
        units = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
        others = [axis for axis in range(y.ndim) if axis != units % y.ndim]
        if math.prod(y.shape[axis] for axis in others) >= 10:
            silent = ops.all(y <= 0, axis=others)
            return {"dead": ops.mean(ops.cast(silent, "float32"))}
    return {}


def _is_float(value: Any) -> bool:
    return ops.is_tensor(value) and "float" in keras.backend.standardize_dtype(value.dtype)


def _to_lists(tensors: Any) -> list:
    return tree.map_structure(lambda t: ops.convert_to_numpy(t).tolist(), list(tensors))
