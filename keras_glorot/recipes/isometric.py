"""The isometric start: kernels with which a network of any depth keeps all that goes in.

Units come in pairs with opposite weights, z and -z. The next kernel takes the two with
opposite signs, so that it sees f(z) - f(-z). For ReLU, GELU, SiLU and softplus that is just
z, for leaky ReLU (1 + slope) z. Between the pairs stands an orthogonal matrix, so the
network at its start is a linear isometry, whatever its depth. Training breaks the pairs at
once: their two units are active on different examples.

For other activations it is nearly a multiple of z where z is large, as for ELU, or small,
as for sigmoid. The kernel before gives z that level, and the next one takes it back. tanh
and its like have no pairs, for f(-z) says nothing new, but they have a level.

A kernel makes pairs only if everything that its output reaches can take them. Saxe et al.
(2014) and Pennington et al. (2017) say why an isometry trains at any depth; Balduzzi et al.
(2017) have the pairs, Xiao et al. (2018) the tap in the middle of a window.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.matrices import Matrices
from keras_glorot._drawing.mirrored import Mirror, Side
from keras_glorot._keras.calls import error_reason
from keras_glorot._keras.graph import Graph, Step, trace
from keras_glorot._models.kernel_maps import Map, depthwise_kernel, kernel_map
from keras_glorot._models.pairs import (
    Lost,
    Pairs,
    is_sum,
    line,
    measure_effect,
    step_activation,
    through,
)
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.gains import is_wave, known_gain
from keras_glorot.initializers import GlorotOrthogonal
from keras_glorot.layer_rules import is_normalization, kernel_matrices, layer_activation
from keras_glorot.recipes._start import Start, Starts

__all__ = ["isometric"]

YES = "yes"
_SMALL_BIAS = 0.05  # the std of Keras's random initializers; that of z is about 1
tree: Any = keras.tree


def isometric(survey: Survey) -> Starts:
    """Mirrored and orthogonal kernels, as the graph of the model allows."""
    unknown = "how its layer uses it is not known"
    drawn = _drawn(survey)
    try:
        graph = trace(survey)
        network = _Network(graph, survey)
        plans, chosen = _plan(network), network.chosen
        depthwise = _depthwise_kernels(graph)
    except Exception as error:  # from a layer of the user: anything
        unknown = f"the model can't be followed: {error_reason(error)}"
        plans, chosen, depthwise = {}, set(), set()
    starts = {}
    for key, weight in drawn.items():
        if key in chosen:
            starts[key] = _own(weight)
        elif key in plans:
            starts[key] = plans[key].start()
        elif key in depthwise:
            starts[key] = _tap(weight)
        else:
            starts[key] = _plain(weight, unknown)
    counts = Counter(start.columns["pairs"] for start in starts.values())
    note = f"{counts[YES]} of {len(starts)} kernels make pairs."
    return Starts(starts, ("pairs",), note)


def _drawn(survey: Survey) -> dict[int, Weight]:
    """By `id` of the variable, the kernels that are drawn here."""
    return {
        id(weight.variable): weight
        for weight in survey.weights
        if weight.is_kernel
        and not weight.reason
        and id(weight.variable) not in survey.elsewhere
    }


def _plain(weight: Weight, reason: str) -> Start:
    # A simple cell adds the output of its recurrent kernel: that is gain enough.
    is_sum = isinstance(weight.owner, keras.layers.SimpleRNNCell)
    gain = 1.0 if is_sum else known_gain(weight.activation) or 1.0
    initializer = GlorotOrthogonal(gain, seed=0)
    distribution = weight.distribution_of(initializer)
    assert distribution is not None
    return Start(type(initializer).__name__, distribution, {"pairs": reason})


def _own(weight: Weight) -> Start:
    reason = "its author chose its scale for the periodic activation that follows"
    return Start.own(weight)._replace(columns={"pairs": reason})


def _tap(weight: Weight) -> Start:
    """Each channel as it is, or copies of it."""
    matrices = kernel_matrices(weight.shape, weight.owner, weight.variable)
    distribution = Distribution.tap(1 / math.sqrt(matrices.columns), matrices)
    return Start("Identity", distribution, {"pairs": "it hands on those of its input"})


class _Plan(NamedTuple):
    """How a kernel is to be drawn.

    Attributes:
        map: The kernel, and how it maps.
        takes, makes: The pairs of its input and of its output, or the units of an odd
            activation; None where there are none.
        gain: The factor on inputs that are no pairs, for the activation that they went
            through.
        scale: A factor on all of it.
        reason: Why it makes no pairs; "" if it does.
    """

    map: Map
    takes: Pairs | None
    makes: Pairs | None
    gain: float
    scale: float
    reason: str

    def start(self) -> Start:
        m = self.map.matrices
        taken, slope = _flat(self.takes, self.map.inputs, m, m.inputs)
        made, level = _flat(self.makes, self.map.outputs, m, m.outputs)
        is_known = slope != 0
        factors = np.where(is_known, 1 / np.where(is_known, slope, 1), self.gain)
        inputs, outputs = (Side.of(partner, m.parts) for partner in (taken, made))
        inputs = inputs._replace(factors=inputs.factors * factors)
        outputs = outputs._replace(factors=outputs.factors * np.where(level, level, 1))
        mirror = Mirror(m, self.map.taps, inputs, outputs)
        has_pairs = (taken >= 0).any() or (made >= 0).any()
        name = "MirroredOrthogonal" if has_pairs else "Orthogonal"
        distribution = Distribution.mirrored(self.scale, mirror)
        return Start(name, distribution, {"pairs": self._verdict()})

    def _verdict(self) -> str:
        if self.makes and (self.makes.partner < 0).all():
            return "its activation is odd, so a pair is no more than one unit"
        return self.reason or YES


def _flat(
    pairs: Pairs | None, axes: Sequence[int], m: Matrices, own: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Partner and slope of each unit, all axes of units counted as one.

    `axes` are those of the tensor that the kernel's `own` ones stand for.
    """
    sizes = [m.shape[axis] for axis in own]
    if own == m.inputs:
        sizes[-1] *= m.parts  # a kernel has those of one group
    if pairs is None:
        return np.full(math.prod(sizes), -1), np.zeros(math.prod(sizes))
    at = axes.index(pairs.axis)
    places = np.arange(math.prod(sizes)).reshape(sizes)
    wide = [-1 if axis == at else 1 for axis in range(len(sizes))]
    partner = np.broadcast_to(pairs.partner.reshape(wide), sizes)
    slope = np.broadcast_to(pairs.slope.reshape(wide), sizes)
    other = np.take_along_axis(places, np.maximum(partner, 0), at)
    return np.where(partner < 0, -1, other).reshape(-1), slope.reshape(-1)


def _plan(network: "_Network") -> dict[int, _Plan]:
    """By `id` of the kernel, how each is to be drawn that has a map."""
    refused: dict[int, str] = {}
    while True:
        attempt = _Attempt(network, refused)
        more = attempt.refuse()
        if not more:
            return attempt.plans()
        refused |= more


class _Network:
    """A graph with what is asked of its steps again and again."""

    def __init__(self, graph: Graph, survey: Survey):
        self.graph = graph
        self.survey, self.drawn = survey, set(_drawn(survey))
        self.maps: list[tuple[Step, Map]] = []
        self.map_of: dict[int, Map] = {}  # by id of the step
        for step in graph.steps:
            found = kernel_map(step, graph)
            if found is not None:
                self.maps.append((step, found))
                self.map_of[id(step)] = found
        self.effect = functools.cache(measure_effect)
        self.is_wave = functools.cache(is_wave)
        self.chosen = set(self._find_chosen())
        self.drawn -= self.chosen
        self.used_elsewhere = self._find_used_elsewhere()

    def _find_chosen(self) -> Iterator[int]:
        """By `id`, the kernels that their author scaled for a periodic activation."""
        weights = _drawn(self.survey)
        for step, own in self.maps:
            weight = weights.get(id(own.variable))
            if weight and weight.is_scale_chosen and self._feeds_wave(step):
                yield id(own.variable)

    def _feeds_wave(self, step: Step) -> bool:
        function = self.activation(step)
        if function is not None:
            return self.is_wave(function)
        return any(
            self._feeds_wave(consumer)
            for consumer in self.graph.consumers(step.outputs[0])
            if self.activation(consumer) or line(consumer, self.graph)
        )

    def _find_used_elsewhere(self) -> set[int]:
        """By `id`, the variables that not only their own layer uses, in its own way."""
        found = set(self.graph.read)
        for step in self.graph.steps:
            used = [each for each in tree.flatten(step.arguments) if _is_variable(each)]
            if isinstance(step.operation, keras.Layer):
                own = self.map_of.get(id(step))
                kernels = [own and own.variable, depthwise_kernel(step.operation)]
                known = set(map(id, kernels))
                used += [each for each in step.operation.weights if id(each) not in known]
            found |= set(map(id, used))
        return found

    def check_kernel(self, kernel: keras.Variable, subject: str) -> None:
        """That it can make pairs, or take them."""
        if id(kernel) not in self.drawn:
            raise Lost(f"{subject} is not drawn with it")
        if id(kernel) in self.used_elsewhere:
            raise Lost(f"{subject} is used by another operation, too")

    def check_bias(self, layer: Any) -> None:
        """That it moves both units of a pair by the same, or by little."""
        bias = getattr(layer, "bias", None)
        for weight in self.survey.weights:
            if weight.variable is bias:
                drawn = self.survey.elsewhere.get(id(bias), weight.distribution)
                if drawn is None or drawn.std > _SMALL_BIAS:
                    raise Lost(f"the bias of {layer.name} is not the same for all units")

    def activation(self, step: Step) -> Callable[[Any], Any] | None:
        """The function that its output goes through, in it or as the step itself."""
        return _own_activation(step.operation) or step_activation(step.operation)

    def gains(self) -> list[float]:
        """Of each tensor, the factor that makes up for the activation that it went through
        last, and for the numbers that it was multiplied by since a kernel made it."""
        gains = [1.0] * len(self.graph.tensors)
        factors: dict[int, float] = {}  # of what a kernel made
        for step in self.graph.steps:
            function = self.activation(step)
            effect = function and self.effect(function)
            gain, factor = 1.0, None
            if id(step) in self.map_of:
                factor = 1.0
            elif step.inputs and not self._is_new(step):
                gain = gains[step.inputs[0]]
                factor = self._multiplied(factors.get(step.inputs[0]), step)
            if effect:
                gain = effect.gain
            for number in step.outputs:
                gains[number] = gain
                if factor is not None:
                    factors[number] = factor
        return [gain / factors.get(number, 1.0) for number, gain in enumerate(gains)]

    def _multiplied(self, factor: float | None, step: Step) -> float | None:
        found = line(step, self.graph)
        if factor is None or found is None:
            return factor
        return factor * math.sqrt(np.mean(found[0] ** 2))

    def _is_new(self, step: Step) -> bool:
        return is_normalization(step.operation) or is_sum(step)

    def level(self, step: Step) -> float:
        """The std of its output with which the activation after it has the right one."""
        factor = 1.0
        while (function := self.activation(step)) is None:
            consumers = self.graph.consumers(step.outputs[0])
            if not consumers or id(consumers[0]) in self.map_of:
                return 1.0
            step = consumers[0]
            factor = self._multiplied(factor, step) or factor
        effect = self.effect(function)
        return effect.level / factor if effect else 1.0

    def scales(self) -> dict[int, float]:
        """By `id` of the step, the factor on a kernel: on the ends of branches."""
        ends = self._branch_ends()
        # Outputs of ReLU and the like have a mean, and means add up faster than noise.
        powers = {end: 1.0 if has_mean else 0.5 for end, has_mean in ends.items()}
        return {end: len(ends) ** -power for end, power in powers.items()}

    def _branch_ends(self) -> dict[int, bool]:
        """By `id`, the kernels whose output is added to the input of their branch.

        Also whether an activation between makes it have a mean.
        """
        ends = {}
        for total in self.graph.steps:
            if is_sum(total):
                for number in total.inputs:
                    end, has_mean = self._last_kernel(number)
                    others = set(total.inputs) - {number}
                    if end and self.graph.ancestors(end) & others:
                        ends[id(end)] = has_mean
        return ends

    def _last_kernel(self, number: int) -> tuple[Step | None, bool]:
        """The kernel that made a tensor, without what undoes its scale after it."""
        step, has_mean = self.graph.makers.get(number), False
        while step and id(step) not in self.map_of:
            operation, function = step.operation, step_activation(step.operation)
            is_open = len(step.inputs) == 1 and not is_normalization(operation)
            if not is_open or (function and self.effect(function) is None):
                return None, False
            has_mean |= self._gives_mean(function)
            step = self.graph.makers.get(step.inputs[0])
        return step, has_mean or bool(step and self._gives_mean(self.activation(step)))

    def _gives_mean(self, function: Callable[[Any], Any] | None) -> bool:
        effect = function and self.effect(function)
        return bool(effect) and not effect.is_odd


class _Attempt:
    """Sends the pairs of all kernels on their way, but for those that are refused."""

    def __init__(self, network: _Network, refused: dict[int, str]):
        self.network, self.graph, self.refused = network, network.graph, refused
        # By `id` of the step: the pairs that its kernel takes, and the id of their kernel.
        self.arrived: dict[int, list[tuple[int, Pairs]]] = {}
        self.made: dict[int, Pairs] = {}
        self.reasons = dict(refused)
        for step, each in network.maps:
            if id(each.variable) not in refused:
                self._make(step, each)

    def _make(self, step: Step, own: Map) -> None:
        maker, m = id(own.variable), own.matrices
        count = m.shape[m.outputs[-1]]
        pairs = Pairs.neighbours(own.outputs[-1], count, m.parts)
        pairs = pairs.times(self.network.level(step))
        try:
            self.network.check_kernel(own.variable, "it")
            self.network.check_bias(step.operation)
            if (pairs.partner < 0).all():
                raise Lost("it has one unit")
            arrived = self._send(step, pairs)
            stays = {bool((sent.partner >= 0).any()) for _, sent in arrived}
            made = pairs.without_single() if True in stays else pairs.separated()
            if len(stays) > 1 or not made.equals(self.made.setdefault(maker, made)):
                raise Lost("activations of two kinds follow")
            for taker, sent in arrived:
                self.arrived.setdefault(id(taker), []).append((maker, sent))
        except Lost as lost:
            self.reasons[maker] = str(lost)

    def _send(self, step: Step, pairs: Pairs) -> list[tuple[Step, Pairs]]:
        """The steps whose kernels take its pairs, and these as they come in."""
        arrived: list[tuple[Step, Pairs]] = []
        own = _own_activation(step.operation)
        if own is not None:
            pairs = self._activated(pairs, own, False)
        waiting = [(step.outputs[0], pairs, own is not None)]
        while waiting:
            number, pairs, is_active = waiting.pop()
            if number in self.graph.outputs:
                raise Lost("its output is one of the model's")
            for consumer in self.graph.consumers(number):
                passed = self._pass(consumer, number, pairs, is_active)
                if id(consumer) in self.network.map_of:
                    arrived.append((consumer, passed[0]))
                else:
                    waiting.append((consumer.outputs[0], *passed))
        if not arrived:
            raise Lost("no kernel takes its output")
        return arrived

    def _pass(
        self, step: Step, number: int, pairs: Pairs, is_active: bool
    ) -> tuple[Pairs, bool]:
        """The pairs after a step, or before its kernel; whether an activation was met."""
        function = step_activation(step.operation)
        if function is not None:
            return self._activated(pairs, function, is_active), True
        kernel, own = depthwise_kernel(step.operation), self.network.map_of.get(id(step))
        if kernel is not None:
            if id(kernel) not in self.network.drawn:
                raise Lost("a depthwise kernel follows that is not drawn with it")
            pairs = pairs.repeated(kernel.shape[-1])
        if own is not None:
            if not is_active:
                raise Lost("no activation follows")
            self.network.check_kernel(own.variable, "the next kernel")
            _check_taken(own, pairs)
            return pairs, is_active
        if kernel is None:
            return through(step, self.graph, number, pairs), is_active
        self.network.check_bias(step.operation)
        function = _own_activation(step.operation)
        if function is None:
            return pairs, is_active
        return self._activated(pairs, function, is_active), True

    def _activated(
        self, pairs: Pairs, function: Callable[[Any], Any], is_active: bool
    ) -> Pairs:
        effect = self.network.effect(function, float(np.abs(pairs.slope).max()))
        if effect is None:
            raise Lost("its activation mixes units, is even, or can't be measured")
        if is_active:
            if effect.is_idempotent:
                return pairs
            raise Lost("a second activation follows")
        pairs = pairs.separated() if effect.is_odd else pairs.without_single()
        return pairs.times(effect.slope)

    def refuse(self) -> dict[int, str]:
        """The kernels whose pairs not all calls of a shared kernel can send or take."""
        found: dict[int, str] = {}
        first: dict[int, tuple[Step, Pairs | None]] = {}
        for step, own in self.network.maps:
            key, pairs = id(own.variable), self._taken(step)
            if key in self.reasons and key in self.made:
                found[key] = self.reasons[key]
            other, others = first.setdefault(key, (step, pairs))
            if (pairs is None and others is None) or (pairs and pairs.equals(others)):
                continue
            for each in (step, other):
                for maker, _ in self.arrived.get(id(each), []):
                    found[maker] = "a shared kernel takes its output, and another one's"
        return found

    def _taken(self, step: Step) -> Pairs | None:
        arrived = [pairs for _, pairs in self.arrived.get(id(step), [])]
        return functools.reduce(Pairs.merged, arrived) if arrived else None

    def plans(self) -> dict[int, _Plan]:
        gains, scales = self.network.gains(), self.network.scales()
        plans: dict[int, _Plan] = {}
        for step, own in self.network.maps:
            key = id(own.variable)
            if key not in plans:
                plans[key] = _Plan(
                    own,
                    self._taken(step),
                    self.made.get(key),
                    gains[step.inputs[0]],
                    scales.get(id(step), 1.0),
                    self.reasons.get(key, ""),
                )
        return plans


def _is_variable(value: Any) -> bool:
    return isinstance(value, keras.Variable)


def _own_activation(layer: Any) -> Callable[[Any], Any] | None:
    """That of a layer that has a kernel before it."""
    own: Any = getattr(layer, "activation", None)
    if isinstance(own, keras.Layer):
        own = layer_activation(own) or own
    if not callable(own) or own is keras.activations.linear or layer_activation(layer):
        return None
    return own


def _check_taken(own: Map, pairs: Pairs) -> None:
    """The calls of a kernel can take pairs that it sums over, within its groups."""
    if pairs.axis not in own.inputs:
        raise Lost("the next kernel sums over another axis")
    group = np.arange(len(pairs.partner)) * own.matrices.parts // len(pairs.partner)
    if ((pairs.partner >= 0) & (group[pairs.partner] != group)).any():
        raise Lost("its pairs would fall into different groups")


def _depthwise_kernels(graph: Graph) -> set[int]:
    kernels = (depthwise_kernel(step.operation) for step in graph.steps)
    return {id(kernel) for kernel in kernels if kernel is not None}
