"""The tree of a model: layers and their names, and what each layer holds."""

import functools
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import keras

__all__ = [
    "Tree",
    "attributes",
    "direct_sublayers",
    "downstream_operations",
    "initial_state",
    "own_variables",
    "signature",
    "unique",
]


class Tree:
    """A layer and all layers in it. Each is asked once for those that it holds.

    Attributes:
        root: The layer.
        layers: The layer itself and those in it, at any depth, each once; parents first.
    """

    def __init__(self, root: keras.Layer):
        self.root = root
        self._children: dict[int, list[keras.Layer]] = {}
        self.layers = self.below(root)

    def below(self, layer: keras.Layer) -> list[keras.Layer]:
        """A layer of the tree and all layers in it, as in `layers`."""
        found = {id(layer): layer}
        waiting = deque(self.children(layer))
        while waiting:
            child = waiting.popleft()
            if id(child) not in found:
                found[id(child)] = child
                waiting.extendleft(self.children(child))  # backwards, as Keras does it
        return list(found.values())

    def children(self, layer: keras.Layer) -> list[keras.Layer]:
        """The layers that a layer of the tree holds itself."""
        if id(layer) not in self._children:
            self._children[id(layer)] = direct_sublayers(layer)
        return self._children[id(layer)]

    @functools.cached_property
    def paths(self) -> dict[int, str]:
        """By `id`, the path of each layer: the names from below the root down to it.

        The root goes by its name. A layer with several parents has the path of the first.
        Unlike Keras's own `path`, this does not depend on how and when a layer was built.
        """
        names = self._join(lambda _, children: [child.name for child in children])
        return names | {id(self.root): self.root.name}

    @functools.cached_property
    def _canonical_paths(self) -> dict[int, str]:
        """As `paths`, but the same for each model that is built alike.

        Automatic names are replaced by the order of occurrence in the parent: `dense#2` is
        the second Dense. The name of the root is left out, and that of a parent at the
        start of its sublayers' names, with or without what Keras counts in it: the author
        of `Encoder` can name a sublayer `f"{self.name}_proj"` or `"encoder_proj"`.
        """
        return self._join(_canonical_names)

    def _join(
        self, names: Callable[[list[keras.Layer], list[keras.Layer]], list[str]]
    ) -> dict[int, str]:
        """`names` takes the layers from the root down to a parent, and its children."""
        paths = {id(self.root): ""}

        def walk(holders: list[keras.Layer], prefix: str) -> None:
            children = self.children(holders[-1])
            for child, name in zip(children, names(holders, children), strict=True):
                if id(child) not in paths:
                    paths[id(child)] = prefix + name
                    walk([*holders, child], f"{prefix}{name}/")

        walk([self.root], "")
        return paths

    def path(self, owner: keras.Layer | None, variable: keras.Variable) -> str:
        """The path of a variable; Keras's own where its layer is not in the tree."""
        if id(owner) not in self.paths:
            return variable.path
        return f"{self.paths[id(owner)]}/{variable.name}"

    def seed_path(self, owner: keras.Layer | None, variable: keras.Variable) -> str:
        """A path that is the same in each model that is built alike."""
        path = self._canonical_paths.get(id(owner), "")
        return f"{path}/{_canonical_name(variable, owner)}"

    @functools.cached_property
    def owned_weights(self) -> list[tuple[keras.Layer | None, keras.Variable]]:
        """Each weight with the layer, in any nested model, that made it, if one did."""
        makers: dict[int, tuple[int, keras.Layer]] = {}
        for holder in self.layers:
            for variable in own_variables(holder):
                # Wrappers and tied layers hold the variables of others. The path tells who
                # made one; else the innermost holder did, and that one comes last.
                likelihood = _maker_likelihood(holder, variable)
                best = makers.get(id(variable))
                if best is None or likelihood >= best[0]:
                    makers[id(variable)] = (likelihood, holder)
        return [
            (makers[id(variable)][1] if id(variable) in makers else None, variable)
            for variable in self.root.weights
        ]

    @functools.cached_property
    def in_graphs(self) -> set[int]:
        """By `id`, the layers that a functional or sequential model holds."""
        models = [
            layer
            for layer in self.layers
            if isinstance(layer, keras.Sequential) or hasattr(layer, "operations")
        ]
        return {id(child) for model in models for child in self.children(model)}

    @functools.cached_property
    def seed_generators(self) -> list[tuple[keras.Layer, keras.random.SeedGenerator]]:
        """Each with the layer that holds it."""
        return [
            (layer, generator)
            for layer in self.layers
            for generator in unique(attributes(layer, keras.random.SeedGenerator).values())
        ]

    @functools.cached_property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """The optimizers among the attributes of the layers, and of each other."""
        found: list[keras.optimizers.Optimizer] = []
        holders: list[Any] = [*self.layers]
        for holder in holders:
            for optimizer in attributes(holder, keras.optimizers.Optimizer).values():
                if all(optimizer is not other for other in found):
                    found.append(optimizer)
                    holders.append(optimizer)
        return found

    @functools.cached_property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of the root, compiled ones too, and of all layers."""
        own = [metric for layer in self.layers for metric in getattr(layer, "_metrics", ())]
        return unique([*self.root.metrics, *own])

    @functools.cached_property
    def untracked_variables(self) -> list[tuple[keras.Layer, keras.Variable]]:
        """Variables that are neither weights, nor of seed generators, metrics, optimizers.

        Each with the layer that holds it: the states of an RNN, say, which Keras leaves out
        of `variables`.
        """
        known = {id(variable) for variable in self.root.weights}
        known |= {id(generator.state) for _, generator in self.seed_generators}
        known |= {id(variable) for each in self.metrics for variable in each.variables}
        untracked = []
        for layer in self.layers:
            held = attributes(layer, keras.Variable).values()
            rest = layer.variables if layer is self.root else []
            for variable in [*held, *rest]:
                if id(variable) not in known:
                    known.add(id(variable))
                    untracked.append((layer, variable))
        return untracked


def direct_sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that the layer holds itself."""
    if hasattr(layer, "_layers"):
        return list(layer._layers)
    return list(getattr(layer, "layers", ()))  # models show them, other layers don't


def _canonical_names(holders: list[keras.Layer], children: list[keras.Layer]) -> list[str]:
    counts = Counter()
    names = []
    for child in children:
        kind = _automatic_kind(child)
        if kind is not None:
            counts[kind] += 1
            names.append(f"{kind}#{counts[kind]}")
        else:
            parent = _automatic_kind(holders[-1]) or holders[-1].name
            names.append(_without_counts(child.name, holders).removeprefix(f"{parent}_"))
    return names


def _automatic_kind(layer: keras.Layer) -> str | None:
    """An automatic name without what Keras counts in it; None if the name was chosen."""
    kind = _without_count(layer.name)
    # `Bidirectional` puts its own word in front of the automatic name.
    plain = re.sub("^(forward|backward)_", "", kind).replace("_", "")
    is_automatic = plain == type(layer).__name__.replace("_", "").lower()
    return kind if is_automatic else None


def _without_counts(name: str, holders: Iterable[keras.Layer]) -> str:
    """A name that was chosen, without what Keras counts in a holder's name in front.

    A letter or a separator follows there: `encoder_1` can be the first of an author's own.
    """
    for holder in holders:
        kind = _automatic_kind(holder)
        if kind is not None:
            name = re.sub(f"^{re.escape(holder.name)}(?=\\D)", kind, name)
    return name


def _without_count(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _canonical_name(variable: keras.Variable, owner: keras.Layer | None) -> str:
    """The variable's name, without what Keras counts in it or in its owner's name."""
    plain = _without_count(variable.name)
    if plain.replace("_", "") == type(variable).__name__.lower():
        return "variable"  # JAX's class has another name
    return _without_counts(variable.name, [] if owner is None else [owner])


def signature(variable: keras.Variable) -> tuple[Any, ...]:
    # An automatic name ends in a number, counted anew.
    return _without_count(variable.name), tuple(variable.shape), variable.dtype


def _maker_likelihood(holder: keras.Layer, variable: keras.Variable) -> int:
    """A path ends in the maker's name; its beginning depends on when it was made."""
    if variable.path == f"{holder.path}/{variable.name}":
        return 2
    return int(f"/{variable.path}".endswith(f"/{holder.name}/{variable.name}"))


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    lists = ("_trainable_variables", "_non_trainable_variables")
    return [variable for name in lists for variable in getattr(layer, name, ())]


def initial_state(layer: keras.Layer, variable: keras.Variable) -> Any:
    """The value that a state of a recurrent layer starts with; None of anything else."""
    if not isinstance(layer, keras.layers.RNN) or not layer.states:
        return None
    states = keras.tree.flatten(layer.states)
    starts = keras.tree.flatten(layer.get_initial_state(states[0].shape[0]))
    for state, start in zip(states, starts, strict=False):
        if state is variable and tuple(start.shape) == tuple(state.shape):
            return start
    return None


def downstream_operations(layer: keras.Layer) -> list[keras.Operation]:
    """The operations on the layer's outputs, where Keras knows the graph."""
    return [node.operation for node in getattr(layer, "_outbound_nodes", ())]


def attributes(holder: Any, kind: type) -> dict[tuple[Any, ...], Any]:
    """The objects of a kind among the attributes, also in lists and dictionaries there.

    By where they are: the name of the attribute, then keys and indices.
    """
    found, seen = {}, set()

    def walk(value: Any, place: tuple[Any, ...]) -> None:
        if isinstance(value, kind):
            found[place] = value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                walk(item, (*place, key))

    for name, value in vars(holder).items():
        # TensorFlow keeps lists of the same things under names that begin so.
        if name not in _TRACKING and not name.startswith("_self_"):
            walk(value, (name,))
    return found


# Keras's own lists of what stands in other attributes too.
_TRACKING = {"_layers", "_trainable_variables", "_non_trainable_variables", "_variables"}


def unique(objects: Iterable[Any]) -> list[Any]:
    return list({id(each): each for each in objects}.values())
