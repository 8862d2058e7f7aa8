"""What the graph of a model says about its kernels: what feeds them, and what they feed.

All of it is derived here, once for a model: from the graph, which is known without data, or
from the calls of one pass where the model can't be called on symbolic tensors.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras

from keras_glorot._keras.bridge import additions, sublayers
from keras_glorot._keras.graph import Graph, Step, trace
from keras_glorot._models.passes import Batch, Call, arguments_of, loops_around, record
from keras_glorot._models.survey import Weight
from keras_glorot.layer_rules import is_normalization

__all__ = ["Flow", "Kernel", "Place", "Sum", "flow_of_calls", "flow_of_model"]

tree: Any = keras.tree

Kinds = frozenset[str]

# What stands between kernels, by the names of layers and operations in lower case.
_KINDS = {
    "softmax": ("softmax", "logsoftmax", "exp", "attention", "additiveattention"),
    "gate": ("sigmoid", "hardsigmoid", "logsigmoid"),
    "addition": ("add",),
    "product": ("multiply",),
    "concatenation": ("concatenate", "stack", "hstack", "vstack"),
    "activation": ("activation", "relu", "relu6", "leakyrelu", "prelu", "elu", "selu",
                   "celu", "gelu", "silu", "hardsilu", "swish", "mish", "tanh", "softplus",
                   "softsign", "hardtanh", "sin", "cos", "erf"),
    "reshape": ("reshape", "flatten", "permute", "transpose", "expanddims", "squeeze",
                "moveaxis", "swapaxes", "repeatvector", "getitem", "split", "pad",
                "broadcastto"),
    "": ("converttotensor", "cast", "dropout", "identity", "rescaling"),
}  # fmt: skip
_KIND_BY_NAME = {name: kind for kind, names in _KINDS.items() for name in names}
_POOLINGS = ("mean", "max", "sum", "averagepool", "maxpool")
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


class Sum(NamedTuple):
    """An addition of several tensors of the model.

    Attributes:
        total, terms: The numbers of the tensors.
        ends: Positions of the kernel calls that put out what is added to the term that
            passes by: the one with the fewest kernels before it.
    """

    total: int
    terms: tuple[int, ...]
    ends: tuple[int, ...]


class Place(NamedTuple):
    """Where a call can see a tensor: as its first input or its first output."""

    operation: Any
    call: int
    is_input: bool


class Flow(NamedTuple):
    """The kernels of a model and what is between them.

    Attributes:
        kernels: The calls of layers with a kernel, in an order in which they can be done.
        sums: Where something is added to what passes by.
        stem: The layer of the first kernel, if a learned table is added to its output.
        places: By number of the tensor.
    """

    kernels: list[Kernel]
    sums: list[Sum]
    stem: Any
    places: dict[int, Place]

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

    def feeds_gate(self, layer: Any) -> bool:
        """Whether a softmax or a sigmoid follows, which have a scale of their own."""
        return any(kernel.kinds & {"softmax", "gate"} for kernel in self.of_layer(layer))

    def ends(self) -> list[Any]:
        """The layers that put out what is added to what passes by."""
        return [self.kernels[i].layer for each in self.sums for i in each.ends]


def flow_of_model(
    model: keras.Layer, batch: Batch, weights: Sequence[Weight], training: bool
) -> Flow:
    """By the graph or, where there is none, by the calls of one pass."""
    graph = _graph(model, batch, weights)
    if graph is None:
        calls, _ = record(model, batch, training)
        graph = _graph_of_calls(calls)
    return _Derivation(graph, model, weights).flow()


def flow_of_calls(model: keras.Layer, batch: Batch, calls: Sequence[Call]) -> Flow:
    """By the graph or, where there is none, by these calls."""
    weights = [call.weight for call in calls if call.weight is not None]
    graph = _graph(model, batch, weights) or _graph_of_calls(calls)
    return _Derivation(graph, model, weights).flow()


def _graph(model: keras.Layer, batch: Batch, weights: Sequence[Weight]) -> Graph | None:
    """None if the model, or a layer with kernels in it, can't be looked into."""

    def symbol(tensor: Any) -> Any:
        return keras.KerasTensor(tuple(tensor.shape), tensor_dtype(tensor))

    def tensor_dtype(tensor: Any) -> str:
        return keras.backend.standardize_dtype(tensor.dtype)

    args, kwargs = arguments_of(model, tree.map_structure(symbol, batch.x))
    try:
        graph = trace(model, (tuple(args), {**kwargs, "training": False}))
    except Exception:  # it does what only values allow
        return None
    owners = {id(weight.owner) for weight in weights if is_kernel(weight)}
    hidden = {id(layer) for closed in graph.closed for layer in sublayers(closed)[1:]}
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


def is_kernel(weight: Weight) -> bool:
    """Whether it multiplies what passes: no table to look up, or to add."""
    name = weight.variable.name
    is_float = keras.backend.is_float_dtype(weight.variable.dtype)
    is_named = "kernel" in name and "embedding" not in name
    return is_float and weight.fans is not None and (weight.is_kernel or is_named)


def is_table(weight: Weight) -> bool:
    """Whether it is a learned table, such as of positions: its scale is left as it is."""
    variable = weight.variable
    is_learned = variable.trainable and keras.backend.is_float_dtype(variable.dtype)
    return is_learned and not is_kernel(weight) and _is_wide(variable)


def _is_wide(array: Any) -> bool:
    return sum(size > 1 for size in getattr(array, "shape", ())) > 1


class _Derivation:
    """One walk over the steps, from the inputs to the outputs."""

    def __init__(self, graph: Graph, model: keras.Layer, weights: Iterable[Weight]):
        self.graph = graph
        loops = loops_around(model)
        # By `id` of layers and of variables: the layer that is called.
        self.layers: dict[int, Any] = {}
        self.tables: set[int] = set()
        for weight in weights:
            owner = loops.get(id(weight.owner), weight.owner)
            if is_kernel(weight):
                self.layers |= {id(owner): owner, id(weight.variable): owner}
            elif is_table(weight):
                self.tables |= {id(owner), id(weight.variable)}
        self.visible = {id(each) for each in (*sublayers(model), *additions(model))}
        self.kernels: list[Kernel] = []
        self.sums: list[Sum] = []
        self.stem: Any = None
        # By number of each tensor: the kernels that reach it without another one between,
        # and through which kinds; which inputs reach it; past how many kernels at least.
        self.behind: dict[int, dict[int, Kinds]] = {}
        self.inputs = {number: frozenset({number}) for number in graph.inputs}
        self.depths: dict[int, int] = {}
        self.from_tables: set[int] = set()

    def flow(self) -> Flow:
        for step in self.graph.steps:
            self._follow(step)
        kinds: list[Kinds] = [frozenset()] * len(self.kernels)
        at_end = [self.behind.get(number, {}) for number in self.graph.outputs]
        for reached in [*(kernel.sources for kernel in self.kernels), *at_end]:
            for i, through in reached.items():
                kinds[i] |= through
        heads = {i for reached in at_end for i in reached}
        kernels = [
            kernel._replace(kinds=kinds[i], is_head=i in heads)
            for i, kernel in enumerate(self.kernels)
        ]
        # What belongs to the scores of a softmax is no sum that passes by.
        sums = [
            each
            for each in self.sums
            if not any("softmax" in kinds[i] for i in self.behind[each.total])
        ]
        return Flow(kernels, sums, self.stem, self._places())

    def _follow(self, step: Step) -> None:
        inputs = [i for i in step.inputs if "float" in str(self.graph.tensors[i].dtype)]
        layer = self._kernel_layer(step)
        kind = _kind(step) if layer is None else ""
        sources = self._reaching(step, kind, inputs)
        depth = min((self.depths.get(number, 0) for number in inputs), default=0)
        reached = frozenset().union(
            *(self.inputs.get(number, frozenset()) for number in step.inputs)
        )
        if layer is not None:
            known = None if layer is _UNKNOWN else layer
            kernel = Kernel(known, step.call, sources, reached, frozenset(), False)
            self.kernels.append(kernel)
            inner = getattr(step.operation, "layer", step.operation)  # of a TimeDistributed
            own = _activation_kind(getattr(inner, "activation", None))
            sources = {len(self.kernels) - 1: frozenset({own} - {""})}
            depth += 1
        else:
            self._note_table(step, inputs, sources)
            if kind == "addition" and len(inputs) > 1:
                self._note_sum(step, inputs)
        for number in step.outputs:
            self.behind[number] = sources
            self.inputs[number] = reached
            self.depths[number] = depth

    def _kernel_layer(self, step: Step) -> Any:
        """The layer whose kernel the step multiplies by, or None."""
        if id(step.operation) in self.layers:
            return self.layers[id(step.operation)]
        if isinstance(step.operation, keras.Layer) or _name(step.operation) in _ELEMENTWISE:
            return None
        for argument in tree.flatten(step.arguments):
            if id(argument) in self.layers:
                return self.layers[id(argument)]
        is_product = _name(step.operation) in _PRODUCTS and len(set(step.inputs)) == 1
        return _UNKNOWN if is_product else None

    def _reaching(self, step: Step, kind: str, inputs: Sequence[int]) -> dict[int, Kinds]:
        """The kernels that reach the step, with its own kind."""
        merged: dict[int, Kinds] = {}
        is_attention = _name(step.operation) == "dotproductattention"
        for position, number in enumerate(inputs):
            own = kind
            if is_attention:  # the values pass by the softmax of queries and keys
                own = "softmax" if position < 2 else ""
            for i, through in self.behind.get(number, {}).items():
                known = merged.get(i, through)
                both = known | through
                if kind == "product" and "gate" in known ^ through:
                    both -= {"gate"}  # times its own sigmoid: an activation, SiLU
                merged[i] = both | ({own} - {""})
        return merged

    def _note_table(
        self, step: Step, inputs: Sequence[int], sources: dict[int, Kinds]
    ) -> None:
        """The first kernel, with nothing but a table added to its output, is the stem."""
        others = [
            argument
            for argument in tree.flatten(step.arguments)
            if not isinstance(argument, keras.KerasTensor)
            and _is_wide(argument)
            and (self.tables or getattr(argument, "trainable", False))
        ]
        is_own = id(step.operation) in self.tables
        with_table = self.from_tables.intersection(inputs) or others or is_own
        if not with_table:
            return
        is_sum = is_own or _name(step.operation) == "add"
        if self.stem is None and is_sum and list(sources) == [0] and len(self.kernels) == 1:
            self.stem = self.kernels[0].layer
        if not sources:
            self.from_tables.update(step.outputs)

    def _note_sum(self, step: Step, inputs: Sequence[int]) -> None:
        depths = [self.depths.get(number, 0) for number in inputs]
        branches = [
            number
            for number, depth in zip(inputs, depths, strict=True)
            if depth > min(depths)
        ] or inputs[-1:]
        ends = []
        for number in branches:
            # A normalization gives the branch a scale of its own, as scores have one.
            own = [
                i
                for i, through in self.behind.get(number, {}).items()
                if not through & {"normalization", "softmax", "gate"}
            ]
            ends += [max(own)] if own else []
        self.sums.append(Sum(step.outputs[0], tuple(inputs), tuple(ends)))

    def _places(self) -> dict[int, Place]:
        """Where a call sees each tensor: as its output or, else, as its first input."""
        as_outputs: dict[int, Place] = {}
        as_inputs: dict[int, Place] = {}
        same: dict[int, int] = {}  # what only was cast, or made a tensor
        calls: dict[int, list[int]] = {}
        for step in self.graph.steps:
            calls.setdefault(id(step.operation), []).append(step.call)
        for step in self.graph.steps:
            operation = step.operation
            if _name(operation) in ("converttotensor", "cast"):
                same[step.outputs[0]] = same.get(step.inputs[0], step.inputs[0])
            if id(operation) in self.visible:
                call = sorted(calls[id(operation)]).index(step.call)
                as_outputs[step.outputs[0]] = Place(operation, call, False)
                for number in step.inputs[:1]:
                    place = Place(operation, call, True)
                    as_inputs.setdefault(same.get(number, number), place)
        return as_inputs | as_outputs


_UNKNOWN = object()  # stands for a layer that the graph does not tell


def _name(operation: Any) -> str:
    return type(operation).__name__.lower()


def _kind(step: Step) -> str:
    """The kind of a step without a kernel; "" where it passes things on."""
    operation, name = step.operation, _name(step.operation)
    kind = _KIND_BY_NAME.get(name, "unknown")
    if name == "activation":
        return _activation_kind(operation.activation)
    if isinstance(operation, keras.Layer) and is_normalization(operation):
        return "normalization"
    if "pool" in name or name in _POOLINGS:
        return "pooling"
    return "" if kind in _JOINS and len(step.inputs) == 1 else kind


def _activation_kind(activation: Any) -> str:
    name = getattr(activation, "__name__", "").replace("_", "")
    if activation is None or name == "linear":
        return ""
    kind = _KIND_BY_NAME.get(name, "activation")
    return kind if kind in ("softmax", "gate") else "activation"
