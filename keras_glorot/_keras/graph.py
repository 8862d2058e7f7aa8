"""The graph of a model: every operation on its tensors, in order, without data.

Keras calls a layer on `KerasTensor`s to learn the shape of its output. Here each layer that
holds others is called so from the inside, by its own `call`: then every layer in it, and
every operation between them, says what it takes and what it gives. No value is computed.
"""

import contextlib
import dataclasses
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras

from keras_glorot import _backends as backends
from keras_glorot._keras.state import unmoved_generators
from keras_glorot._keras.tree import Tree

try:
    from keras.src.layers import layer as keras_layer
except ImportError:  # then layers that also return None or values are not looked into
    keras_layer = None

__all__ = ["LOOPS", "Graph", "Step", "replaced_attribute", "trace"]

tree: Any = keras.tree

# These call the layer inside them in a loop, which backends trace: it can't be looked into.
LOOPS = (keras.layers.RNN, keras.layers.TimeDistributed)


class Step(NamedTuple):
    """One operation on tensors.

    Attributes:
        operation: A layer, or an operation of `keras.ops`, such as `Add`.
        arguments: Those of the call: `(args, kwargs)`.
        inputs: The numbers of the tensors in `arguments`, in order.
        outputs: The numbers of the tensors that it returned.
        call: Its place among the calls of the operation: these have the order of the code.
    """

    operation: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    call: int = 0


@dataclasses.dataclass(frozen=True)
class Graph:
    """The steps of a model in an order in which they can be done.

    Attributes:
        steps: The steps that the outputs need.
        tensors: By number: the shape and dtype of each tensor, a `KerasTensor`.
        inputs, outputs: The numbers of the tensors that the model takes and returns.
        closed: The layers with sublayers that could not be looked into.
        read: By `id`, the variables whose values the `call` of a layer took from another
            one, or turned before it used them.
    """

    steps: list[Step]
    tensors: list[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    closed: list[keras.Layer]
    read: frozenset[int] = frozenset()

    @functools.cached_property
    def makers(self) -> dict[int, Step]:
        """By number of the tensor, the step that returned it."""
        return {number: step for step in self.steps for number in step.outputs}

    def consumers(self, number: int) -> list[Step]:
        """The steps that take a tensor."""
        return self._consumers.get(number, [])

    @functools.cached_property
    def _consumers(self) -> dict[int, list[Step]]:
        consumers: dict[int, list[Step]] = {}
        for step in self.steps:
            for number in set(step.inputs):
                consumers.setdefault(number, []).append(step)
        return consumers

    def ancestors(self, step: Step) -> set[int]:
        """The tensors that a step needs, directly or not."""
        found: set[int] = set()
        waiting = list(step.inputs)
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += self.makers[number].inputs if number in self.makers else ()
        return found


def trace(walked: Tree, inputs: Any = None) -> Graph:
    """Calls a built model without data, and notes what it does.

    Args:
        walked: The layers of a built layer or model.
        inputs: Its inputs, as a structure of tensors of which the shapes and dtypes are
            used: `(args, kwargs)`. Defaults to those that it was built with.

    Raises:
        ValueError: If the shapes of its inputs are not known.
        Exception: Whatever the model raises.
    """
    arguments = inputs or _built_on(walked.root)
    with _ONE_TRACE, unmoved_generators():  # layers may draw in their call
        return backends.outside_traces(_trace, walked, arguments)


_ONE_TRACE = threading.Lock()
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _trace(walked: Tree, arguments: Arguments) -> Graph:
    """With those sizes for unknown ones that let most layers be looked into."""
    tensors = filter(_is_symbol, tree.flatten(arguments))
    is_unknown = any(None in each.shape[1:] for each in tensors)
    graphs: list[Graph] = []
    errors: list[Exception] = []
    for size in _SIZES if is_unknown else (None,):
        sized = tree.map_structure(functools.partial(_with_sizes, size), arguments)
        try:
            graphs.append(_Tracer(walked).trace(sized))
        except Exception as error:  # too small for a convolution, too long for a table
            errors.append(error)
        else:
            if not graphs[-1].closed:
                break
    if not graphs:
        raise errors[-1]
    return min(graphs, key=lambda graph: len(graph.closed))


def _built_on(model: Any) -> Arguments:
    """Arguments like those that the model was built with."""
    if getattr(model, "_functional", None) is not None:  # a Sequential
        model = model._functional
    if hasattr(model, "_inputs_struct"):
        return (model._inputs_struct,), {}
    shapes = model._build_shapes_dict
    if not shapes:
        raise ValueError(
            "Argument `model` must be built on inputs of known shapes: call its "
            f"`build(input_shape)`. Received: model={model}"
        )
    dtype = model.input_dtype
    symbols = {
        name.removesuffix("_shape"): keras.KerasTensor(tuple(shape), dtype)
        for name, shape in shapes.items()
    }
    return (symbols.pop(next(iter(symbols))),), symbols


# Any number that a layer could not mistake for one of its own sizes.
_BATCH = 3
# For other unknown sizes. With None, a layer can't compute a causal mask, say. With the
# first, images can be halved often; some tables of positions are shorter.
_SIZES = (64, 8, None)


def _with_sizes(size: int | None, tensor: Any) -> Any:
    if not _is_symbol(tensor):
        return tensor
    first, rest = tensor.shape[:1], tensor.shape[1:]
    shape = (*(each or _BATCH for each in first), *(each or size for each in rest))
    return keras.KerasTensor(shape, keras.backend.standardize_dtype(tensor.dtype))


class _Reads(keras.StatelessScope):
    """Notes whose values are asked for. Keras's own layers do that in scopes of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def get_current_value(self, variable: keras.Variable) -> Any:
        self.ids.add(id(variable))
        return super().get_current_value(variable)


class _Tracer:
    def __init__(self, walked: Tree):
        self.walked = walked
        # Of each copy, by `id`, the tensor that it stands for. Kept alive, for their ids.
        self.originals: dict[int, tuple[Any, Any]] = {}
        self.closed: dict[int, keras.Layer] = {}
        self.opened: set[int] = set()  # by `id`, those whose last call was looked into
        self.reads = _Reads()

    def trace(self, arguments: Arguments) -> Graph:
        args, kwargs = arguments
        with self.reads, backends.symbols_beside_values(), contextlib.ExitStack() as stack:
            make_node = getattr(keras_layer, "Node", None)
            if make_node is not None:
                node = functools.partial(self._node, make_node)
                stack.enter_context(replaced_attribute(keras_layer, "Node", node))
            for module in _modules_of_keras(self.walked.layers):
                stack.enter_context(_operations_on_symbols(module))
            for layer in self.walked.layers:
                stack.enter_context(_restored_nodes(layer))
                stack.enter_context(replaced_attribute(layer, "_called", True))
                if _is_open(layer, self.walked.children(layer)):
                    name, own = "symbolic_call", self._call_inside(layer)
                else:
                    name, own = "compute_output_spec", _with_all_sizes(layer)
                stack.enter_context(replaced_attribute(layer, name, own))
            outputs = self.walked.root(*args, **kwargs)
            return self._collect(tree.flatten(arguments), tree.flatten(outputs))

    def _call_inside(self, layer: Any) -> Callable:
        original = layer.symbolic_call

        def symbolic_call(*args: Any, **kwargs: Any) -> Any:
            self.opened.discard(id(layer))
            try:
                outputs = layer.call(*args, **kwargs)
            except Exception:  # it does what only values allow, or calls the backend
                outputs = None
            if not any(map(_is_symbol, tree.flatten(outputs))):
                if self.walked.children(layer):
                    self.closed[id(layer)] = layer
                return original(*args, **kwargs)
            self.opened.add(id(layer))
            return tree.map_structure(self._copy, outputs)

        return symbolic_call

    def _node(self, make: Callable, operation: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras notes calls that return tensors only: the steps in a layer are enough."""
        return None if id(operation) in self.opened else make(operation, *args, **kwargs)

    def _copy(self, tensor: Any) -> Any:
        """Keras notes on a tensor who made it last: that would be the outer layer."""
        if not _is_symbol(tensor):
            return tensor
        copy = keras.KerasTensor(tensor.shape, tensor.dtype)
        self.originals[id(copy)] = copy, tensor
        return copy

    def _original(self, tensor: Any) -> Any:
        while id(tensor) in self.originals:
            tensor = self.originals[id(tensor)][1]
        return tensor

    def _collect(self, inputs: list[Any], outputs: list[Any]) -> Graph:
        """From the outputs back to the inputs."""
        numbers: dict[int, int] = {}
        tensors: list[Any] = []
        steps: list[Step] = []
        done: set[int] = set()

        def number(tensor: Any) -> int:
            if id(tensor) not in numbers:
                numbers[id(tensor)] = len(tensors)
                tensors.append(tensor)
            return numbers[id(tensor)]

        first = tuple(number(each) for each in inputs if _is_symbol(each))
        last = [self._original(each) for each in outputs if _is_symbol(each)]
        waiting = [(tensor, False) for tensor in reversed(last)]
        while waiting:
            tensor, ready = waiting.pop()
            node = _node_of(tensor)
            if node is None or id(node) in done:
                continue
            sources = list(map(self._original, node.input_tensors))
            if not ready:
                waiting.append((tensor, True))
                waiting += [(source, False) for source in reversed(sources)]
                continue
            done.add(id(node))
            arguments = (node.arguments.args, node.arguments.kwargs)
            ins, outs = tuple(map(number, sources)), tuple(map(number, node.outputs))
            call = tensor._keras_history.node_index
            steps.append(Step(node.operation, arguments, ins, outs, call))
        ends = tuple(map(number, last))
        closed, read = list(self.closed.values()), frozenset(self.reads.ids)
        return Graph(steps, tensors, first, ends, closed, read)


def _modules_of_keras(layers: list[keras.Layer]) -> list[types.ModuleType]:
    """Those that define the layers."""
    kinds = {kind for layer in layers for kind in type(layer).__mro__}
    names = {kind.__module__ for kind in kinds if kind.__module__.startswith("keras.src.")}
    return [sys.modules[name] for name in sorted(names)]


def _operations_on_symbols(module: types.ModuleType) -> Any:
    """Keras's layers call `backend.ops` from 3.16 on: `keras.ops` does the same, and takes
    symbols, too."""
    backend = vars(module).get("backend")
    if not hasattr(backend, "ops"):
        return contextlib.nullcontext()
    own = types.SimpleNamespace(**{**vars(backend), "ops": keras.ops})
    return replaced_attribute(module, "backend", own)


def _with_all_sizes(layer: Any) -> Callable:
    """Sizes that the layer leaves open, as `EinsumDense` does, by way of its `call`."""
    original = layer.compute_output_spec

    def compute_output_spec(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        if _has_open_size(outputs) and not _has_open_size((args, kwargs)):
            with contextlib.suppress(Exception):  # it calls the backend by itself
                return keras.Operation.compute_output_spec(layer, *args, **kwargs)
        return outputs

    return compute_output_spec


def _has_open_size(values: Any) -> bool:
    return any(None in each.shape for each in tree.flatten(values) if _is_symbol(each))


def _is_symbol(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _node_of(tensor: Any) -> Any:
    history = getattr(tensor, "_keras_history", None)
    if history is None or history.operation is None:
        return None
    return history.operation._inbound_nodes[history.node_index]


def _is_open(layer: keras.Layer, children: list[keras.Layer]) -> bool:
    """Whether its own `call` says more than its class."""
    is_foreign = not type(layer).call.__module__.startswith("keras.")
    is_only_activation = all(isinstance(child, _ACTIVATIONS) for child in children)
    return not isinstance(layer, LOOPS) and (is_foreign or not is_only_activation)


# As in `Dense(8, activation=LeakyReLU())`.
_ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ELU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ReLU,
    keras.layers.Softmax,
)


@contextlib.contextmanager
def _restored_nodes(layer: Any) -> Iterator[None]:
    """Keras lists each symbolic call in the layer, and in the operations of a graph."""
    operations = [layer, *getattr(layer, "operations", ())]
    lists = [
        nodes
        for each in operations
        for nodes in (each._inbound_nodes, each._outbound_nodes)
    ]
    before = list(map(len, lists))
    try:
        yield
    finally:
        for nodes, length in zip(lists, before, strict=True):
            del nodes[length:]


@contextlib.contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of this one object, past Keras's tracking."""
    attributes: Any = vars(owner)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)
