"""A model, looked at once: its layers, and every weight with all that is known of it."""

import copy
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import keras

from keras_glorot._drawing.distributions import Distribution, keras_distribution
from keras_glorot._keras.call_site import CallSite, owned_weights
from keras_glorot._keras.graph import LOOPS
from keras_glorot._keras.isolation import NotIsolatedError
from keras_glorot._keras.rebuild import (
    BuildValue,
    may_assign,
    may_hold_given_vectors,
    rebuild_sources,
)
from keras_glorot._keras.tree import Tree
from keras_glorot.fans import Fans, compute_fans
from keras_glorot.initializers import GLOROT, kernel_distribution
from keras_glorot.layer_rules import (
    Activation,
    fans_by_rule,
    following_activation,
    has_registered_rule,
    is_bias,
)

__all__ = ["Survey", "Weight", "layer_fans", "unique_paths"]

Axes = tuple[Sequence[int], Sequence[int]]

# `kernel_initializer` and the like are the arguments for kernels.
_KERNEL_ARGUMENTS = ("kernel", "depthwise", "pointwise")
# Initializers that are meant for kernels: they look at the fans.
_SCALED_BY_FANS = (keras.initializers.VarianceScaling, *GLOROT)
# Those that look at the shape alone: nobody chose their scale for this layer.
_DEFAULTS = (
    keras.initializers.GlorotNormal,
    keras.initializers.GlorotUniform,
    keras.initializers.HeNormal,
    keras.initializers.HeUniform,
    keras.initializers.LecunNormal,
    keras.initializers.LecunUniform,
    *GLOROT,
)


class Survey(Tree):
    """A built layer or model, looked at once. Dear things are looked up when asked for.

    Attributes:
        elsewhere: By `id` of the variable, the distributions of the weights that a recipe
            does not draw; None where one is not known.

    Args:
        model: A built layer or model.
        argument: The name of the user's argument, for errors.

    Raises:
        ValueError: If the model is not built.
        TypeError: If it is not a Keras layer or model.
    """

    def __init__(self, model: Any, argument: str = "model"):
        _check_built(model, argument)
        super().__init__(model)
        self.elsewhere: Mapping[int, Distribution | None] = MappingProxyType({})

    def for_recipe(self, elsewhere: Mapping[int, Distribution | None]) -> Self:
        """The same, for a recipe that draws a part of the weights."""
        part = copy.copy(self)
        part.elsewhere = elsewhere
        return part

    @functools.cached_property
    def weights(self) -> list["Weight"]:
        """One for each of the model's weights, in order."""
        owned = owned_weights(self)
        paths = unique_paths(self.path(owner, variable) for owner, variable in owned)
        return [
            Weight(self, owner, variable, path)
            for (owner, variable), path in zip(owned, paths, strict=True)
        ]

    @functools.cached_property
    def loops(self) -> dict[int, keras.Layer]:
        """By `id` of each layer in a loop (and of the loop itself), the outermost loop."""
        loops: dict[int, keras.Layer] = {}
        for layer in self.layers:
            if isinstance(layer, LOOPS):
                loops = {id(inner): layer for inner in self.below(layer)} | loops
        return loops

    @functools.cached_property
    def origins(self) -> "_Origins":
        return _Origins(self)

    def select(self, layers: Any) -> set[int]:
        """The ids of the layers that the argument `layers` stands for, with all in them."""
        if layers is None:
            return {id(None), *map(id, self.layers)}
        selected: set[int] = set()
        for layer in [layers] if isinstance(layers, str | keras.Layer) else layers:
            matches = [each for each in self.layers if each is layer or each.name == layer]
            if not matches:
                raise ValueError(
                    "Argument `layers` must list layers of the model, or their names. "
                    f"Received: layers={layers}, of which {layer} is not in the model."
                )
            selected.update(id(each) for match in matches for each in self.below(match))
        return selected


class Weight:
    """A variable of a model, and what the model says about it.

    Attributes:
        variable: The variable.
        path: Its path from the model down, unique in the model.
        owner: The layer that made it; None if Keras does not tell.
    """

    def __init__(
        self,
        survey: Survey,
        owner: keras.Layer | None,
        variable: keras.Variable,
        path: str,
    ):
        self.variable, self.path, self.owner = variable, path, owner
        self._survey = survey

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    @property
    def initializer(self) -> Any:
        """The one it was made with; None if that is not known."""
        return self._origin.initializer

    @property
    def reason(self) -> str:
        """Why the initializer is not known, else ""."""
        return self._origin.reason

    @property
    def is_data(self) -> bool:
        """Whether it holds what the user gave and training does not change."""
        return self._origin.is_data

    @property
    def is_scale_chosen(self) -> bool:
        """Whether its initializer has a scale of its own, which an author chose."""
        return not isinstance(self.initializer, _DEFAULTS)

    @functools.cached_property
    def fans(self) -> Fans | None:
        """Its connection counts; None if it connects nothing, as a bias.

        By a rule of `register_fans`, else by the axes that its initializer declares, else
        by the rule of Keras's class, else by its shape. A weight that was
        made constant, as a scale or a slope, connects nothing either, unless its name says
        that it does.
        """
        if self.is_kernel or re.search("kernel|embedding", self.variable.name):
            return self._counts
        declared = self.distribution
        is_constant = declared is not None and declared.form == "constant"
        return None if is_constant else self._counts

    @functools.cached_property
    def distribution(self) -> Distribution | None:
        """That of its initializer, with the layer's fans; None if not known."""
        return self.distribution_of(self.initializer)

    def distribution_of(self, initializer: Any) -> Distribution | None:
        """That of an initializer of Keras or of ours for this weight; None for others.

        The axes that it declares come before those that the weight is known to have.
        """
        own, fans = _declared_axes(initializer), self._counts
        if isinstance(initializer, GLOROT):
            if own is None and self._axes is not None:
                initializer = copy.copy(initializer)
                initializer.input_axes, initializer.output_axes = self._axes
            site = CallSite(self.owner, self.variable)
            return kernel_distribution(initializer, self.shape, site)
        if own is not None:
            fans = compute_fans(self.shape, *own)
        return keras_distribution(initializer, self.shape, fans)

    @functools.cached_property
    def is_kernel(self) -> bool:
        """Whether Glorot's derivation holds for it: it has fans, and something says so.

        That is the name of an argument (`kernel_initializer`), an initializer that looks at
        the fans, a rule of `register_fans`, or its own name (`kernel`), if its values are
        random. Embeddings and recurrent kernels are not kernels here.
        """
        return (
            self._origin.is_for_kernels
            and self._counts is not None
            and keras.backend.is_float_dtype(self.variable.dtype)
            and not re.search("embedding|recurrent", self.variable.name)
        )

    @functools.cached_property
    def activation(self) -> Activation | None:
        """The activation that its output goes through, or None."""
        return following_activation(self.owner, self.variable, self._survey.paths)

    @functools.cached_property
    def _origin(self) -> "_Origin":
        return self._survey.origins.find(self.owner, self.variable)

    @functools.cached_property
    def _axes(self) -> Axes | None:
        """The axes that its initializer declares, if they decide its fans."""
        owner, variable = self.owner, self.variable
        if is_bias(owner, variable) or has_registered_rule(owner, variable):
            return None
        return _declared_axes(self.initializer)

    @functools.cached_property
    def _counts(self) -> Fans | None:
        """Its fans, if it connects anything; None if it can't."""
        if is_bias(self.owner, self.variable):
            return None
        weight: Any = self.variable
        if self.owner is not None and self.owner.quantization_mode is not None:
            # Two four-bit weights share a byte; the property of the same name unpacks.
            weight = getattr(self.owner, weight.name, weight)
        if self._axes is not None:
            return compute_fans(weight.shape, *self._axes)
        fans = fans_by_rule(weight.shape, self.owner, self.variable)
        if fans is None and len(weight.shape) >= 2:
            return compute_fans(weight.shape)
        return fans


def layer_fans(layer: keras.Layer) -> dict[str, Fans]:
    """Lists `fan_in` and `fan_out` of each kernel in a built layer or model.

    Kernels are the weights of rank 2 or more, and vectors that are einsum kernels. Biases,
    and constants such as scales, have no connections to count. A quantized kernel has the
    fans of the kernel that it stands for. The two factors of a layer with LoRA have fans of
    their own. `input_axes` and `output_axes` of the layer's own initializer, Keras's or
    ours, come before the rule of Keras's class, and a rule of `register_fans` before both.

    Args:
        layer: A built layer or model. Sublayers and nested models are included.

    Returns:
        A dictionary from path to `Fans`, in the order of `layer.weights`. A path holds
        the names of the layers from the model down: `"encoder/dense/kernel"`. If several
        weights share one, all after the first have a number: `"dense/kernel (2)"`.

    Raises:
        TypeError: If `layer` is not a Keras layer.
        ValueError: If it is not built.

    Example:

    >>> layer = keras.layers.DepthwiseConv2D(3, name="depthwise")
    >>> layer.build((None, 32, 32, 512))
    >>> layer_fans(layer)
    {'depthwise/kernel': Fans(fan_in=9, fan_out=9)}

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), section 4.2
    """
    weights = Survey(layer, "layer").weights
    return {weight.path: weight.fans for weight in weights if weight.fans is not None}


def unique_paths(paths: Iterable[str]) -> list[str]:
    """The paths, with a number added to each that was there before: `dense/kernel (2)`."""
    counts = Counter()
    unique = []
    for path in paths:
        counts[path] += 1
        unique.append(path if counts[path] == 1 else f"{path} ({counts[path]})")
    return unique


def _check_built(model: keras.Layer, argument: str) -> None:
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"Argument `{argument}` must be a Keras layer or model. "
            f"Received: {argument}={model}"
        )
    if not model.built:
        raise ValueError(
            f"Argument `{argument}` must be built: before that it has no weights. Call it "
            "on data or call its `build(input_shape)` first. "
            f"Received: {argument}={model}"
        )


class _Origin(NamedTuple):
    """How a layer makes a weight."""

    initializer: Any = None
    is_for_kernels: bool = False
    reason: str = ""
    is_data: bool = False


class _Origins:
    """How the layers of a model make their weights; each is rebuilt once at most."""

    def __init__(self, survey: Survey):
        self.survey = survey
        self.rebuilt: set[int] = set()
        self.sources: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}
        self._learn_build_values(survey.root)

    def find(self, owner: keras.Layer | None, variable: keras.Variable) -> _Origin:
        """How the layer made a variable.

        Known by Keras's convention (`bias` is made with `bias_initializer`) or, where a
        layer does not follow it, by building the layer again.
        """
        if owner is None:
            return _Origin(reason="Keras does not tell its layer")
        if owner.quantization_mode is not None:
            return _Origin(reason="its layer is quantized")
        if isinstance(owner, keras.layers.Normalization):
            reason = "it holds statistics of a data set, from `adapt`"
            return _Origin(reason=reason, is_data=True)
        source = self.sources.get(id(variable))
        if isinstance(source, BuildValue):
            return _Origin(source)
        if may_hold_given_vectors(owner, variable, id(owner) in self.survey.in_graphs):
            reason = "it may hold vectors given as `weights`, which Keras does not keep"
            return _Origin(reason=reason, is_data=not variable.trainable)
        origin = _origin_by_name(owner, variable)
        if origin is None:
            origin = self._find_by_rebuilding(owner, variable)
        if not origin.is_for_kernels and _is_named_kernel(owner, variable, origin):
            return _Origin(origin.initializer, is_for_kernels=True)
        return origin

    def _find_by_rebuilding(self, owner: keras.Layer, variable: keras.Variable) -> _Origin:
        # The model as a whole is the last resort: its config can say what to make a layer
        # from that has none.
        for layer in (owner, self.survey.root):
            if id(variable) not in self.sources:
                self._rebuild(layer)
        source = self.sources.get(id(variable))
        if source is None:
            return _Origin(reason=_explain(self.errors.get(id(owner))))
        return _Origin(source, isinstance(source, _SCALED_BY_FANS))

    def _learn_build_values(self, layer: keras.Layer) -> None:
        """Rebuilds the outermost layers whose `build` could assign to its variables."""
        if may_assign(layer):
            self._rebuild(layer)
        for child in self.survey.children(layer):
            if any(id(variable) not in self.sources for variable in child.weights):
                self._learn_build_values(child)

    def _rebuild(self, layer: keras.Layer) -> None:
        if id(layer) in self.rebuilt:
            return
        self.rebuilt.add(id(layer))
        sources, error = rebuild_sources(layer)
        # An outer layer assigns after those in it.
        self.sources = sources | self.sources
        if error is not None:
            self.errors[id(layer)] = error


def _explain(error: Exception | None) -> str:
    """Why building a layer again did not tell how a weight is made."""
    if error is None:
        return "a rebuilt layer does not make it"
    if isinstance(error, NotIsolatedError):
        return f"its layer can't be rebuilt: {error}"
    return f"its layer can't be rebuilt from its config ({type(error).__name__})"


def _declared_axes(initializer: Any) -> Axes | None:
    """The input and output axes that an initializer of Keras or of ours has, if any."""
    if isinstance(initializer, BuildValue):
        initializer = initializer.declared
    if not isinstance(initializer, _SCALED_BY_FANS):
        return None
    # Keras has them since 3.15, and looks at them only if both are there.
    inputs = getattr(initializer, "input_axes", None)
    outputs = getattr(initializer, "output_axes", None)
    return None if inputs is None or outputs is None else (tuple(inputs), tuple(outputs))


def _origin_by_name(owner: keras.Layer, variable: keras.Variable) -> _Origin | None:
    name = "depthwise_kernel" if _is_depthwise(owner, variable) else variable.name
    # An LSTM puts ones into its bias, whatever its `bias_initializer` is.
    if name == "bias" and getattr(owner, "unit_forget_bias", False):
        return None
    for stem in (name, name.removesuffix("_kernel")):
        initializer = getattr(owner, f"{stem}_initializer", None)
        if callable(initializer):
            return _Origin(initializer, stem.endswith(_KERNEL_ARGUMENTS))
    return None


def _is_named_kernel(owner: keras.Layer, variable: keras.Variable, origin: _Origin) -> bool:
    """Whether a registered rule, or the variable's name, says that it is a kernel."""
    if has_registered_rule(owner, variable):
        return True
    if not re.fullmatch(r"(.*_)?kernel", variable.name):
        return False
    if origin.reason:
        return True
    # A constant could be a filter that is meant to stay, such as one that blurs.
    distribution = keras_distribution(origin.initializer, variable.shape, None)
    return distribution is not None and distribution.form != "constant"


def _is_depthwise(owner: keras.Layer, variable: keras.Variable) -> bool:
    # Keras calls this kernel just `kernel`, but its initializer `depthwise_initializer`.
    kinds = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
    return isinstance(owner, kinds) and variable is owner.kernel
