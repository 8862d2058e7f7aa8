"""Signals and gradients, as they pass through the layers of a model: named records.

For one pass each layer's `call` is replaced by one that taps the tensors on their way: a
tap hands a tensor on unchanged and summarizes it, and later its gradient, by a NumPy
function. Eager backends summarize at once and keep a few numbers; JAX compiles one program
that returns the tensors, so that it compiles little more than autodiff's own program.
"""

import contextlib
import functools
import inspect
import math
import numbers
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._backends.signals import Outcome, Signal, Tap, Tensor, is_float
from keras_glorot._drawing.stream import TRUNCATED_STD, draw
from keras_glorot._keras.calls import copy_mask, error_reason, without_remat
from keras_glorot._keras.graph import LOOPS, replaced_attribute
from keras_glorot._models.progress import Advance
from keras_glorot._models.survey import Survey, Weight, unique_paths

__all__ = [
    "Batch",
    "Call",
    "Moments",
    "Pass",
    "Recorder",
    "arguments_of",
    "first_float",
    "gradient_std",
    "largest_size",
    "likeness",
    "lock",
    "moments",
    "position_axes",
    "record",
    "replaced",
]

ops: Any = keras.ops  # Keras declares that many of these may return None
tree: Any = keras.tree

# Layers are shared by threads, and the replaced `call` of one by two recordings.
lock = threading.RLock()


class Moments(NamedTuple):
    """Mean and standard deviation of the values of a tensor."""

    mean: float
    std: float


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        path: The layer's path from the model down, with a number from its second call on.
        layer: The layer.
        shape: The shape of its first output.
        input, output: The first float tensor of each.
        kernel: The layer's first weight with fans; its gradient's summary is the std.
        weight: That weight.
        parents: Positions of the calls that its inputs come from; below zero are the
            inputs of the model.
    """

    path: str
    layer: keras.Layer
    shape: tuple[int, ...]
    input: Signal
    output: Signal
    kernel: Signal
    weight: Weight | None
    parents: tuple[int, ...]


# Of a layer, the values, and whether they are at its input.
LayerSummary = Callable[[keras.Layer, np.ndarray, bool], Any]


def largest_size(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def moments(values: np.ndarray) -> Moments:
    """Mean and std, scaled so that squares neither vanish nor overflow."""
    values = np.asarray(values, np.float32)
    scale = largest_size(values) or 1.0
    if not math.isfinite(scale):
        return Moments(math.nan, math.nan)
    scaled = values / np.float32(scale)
    return Moments(float(scaled.mean()) * scale, float(scaled.std()) * scale)


def likeness(values: np.ndarray, examples: int) -> float | None:
    """The mean cosine between two examples; None where fewer than two are not zero.

    That is (|sum of unit vectors|² - n) / (n (n - 1)), without a look at each pair.
    """
    scale = largest_size(values)
    if values.shape[:1] != (examples,) or not 0 < scale < math.inf:
        return None
    vectors = values.reshape(examples, -1) / values.dtype.type(scale)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    count = np.count_nonzero(norms)
    total = np.divide(1, norms, out=norms, where=norms > 0) @ vectors
    pairs = count * (count - 1)
    return (float(total @ total) - count) / pairs if pairs else None


def gradient_std(values: np.ndarray, examples: int, units: tuple[int, ...]) -> float:
    """The std of the gradient at a unit of one example, at all its positions together.

    A kernel that serves T positions gets the gradient sum over t of g_t x_tᵀ. If the inputs
    x_t have one norm and a mean cosine ρ, its square is |x|² times

        (1 - ρ) sum |g_t|² + ρ |sum g_t|².

    So the g_t act as one gradient of the size |sum g_t| where the positions are alike, and
    of the root of sum |g_t|² where they are not. This takes the larger one. A mean over
    positions gives each g / T, and their sum is the g behind the mean: nothing is lost.

    Args:
        values: The gradient; its first axis is that of the examples.
        examples: How many there are. With another first axis each value stands for itself.
        units: The axes along which units differ. All others are positions.
    """
    axes = position_axes(values, examples, units)
    count = math.prod(values.shape[axis] for axis in axes)
    apart = math.sqrt(count) * moments(values).std
    return max(count * moments(values.mean(axes)).std, apart) if axes else apart


def position_axes(
    values: np.ndarray, examples: int, units: tuple[int, ...]
) -> tuple[int, ...]:
    """The axes of positions; none where the first one is not that of the examples."""
    if values.shape[:1] != (examples,):
        return ()
    return tuple(set(range(1, values.ndim)) - {axis % values.ndim for axis in units})


class Batch(NamedTuple):
    """A checked batch, with what is differentiated on it."""

    x: Any
    y: Any
    loss: Any
    seed: int

    @classmethod
    def check(cls, x: Any, y: Any = None, loss: Any = None, seed: int = 0) -> "Batch":
        """The batch as tensors, or an error that says what is wrong."""
        if (y is None) != (loss is None):
            raise ValueError(
                "Arguments `y` and `loss` must be given together or not at all. "
                f"Received: loss={loss}, y={y}"
            )
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(
                f"Argument `seed` must be an integer. Received: seed={seed} "
                f"(of type {type(seed)})"
            )
        shapes = [tuple(getattr(array, "shape", ())) for array in tree.flatten(x)]
        # One of several inputs may be empty, such as a prompt without points.
        if not all(shape and shape[0] for shape in shapes) or not any(
            map(math.prod, shapes)
        ):
            raise ValueError(
                "Argument `x` must be a batch of at least one example: an array or a "
                f"structure of arrays. Received: x of type {type(x)} with shapes "
                f"{shapes[:4]}"
            )
        try:
            with np.errstate(over="ignore"):  # JAX makes floats of doubles
                x = tree.map_structure(ops.convert_to_tensor, x)
        except Exception as error:
            raise _not_numbers(x) from error
        floats = [ops.cast(t, "float32") for t in tree.flatten(x) if is_float(t)]
        if not all(ops.all(ops.isfinite(each)) for each in floats):
            raise ValueError(f"Argument `x` must be finite, as float32. Received: x={x}")
        if all(is_float(t) and not ops.any(t) for t in tree.flatten(x)):
            raise ValueError(
                "Argument `x` must hold data: without bias, nothing comes out of zeros. "
                f"Received: x of shapes {shapes[:4]}, all zero"
            )
        loss = None if loss is None else keras.losses.get(loss)
        return cls(x, y, loss, int(seed))

    @property
    def size(self) -> int:
        """How many examples it holds."""
        return tree.flatten(self.x)[0].shape[0]

    def call(self, model: keras.Layer, x: Any) -> Any:
        """The outputs of the model, or an error that begins with the reason."""
        args, kwargs = arguments_of(model, x)
        try:
            return model(*args, training=False, **kwargs)
        except Exception as error:
            if any("string" in str(tensor.dtype) for tensor in tree.flatten(x)):
                raise _not_numbers(x) from error
            shapes = [tuple(tensor.shape) for tensor in tree.flatten(x)]
            reason = _first_line(error)
            received = f"Received: x of shape {str(shapes)[1:-1]}"
            declared = [tuple(each.shape) for each in getattr(model, "inputs", None) or ()]
            if not declared or _fit(shapes, declared):
                raise ValueError(f"Calling `model` failed: {reason}. {received}") from error
            raise ValueError(
                "Argument `x` must be a batch that the model can be called on, of shape "
                f"{str(declared)[1:-1]}. {received}. Calling `model` failed: {reason}"
            ) from error

    def objective(self, outputs: Any) -> Tensor:
        """The mean loss or, without one, the sum of `c * outputs` with a random c."""
        if self.loss is not None:
            return self._mean_loss(outputs)
        floats = list(filter(is_float, tree.flatten(outputs)))
        if not floats:
            raise ValueError("Argument `model` must return floats, which have a gradient.")
        total = 0.0
        for tensor, c in zip(floats, self.directions(floats), strict=True):
            total += ops.sum(ops.cast(tensor, "float32") * ops.convert_to_tensor(c))
        return total

    def directions(self, floats: Sequence[Any]) -> Iterator[np.ndarray]:
        """A random c, of variance 1, for each output."""
        for i, tensor in enumerate(floats):
            shape, seed = tuple(tensor.shape), (self.seed, i)
            yield draw("truncated_normal", shape, 1 / TRUNCATED_STD, "float32", seed)

    def _mean_loss(self, outputs: Any) -> Tensor:
        try:
            y = tree.map_structure(ops.convert_to_tensor, self.y)
            return ops.mean(self.loss(y, outputs))
        except Exception as error:
            shapes = [tuple(getattr(part, "shape", ())) for part in tree.flatten(self.y)]
            wanted = [tuple(tensor.shape) for tensor in tree.flatten(outputs)]
            raise ValueError(
                "Argument `y` must be targets that `loss` can compare with the outputs of "
                f"the model, which have shape {str(wanted)[1:-1]}. Received: y of shape "
                f"{str(shapes)[1:-1]}, loss={self.loss}. Calling the loss failed: "
                f"{_first_line(error)}"
            ) from error


def _not_numbers(x: Any) -> TypeError:
    dtypes = [str(array.dtype) for array in tree.flatten(x)]
    return TypeError(
        "Argument `x` must be a batch of numbers, as the model takes them: text has to be "
        f"turned into numbers first. Received: x with dtypes {dtypes[:4]}"
    )


def arguments_of(model: keras.Layer, x: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of `call` for a structure: all of it as one, or each part as one.

    Models that know their inputs take it as it is. Other ones take the parts of a list if
    their `call` requires several arguments, and those of a dictionary of such arguments.
    """
    if getattr(model, "inputs", None) or not isinstance(x, dict | list | tuple):
        return (x,), {}
    parameters = inspect.signature(model.call).parameters.values()
    if isinstance(x, dict):
        names = {each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY}
        return ((), x) if len(x) > 1 and names.issuperset(x) else ((x,), {})
    required = [
        each
        for each in parameters
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        and each.default is each.empty
    ]
    return (x if len(required) > 1 else (x,)), {}


def _fit(shapes: list[tuple[int, ...]], declared: list[tuple[int | None, ...]]) -> bool:
    return len(shapes) == len(declared) and all(
        len(shape) == len(wanted)
        and all(size in (None, has) for has, size in zip(shape, wanted, strict=True))
        for shape, wanted in zip(shapes, declared, strict=True)
    )


class Pass(NamedTuple):
    """One call of the model, and one derivative.

    Attributes:
        calls: The calls of its layers in order of execution; the last one is the model's.
        unseen: The layers that were called where nothing is seen.
        gradients: The gradient at each float input of the model.
        outputs: Its float outputs.
    """

    calls: list[Call]
    unseen: list[keras.Layer]
    gradients: list[np.ndarray]
    outputs: list[np.ndarray]


def record(
    survey: Survey,
    batch: Batch,
    training: bool = True,
    of_value: LayerSummary = lambda layer, values, is_input: None,
    of_gradient: LayerSummary = lambda layer, values, is_input: None,
    advance: Advance = lambda fraction, text: None,
) -> Pass:
    """Calls the model once and differentiates it once.

    Args:
        survey: Of the model.
        batch: The inputs to call it on.
        training: Whether BatchNormalization uses the statistics of the batch.
        of_value, of_gradient: Summarize the first float tensor that goes into a layer, and
            the first one that comes out, and their gradients.
        advance: Is told of progress.
    """
    listener = _Listener(survey, of_value, of_gradient, advance)
    recorder = Recorder(survey, training, listener.start, listener.finish)
    outputs = recorder(batch)
    gradients = [signal.gradient for signal in listener.inputs]
    return Pass(listener.numbered_calls(), recorder.unseen, gradients, outputs)


class Recorder:
    """Calls a model and differentiates it: several passes by one program.

    Attributes:
        unseen: The layers that the latest pass called where nothing is seen.
    """

    def __init__(
        self,
        survey: Survey,
        training: bool,
        start: Callable[..., tuple[Any, dict[int, Callable]]],
        finish: Callable[[Batch, Any], Outcome],
    ):
        """From what happens before the model is called, and after.

        Args:
            survey: Of the model.
            training: As in `record`.
            start: From a tap, the scope that holds the variables, the inputs and the
                arguments of the pass: the inputs to take, and what stands for `call` of
                layers. On JAX it runs twice, first for shapes.
            finish: From the batch and the outputs: the objective and extras.
        """
        self.survey, self.training = survey, training
        self.start, self.finish = start, finish
        self.variables = survey.root.variables
        self.compiled_methods = list(map(_compiled_methods, survey.layers))
        self.unseen: list[keras.Layer] = []
        self.is_called = False
        self.differentiate = backends.differentiator(self._run)

    def __call__(
        self, batch: Batch, *arguments: Any, values: list[Tensor] | None = None
    ) -> list[np.ndarray]:
        """The extras of one pass; `values` are those of the model's variables."""
        self.batch, self.is_called = batch, False
        values = values or [variable.value for variable in self.variables]
        try:
            return self.differentiate(values, batch.x, batch.y, *arguments)
        except Exception as error:
            if not self.is_called:
                raise
            raise ValueError(
                "Argument `model` must be differentiable. Differentiating it failed: "
                f"{_first_line(error)}"
            ) from error

    @contextlib.contextmanager
    def _run(
        self, tap: Tap, values: list[Tensor], x: Any, y: Any, *arguments: Any
    ) -> Iterator[Outcome]:
        self.is_called = False
        batch = self.batch._replace(y=y)
        # Changes that the model would make, as of a random state, stay in the scope.
        scope = keras.StatelessScope(zip(self.variables, values, strict=True))
        x, wrappers = self.start(tap, scope, x, *arguments)
        with scope, self._intercepted(wrappers) as place:
            outputs = batch.call(self.survey.root, x)
            place.is_over = True
            self.unseen = list(place.unseen.values())
            outcome = self.finish(batch, outputs)
            self.is_called = True
            yield outcome

    @contextlib.contextmanager
    def _intercepted(self, wrappers: dict[int, Callable]) -> Iterator["_Place"]:
        """Where `wrapper(call, *args, **kwargs)` stands for `call` of layers.

        By `id` of each layer, in this thread; classes stay as they are. Other threads may
        use the model meanwhile. With `training`, BatchNormalization uses the statistics of
        the batch. Compiled functions that layers hold are called as Python; `keras.remat`
        in a call keeps the activations. A call that is repeated on the way back, still
        within, gives the same.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock)
            stack.enter_context(backends.without_compilation())
            place = _Place()
            stack.enter_context(_replaced_remat(place.is_other_thread))
            pairs = zip(self.survey.layers, self.compiled_methods, strict=True)
            for layer, methods in pairs:
                stack.enter_context(without_remat(layer))
                for name, function in methods.items():
                    stack.enter_context(replaced_attribute(layer, name, function))
                if self.training and isinstance(layer, keras.layers.BatchNormalization):
                    stack.enter_context(
                        _replaced_call(layer, _call_in_training, place.is_other_thread)
                    )
                if id(layer) in wrappers:
                    wrapper = wrappers[id(layer)]
                    stack.enter_context(_replaced_call(layer, wrapper, place.is_elsewhere))
            yield place


class _Listener:
    """Taps the tensors that go into and out of layers, and notes their calls."""

    def __init__(
        self,
        survey: Survey,
        of_value: LayerSummary,
        of_gradient: LayerSummary,
        advance: Advance,
    ):
        self.survey, self.advance = survey, advance
        self.of_value, self.of_gradient = of_value, of_gradient
        self.weights: dict[int, Weight] = {}
        for weight in survey.weights:
            owner = weight.owner
            if weight.fans and owner is not None and "float" in weight.variable.dtype:
                self.weights.setdefault(id(survey.loops.get(id(owner), owner)), weight)

    def start(self, tap: Tap, scope: Any, x: Any) -> tuple[Any, dict[int, Callable]]:
        """Forgets the run before, and says what replaces the `call` of layers."""
        self.tap = tap
        self.calls: list[Call] = []
        # Which call made a tensor. Tensors are compared by `id`, so these must be alive.
        self.origins: dict[int, tuple[weakref.ref, int]] = {}
        self.inputs: list[Signal] = []
        self.kernels: dict[int, Signal] = {}
        for layer, weight in self.weights.items():
            value = scope.get_current_value(weight.variable)
            value, self.kernels[layer] = tap(value, None, _std)
            scope.add_update((weight.variable, value))
        loops = self.survey.loops
        layers = [
            layer for layer in self.survey.layers if loops.get(id(layer), layer) is layer
        ]
        self.expected_calls = len(layers)
        # Not by `map_structure`, which may go through a dictionary in another order.
        x = tree.pack_sequence_as(x, list(map(self._tap_input, tree.flatten(x))))
        return x, {id(layer): self._wrapper(layer) for layer in layers}

    def finish(self, batch: Batch, outputs: Any) -> Outcome:
        self.advance(0.5, "gradients")
        return batch.objective(outputs), list(filter(is_float, tree.flatten(outputs)))

    def numbered_calls(self) -> list[Call]:
        paths = unique_paths(call.path for call in self.calls)
        pairs = zip(self.calls, paths, strict=True)
        return [call._replace(path=path) for call, path in pairs]

    def _tap_input(self, tensor: Tensor) -> Tensor:
        if not is_float(tensor):
            return tensor
        tensor, signal = self.tap(tensor, None, lambda gradient: gradient)
        self.inputs.append(signal)
        return tensor

    def _wrapper(self, layer: keras.Layer) -> Callable:
        path, is_root = self.survey.paths[id(layer)], layer is self.survey.root
        always = is_root or isinstance(layer, LOOPS) or not self.survey.children(layer)
        kernel = self.kernels.get(id(layer), Signal())
        weight = self.weights.get(id(layer))

        def listening_call(call: Callable, *args: Any, **kwargs: Any) -> Any:
            before = len(self.calls)
            self.advance(0.5 * min(1.0, before / self.expected_calls), path)
            tensors = list(filter(ops.is_tensor, tree.flatten((args, kwargs))))
            if is_root and not before:
                for i, tensor in enumerate(tensors):
                    self._remember(tensor, -1 - i)
            parents = self._parents(tensors)
            (args, kwargs), source = self._tap_first((args, kwargs), layer, True)
            outputs = call(*args, **kwargs)
            latest = len(self.calls) - 1
            inside = latest >= before
            tensors = filter(ops.is_tensor, tree.flatten(outputs))
            if inside and not always and {*map(self._origin, tensors)} <= {latest}:
                return outputs  # just as the call before, inside it, returned them
            outputs, signal = self._tap_first(outputs, layer, False)
            tensors = list(filter(ops.is_tensor, tree.flatten(outputs)))
            for tensor in tensors:
                self._remember(tensor, len(self.calls))
            shape = tuple(tensors[0].shape) if tensors else ()
            parents = (latest,) if inside else parents
            self.calls.append(
                Call(path, layer, shape, source, signal, kernel, weight, parents)
            )
            return outputs

        return listening_call

    def _tap_first(
        self, structure: Any, layer: keras.Layer, is_input: bool
    ) -> tuple[Any, Signal]:
        """Taps the first float tensor that is not empty."""
        first = first_float(structure)
        if first is None:
            return structure, Signal()
        tapped, signal = self.tap(
            first,
            lambda values: self.of_value(layer, values, is_input),
            lambda values: self.of_gradient(layer, values, is_input),
        )
        copy_mask(first, tapped)
        origin = self._origin(first)
        if origin is not None:
            self._remember(tapped, origin)
        return replaced(structure, first, tapped), signal

    def _remember(self, tensor: Tensor, origin: int) -> None:
        self.origins[id(tensor)] = weakref.ref(tensor), origin

    def _origin(self, tensor: Tensor) -> int | None:
        if id(tensor) not in self.origins:
            return None
        reference, origin = self.origins[id(tensor)]
        return origin if reference() is tensor else None

    def _parents(self, tensors: list[Tensor]) -> tuple[int, ...]:
        """The calls that tensors come from: the latest where none of them is known.

        That is right for what a layer computes between the layers inside it.
        """
        origins = set(map(self._origin, tensors))
        known = sorted(origin for origin in origins if origin is not None)
        if known or not tensors or not self.calls:
            return tuple(known)
        return (len(self.calls) - 1,)


def first_float(structure: Any) -> Tensor | None:
    """The first float tensor that is not empty."""
    tensors = tree.flatten(structure)
    return next((t for t in tensors if is_float(t) and math.prod(t.shape)), None)


def replaced(structure: Any, tensor: Tensor, other: Tensor) -> Any:
    """The structure with another tensor in the place of one."""
    return tree.map_structure(lambda each: other if each is tensor else each, structure)


def _std(values: np.ndarray) -> float:
    return moments(values).std


class _Place:
    """Where calls of layers are seen: in one thread, one trace and one call of the model.

    A call that is traced for itself has no values, or is repeated on the way back.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.trace = backends.current_trace()
        self.unseen: dict[int, keras.Layer] = {}
        self.is_over = False

    def is_other_thread(self, layer: Any = None) -> bool:
        return threading.get_ident() != self.thread

    def is_elsewhere(self, layer: Any) -> bool:
        """Whether a call of the layer is not seen; notes it if it belongs to this one."""
        if self.is_other_thread() or self.is_over:
            return True
        is_traced = backends.current_trace() != self.trace
        if is_traced:
            self.unseen[id(layer)] = layer
        return is_traced


@contextlib.contextmanager
def _replaced_call(
    layer: Any, wrapper: Callable, is_elsewhere: Callable[[Any], bool]
) -> Iterator[None]:
    is_quantized = getattr(layer, "quantization_mode", None)
    name = "quantized_call" if is_quantized else "call"
    call = getattr(layer, name)

    @functools.wraps(call)
    def replaced_call(*args: Any, **kwargs: Any) -> Any:
        if is_elsewhere(layer):
            return call(*args, **kwargs)
        return wrapper(call, *args, **kwargs)

    with replaced_attribute(layer, name, replaced_call):
        yield


def _replaced_remat(is_other_thread: Callable[[], bool]) -> Any:
    remat = keras.remat

    def replaced_remat(function: Callable) -> Callable:
        return remat(function) if is_other_thread() else function

    return replaced_attribute(keras, "remat", replaced_remat)


def _call_in_training(call: Callable, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("training", None)
    return call(inputs, True, *args[1:], **kwargs)


def _compiled_methods(layer: keras.Layer) -> dict[str, Callable]:
    """By name, the Python functions in what a layer holds of `tf.function` or `jax.jit`.

    Those of its class and its own attributes, but not of the classes of Keras.
    """
    methods = {}
    for kind in reversed(type(layer).__mro__):
        if not kind.__module__.startswith("keras."):
            for name, value in vars(kind).items():
                methods.pop(name, None)
                if function := backends.python_function(value):
                    methods[name] = types.MethodType(function, layer)
    for name, value in vars(layer).items():
        if function := backends.python_function(value):
            methods[name] = function
    return methods


def _first_line(error: Exception) -> str:
    return error_reason(error).splitlines()[0].removesuffix(".")
