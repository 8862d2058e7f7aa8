"""The kernels of a model in its graph, each with the kernels that feed it.

All of it is derived here, once for a model: from the graph, which is known without data, or
from the calls of one pass where the model can't be called on symbolic tensors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from keras_glorot._keras.graph import Graph, Step, trace
from keras_glorot._models.passes import (
    Batch,
    Call,
    arguments_of,
    lock,
    record,
)
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.gains import is_wave
from keras_glorot.layer_rules import is_normalization, kernel_activation

__all__ = ["Flow", "Kernel", "Kinds", "flow_of_calls", "flow_of_graph", "flow_of_model"]

tree: Any = keras.tree

Kinds = frozenset[str]

# The steps between kernels, by the names of layers and operations in lower case.
_KINDS = {
    "softmax": ("softmax", "logsoftmax", "exp", "attention", "additiveattention",
                "dotproductattention"),
    "gate": ("sigmoid", "hardsigmoid", "logsigmoid"),
    "addition": ("add", "average", "subtract"),
    "product": ("multiply",),
    "concatenation": ("concatenate", "stack", "hstack", "vstack"),
    "wave": ("sin", "cos"),
}  # fmt: skip
_KIND_BY_NAME = {name: kind for kind, names in _KINDS.items() for name in names}
_POOLINGS = ("mean", "max", "sum", "averagepool", "maxpool")
# Which of their three inputs, the values, passes by the softmax of queries and keys.
_VALUES = {"dotproductattention": 2, "attention": 1, "additiveattention": 1}
# Of two tensors they mean something only together.
_JOINS = ("addition", "product")
# Operations that multiply by a kernel if only one of their arguments comes from the inputs.
_PRODUCTS = ("matmul", "dot", "einsum", "tensordot", "conv", "depthwiseconv",
             "separableconv", "convtranspose")  # fmt: skip

# These multiply by no kernel, whatever the weight is called that they take.
_ELEMENTWISE = ("add", "subtract", "multiply", "divide", "truedivide")


class Kernel(NamedTuple):
    """One call of a layer with a kernel.

    Attributes:
        layer: The layer; None where the graph does not tell.
        call: Its place among the calls of the layer.
        sources: By position of the kernel calls that feed it without another kernel
            between: through which kinds of steps.
        inputs: Which inputs of the model reach it.
        kinds: Through which kinds its output goes, to the next kernel or the end.
        is_head: Whether its output reaches an output of the model without another kernel.
    """

    layer: Any
    call: int
    sources: dict[int, Kinds]
    inputs: frozenset[int]
    kinds: Kinds
    is_head: bool


class Flow(NamedTuple):
    """The kernels of a model and what is between them.

    Attributes:
        kernels: The calls of layers with a kernel, in an order in which they can be done.
        sums: Where something is added to what passes by, the term with the fewest kernels
            before it: positions of the kernel calls that put out what is added.
        stem: The layer of the first kernel, if a learned table is added to its output.
    """

    kernels: list[Kernel]
    sums: list[tuple[int, ...]]
    stem: Any

    def of_layer(self, layer: Any) -> list[Kernel]:
        """Its kernel calls, without those that feed another one of them."""
        mine = [i for i, kernel in enumerate(self.kernels) if kernel.layer is layer]
        inside = {source for i in mine for source in self.kernels[i].sources}
        return [self.kernels[i] for i in mine if i not in inside]

    def rows(self, layers: Sequence[Any]) -> list[int | None]:
        """For each kernel, the position in a list of called layers, if it is there."""
        rows: list[int | None] = [None] * len(self.kernels)
        for layer in {id(each): each for each in layers}.values():
            mine = [i for i, kernel in enumerate(self.kernels) if kernel.layer is layer]
            mine.sort(key=lambda i: self.kernels[i].call)
            calls = [row for row, each in enumerate(layers) if each is layer]
            for k, i in enumerate(mine):  # a call may use several kernels
                rows[i] = calls[k * len(calls) // len(mine)]
        return rows

    def is_head(self, layer: Any) -> bool:
        """Whether the outputs of the model, or some of them, are the layer's."""
        return any(kernel.is_head for kernel in self.of_layer(layer))

    def leads_on(self, layer: Any) -> bool:
        """Whether other kernels take its output."""
        sources = {i for kernel in self.kernels for i in kernel.sources}
        return any(self.kernels[i].layer is layer for i in sources)

    def is_added(self, layer: Any) -> bool:
        """Whether its output is a term of a sum."""
        return any("addition" in kernel.kinds for kernel in self.of_layer(layer))

    def is_normalized(self, layer: Any) -> bool:
        """Whether a normalization follows, which gives its output a scale of its own."""
        calls = self.of_layer(layer)
        return bool(calls) and all("normalization" in call.kinds for call in calls)

    def feeds_gate(self, layer: Any) -> bool:
        """Whether a softmax follows, or a sigmoid that is a gate or an output.

        They have a scale of their own.
        """
        return any(
            "softmax" in kernel.kinds
            or ("gate" in kernel.kinds and (kernel.is_head or "product" in kernel.kinds))
            for kernel in self.of_layer(layer)
        )

    def feeds_wave(self, layer: Any) -> bool:
        """Whether a periodic activation follows."""
        return any("wave" in kernel.kinds for kernel in self.of_layer(layer))

    def takes_means(self, layer: Any) -> bool:
        """Whether it stands behind a pooling, or attention, which take means."""
        calls = self.of_layer(layer)
        kinds = frozenset().union(*(k for each in calls for k in each.sources.values()))
        return bool(kinds & {"pooling", "softmax"})

    def ends(self) -> list[Any]:
        """The layers that put out what is added to what passes by."""
        return [self.kernels[i].layer for ends in self.sums for i in ends]


def flow_of_model(survey: Survey, batch: Batch, training: bool) -> Flow:
    """By the graph or, where there is none, by the calls of one pass."""
    graph = _graph(survey, batch)
    graph = graph or _graph_of_calls(record(survey, batch, training).calls)
    return flow_of_graph(graph, survey)


def flow_of_calls(survey: Survey, batch: Batch, calls: Sequence[Call]) -> Flow:
    """By the graph or, where there is none, by these calls."""
    return flow_of_graph(_graph(survey, batch) or _graph_of_calls(calls), survey)


def _graph(survey: Survey, batch: Batch) -> Graph | None:
    """None if the model, or a layer with kernels in it, can't be looked into."""

    def symbol(tensor: Any) -> Any:
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        return keras.KerasTensor(tuple(tensor.shape), dtype)

    args, kwargs = arguments_of(survey.root, tree.map_structure(symbol, batch.x))
    try:
        with lock:
            graph = trace(survey, (tuple(args), {**kwargs, "training": False}))
    except Exception:  # it does what only values allow
        return None
    owners = {id(weight.owner) for weight in survey.weights if _is_kernel(weight)}
    hidden = {id(layer) for closed in graph.closed for layer in survey.below(closed)[1:]}
    return None if owners & hidden or not graph.outputs else graph


def _graph_of_calls(calls: Sequence[Call]) -> Graph:
    """Each call as a step: bare operations between the layers are not seen."""
    calls = calls[:-1] or calls  # without the model's own
    inputs = sorted({p for call in calls for p in call.parents if p < 0}, reverse=True)
    numbers = {parent: i for i, parent in enumerate([*inputs, *range(len(calls))])}
    steps = [
        Step(
            call.layer, ((), {}), tuple(numbers[p] for p in call.parents), (numbers[i],), i
        )
        for i, call in enumerate(calls)
    ]
    shapes = [*[()] * len(inputs), *(call.shape for call in calls)]
    tensors = [keras.KerasTensor(shape, "float32") for shape in shapes]
    taken = {number for step in steps for number in step.inputs}
    last = tuple(step.outputs[0] for step in steps if step.outputs[0] not in taken)
    return Graph(steps, tensors, tuple(range(len(inputs))), last, [])


def _is_kernel(weight: Weight) -> bool:
    """Whether it multiplies what passes: no table to look up, or to add."""
    name = weight.variable.name
    is_float = keras.backend.is_float_dtype(weight.variable.dtype)
    is_named = "kernel" in name and "embedding" not in name
    return is_float and weight.fans is not None and (weight.is_kernel or is_named)


def _is_table(weight: Weight) -> bool:
    """Whether it is a learned table, such as of positions: its scale is left as it is."""
    variable = weight.variable
    is_learned = variable.trainable and keras.backend.is_float_dtype(variable.dtype)
    return is_learned and not _is_kernel(weight) and _is_wide(variable)


def _is_wide(array: Any) -> bool:
    return sum(size > 1 for size in getattr(array, "shape", ())) > 1


class _Walk:
    """One walk over the steps, from the inputs to the outputs."""

    def __init__(self, graph: Graph, layers: dict[int, Any]):
        self.graph, self.layers = graph, layers
        self.kernels: list[Kernel] = []
        # By number of each tensor: the kernels that reach it without another one between,
        # and through which kinds; which inputs reach it; past how many kernels at least.
        self.behind: dict[int, dict[int, Kinds]] = {}
        self.inputs = {number: frozenset({number}) for number in graph.inputs}
        self.depths: dict[int, int] = {}
        self.others = [step for step in graph.steps if not self._follow(step)]

    def floats(self, step: Step) -> list[int]:
        """The inputs of a step that a signal can come by."""
        return [i for i in step.inputs if "float" in str(self.graph.tensors[i].dtype)]

    def _follow(self, step: Step) -> bool:
        """Whether the step multiplies by a kernel."""
        inputs, layer = self.floats(step), self._kernel_layer(step)
        sources = self._reaching(step, _kind(step) if layer is None else "", inputs)
        depth = min((self.depths.get(number, 0) for number in inputs), default=0)
        reached = frozenset().union(
            *(self.inputs.get(number, frozenset()) for number in step.inputs)
        )
        if layer is not None:
            known = None if layer is _UNKNOWN else layer
            kernel = Kernel(known, step.call, sources, reached, frozenset(), False)
            self.kernels.append(kernel)
            inner = getattr(step.operation, "layer", step.operation)  # of a TimeDistributed
            own = _activation_kind(kernel_activation(inner))
            sources = {len(self.kernels) - 1: frozenset({own} - {""})}
            depth += 1
        for number in step.outputs:
            self.behind[number] = sources
            self.inputs[number] = reached
            self.depths[number] = depth
        return layer is not None

    def _kernel_layer(self, step: Step) -> Any:
        """The layer whose kernel the step multiplies by, or None."""
        if id(step.operation) in self.layers:
            return self.layers[id(step.operation)]
        if isinstance(step.operation, keras.Layer) or _name(step.operation) in _ELEMENTWISE:
            return None
        for argument in tree.flatten(step.arguments):
            if id(argument) in self.layers:
                return self.layers[id(argument)]
        is_product = _name(step.operation) in _PRODUCTS and len(step.inputs) == 1
        return _UNKNOWN if is_product else None

    def _reaching(self, step: Step, kind: str, inputs: Sequence[int]) -> dict[int, Kinds]:
        """The kernels that reach the step, with its own kind."""
        merged: dict[int, Kinds] = {}
        values = _VALUES.get(_name(step.operation)) if len(inputs) > 2 else None
        for position, number in enumerate(inputs):
            own = "" if position == values else kind
            for i, through in self.behind.get(number, {}).items():
                known = merged.get(i, through)
                both = known | through
                if kind == "product" and "gate" in known ^ through:
                    both -= {"gate"}  # times its own sigmoid: an activation, SiLU
                merged[i] = both | ({own} - {""})
        return merged


def flow_of_graph(graph: Graph, survey: Survey) -> Flow:
    weights = survey.weights
    # By `id` of layers and of variables: the layer that is called.
    layers: dict[int, Any] = {}
    for weight in filter(_is_kernel, weights):
        owner = survey.loops.get(id(weight.owner), weight.owner)
        layers |= {id(owner): owner, id(weight.variable): owner}
    walk = _Walk(graph, layers)
    kinds: list[Kinds] = [frozenset()] * len(walk.kernels)
    at_end = [walk.behind.get(number, {}) for number in graph.outputs]
    for reached in [*(kernel.sources for kernel in walk.kernels), *at_end]:
        for i, through in reached.items():
            kinds[i] |= through
    heads = {i for reached in at_end for i in reached}
    kernels = [
        kernel._replace(kinds=kinds[i], is_head=i in heads)
        for i, kernel in enumerate(walk.kernels)
    ]
    tables = {id(weight.owner) for weight in weights if _is_table(weight)} - layers.keys()
    return Flow(kernels, _sums(walk, kinds), _stem(walk, tables))


def _sums(walk: _Walk, kinds: list[Kinds]) -> list[tuple[int, ...]]:
    """The additions, without those that belong to the scores of a softmax."""
    sums = []
    for step in walk.others:
        terms, total = walk.floats(step), step.outputs[0]
        is_score = any("softmax" in kinds[i] for i in walk.behind[total])
        # One kernel alone makes no sum, as where a mean is taken off.
        behind = {frozenset(walk.behind.get(number, {})) for number in terms}
        if _kind(step) != "addition" or len(behind) < 2 or is_score:
            continue
        depths = [walk.depths.get(number, 0) for number in terms]
        least = min(depths)
        pairs = zip(terms, depths, strict=True)
        branches = [number for number, depth in pairs if depth > least] or terms[-1:]
        ends = [_end(walk.behind.get(number, {})) for number in branches]
        sums.append(tuple(i for i in ends if i is not None))
    return sums


def _end(behind: dict[int, Kinds]) -> int | None:
    """The kernel that ends a branch, unless a normalization gives that its own scale."""
    scaled = {"normalization", "softmax", "gate"}
    return max((i for i, through in behind.items() if not through & scaled), default=None)


def _stem(walk: _Walk, tables: set[int]) -> Any:
    """The layer of a first kernel, if nothing but a learned table is added to its output.

    `tables` are the layers that have one, by `id`.
    """
    from_tables: set[int] = set()
    for step in walk.others:
        sources, is_own = walk.behind[step.outputs[0]], id(step.operation) in tables
        has_table = is_own or bool(from_tables.intersection(step.inputs))
        has_table |= any(
            _is_wide(argument) and (bool(tables) or getattr(argument, "trainable", False))
            for argument in tree.flatten(step.arguments)
            if not isinstance(argument, keras.KerasTensor)
        )
        is_sum = is_own or _name(step.operation) == "add"
        if has_table and not sources:
            from_tables.update(step.outputs)
        elif has_table and is_sum and len(sources) == 1:
            (first,) = sources
            if not walk.kernels[first].sources:
                return walk.kernels[first].layer
    return None


_UNKNOWN = object()  # stands for a layer that the graph does not tell


def _name(operation: Any) -> str:
    return type(operation).__name__.lower()


def _kind(step: Step) -> str:
    """The kind of a step without a kernel; "" where it passes things on."""
    operation, name = step.operation, _name(step.operation)
    kind = _KIND_BY_NAME.get(name, "")
    if name == "activation":
        return _activation_kind(operation.activation)
    if isinstance(operation, keras.Layer) and is_normalization(operation):
        return "normalization"
    if "pool" in name or name in _POOLINGS:
        return "pooling"
    return "" if kind in _JOINS and len(step.inputs) == 1 else kind


def _activation_kind(activation: Any) -> str:
    name = getattr(activation, "__name__", "")
    if kind := _KIND_BY_NAME.get(name.replace("_", "")):
        return kind
    if activation is None or hasattr(keras.activations, name):
        return ""
    return "wave" if is_wave(activation) else ""
