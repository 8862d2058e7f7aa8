"""The survey of a model: every weight, and what the model says about it."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras

from keras_glorot._drawing.distributions import Distribution, keras_distribution
from keras_glorot._keras.call_site import CallSite, owned_variables
from keras_glorot._keras.isolation import NotIsolatedError
from keras_glorot._keras.rebuild import (
    BuildValue,
    may_assign,
    may_hold_given_vectors,
    rebuild_sources,
)
from keras_glorot._keras.tree import direct_sublayers, sublayer_paths
from keras_glorot.fans import Fans, compute_fans
from keras_glorot.initializers import GLOROT, kernel_distribution
from keras_glorot.layer_rules import (
    Activation,
    fans_by_rule,
    following_activation,
    has_registered_rule,
    is_bias,
)

__all__ = ["Weight", "describe", "distribution_of", "layer_fans", "unique_paths"]

Axes = tuple[Sequence[int], Sequence[int]]

# `kernel_initializer` and the like are the arguments for kernels.
_KERNEL_ARGUMENTS = ("kernel", "depthwise", "pointwise")
# Initializers that are meant for kernels: they look at the fans.
_SCALED_BY_FANS = (keras.initializers.VarianceScaling, *GLOROT)


class Weight(NamedTuple):
    """A variable of a model, and what the model says about it.

    Attributes:
        variable: The variable.
        path: Its path from the model down, unique in the model.
        owner: The layer that made it; None if Keras does not tell.
        fans: Its connection counts; None if it has none (a bias). By a rule of
            `register_fans`, else by `axes`, else by the rule of Keras's class, else by its
            shape.
        axes: The input and output axes that its initializer declares, unless there is a
            rule of `register_fans`; None if it declares none.
        initializer: What it was made with; None if that is not known.
        reason: Why the initializer is not known, else "".
        is_data: Whether it holds what the user gave and training does not change.
        distribution: What the initializer draws from, with the layer's fans; None if
            that is not known.
        is_kernel: Whether Glorot's derivation holds for it: it has fans, and something says
            so: the name of an argument (`kernel_initializer`), an initializer that looks at
            the fans, a rule of `register_fans`, or its own name (`kernel`), if its values
            are random. Embeddings and recurrent kernels are not kernels here.
        activation: The activation that its output goes through, or None.
    """

    variable: keras.Variable
    path: str
    owner: keras.Layer | None
    fans: Fans | None
    axes: Axes | None
    initializer: Any
    reason: str
    is_data: bool
    distribution: Distribution | None
    is_kernel: bool
    activation: Activation | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.shape)

    @property
    def site(self) -> CallSite:
        return CallSite(self.owner, self.variable)

    def distribution_of(self, initializer: Any) -> Distribution | None:
        """What another initializer would draw this weight from."""
        return distribution_of(initializer, self.shape, self.fans, self.site, self.axes)


def describe(model: keras.Layer, argument: str = "model") -> list[Weight]:
    """Surveys a built layer or model: one `Weight` for each of `model.weights`, in order.

    Args:
        model: A built layer or model.
        argument: What the user knows it by, for errors.

    Raises:
        ValueError: If the model is not built.
        TypeError: If it is not a Keras layer or model.
    """
    _check_built(model, argument)
    survey = _Survey(model)
    owned = owned_variables(model)
    paths = unique_paths(survey.path(owner, variable) for owner, variable in owned)
    return [
        survey.describe(owner, variable, path)
        for (owner, variable), path in zip(owned, paths, strict=True)
    ]


def layer_fans(layer: keras.Layer) -> dict[str, Fans]:
    """Lists `fan_in` and `fan_out` of each kernel in a built layer or model.

    Kernels are the weights of rank 2 or more, and vectors that are einsum kernels; other
    vectors, such as biases, have no connections to count. A quantized kernel has the fans
    of the kernel that it stands for. The two factors of a layer with LoRA have fans of
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
    weights = describe(layer, "layer")
    return {weight.path: weight.fans for weight in weights if weight.fans is not None}


def distribution_of(
    initializer: Any,
    shape: Sequence[int],
    fans: Fans | None,
    site: CallSite,
    axes: Axes | None = None,
) -> Distribution | None:
    """What an initializer of Keras or of ours draws from; None for everyone else's.

    The axes that it declares come before `axes`, those that its weight is known to have.
    """
    own = _declared_axes(initializer)
    if isinstance(initializer, GLOROT):
        if own is None and axes is not None:
            initializer = copy.copy(initializer)
            initializer.input_axes, initializer.output_axes = axes
        return kernel_distribution(initializer, tuple(shape), site)
    if own is not None:
        fans = compute_fans(shape, *own)
    return keras_distribution(initializer, shape, fans)


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


class _Survey:
    """What is looked up once for a model, and asked for each of its weights."""

    def __init__(self, model: keras.Layer):
        self.model = model
        self.layer_paths = sublayer_paths(model)
        self.layer_ids = set(self.layer_paths)
        self.rebuilt: set[int] = set()
        self.sources: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}
        self._learn_build_values(model)

    def path(self, owner: keras.Layer | None, variable: keras.Variable) -> str:
        if id(owner) not in self.layer_paths:
            return variable.path
        return f"{self.layer_paths[id(owner)]}/{variable.name}"

    def describe(
        self, owner: keras.Layer | None, variable: keras.Variable, path: str
    ) -> Weight:
        origin = self._origin(owner, variable)
        axes = _axes(owner, variable, origin.initializer)
        fans = _fans(owner, variable, axes)
        is_kernel = (
            origin.is_for_kernels
            and fans is not None
            and keras.backend.is_float_dtype(variable.dtype)
            and not re.search("embedding|recurrent", variable.name)
        )
        site = CallSite(owner, variable)
        distribution = distribution_of(origin.initializer, variable.shape, fans, site, axes)
        activation = following_activation(owner, variable, self.layer_ids)
        return Weight(
            variable,
            path,
            owner,
            fans,
            axes,
            origin.initializer,
            origin.reason,
            origin.is_data,
            distribution,
            is_kernel,
            activation,
        )

    def _origin(self, owner: keras.Layer | None, variable: keras.Variable) -> _Origin:
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
        if may_hold_given_vectors(owner, variable):
            reason = "it may hold vectors given as `weights`, which Keras does not keep"
            return _Origin(reason=reason, is_data=not variable.trainable)
        origin = _origin_by_name(owner, variable)
        if origin is None:
            origin = self._origin_by_rebuilding(owner, variable)
        if not origin.is_for_kernels and _is_named_kernel(owner, variable, origin):
            return _Origin(origin.initializer, is_for_kernels=True)
        return origin

    def _origin_by_rebuilding(
        self, owner: keras.Layer, variable: keras.Variable
    ) -> _Origin:
        # The model as a whole is the last resort: its config can say what to make a layer
        # from that has none.
        for layer in (owner, self.model):
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
        for child in direct_sublayers(layer):
            if any(id(variable) not in self.sources for variable in child.weights):
                self._learn_build_values(child)

    def _rebuild(self, layer: keras.Layer) -> None:
        if id(layer) in self.rebuilt:
            return
        self.rebuilt.add(id(layer))
        sources, error = rebuild_sources(layer)
        # What an outer layer assigns comes last.
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


def _fans(
    owner: keras.Layer | None, variable: keras.Variable, axes: Axes | None
) -> Fans | None:
    weight: Any = variable
    if owner is not None and owner.quantization_mode is not None:
        # Two four-bit weights share a byte; the property of the same name unpacks.
        weight = getattr(owner, variable.name, variable)
    if axes is not None:
        return compute_fans(weight.shape, *axes)
    fans = fans_by_rule(weight.shape, owner, variable)
    if fans is None and len(weight.shape) >= 2:
        return compute_fans(weight.shape)
    return fans


def _axes(
    owner: keras.Layer | None, variable: keras.Variable, initializer: Any
) -> Axes | None:
    """The axes that its initializer declares, if they decide the fans of a weight."""
    if is_bias(owner, variable) or has_registered_rule(owner, variable):
        return None
    return _declared_axes(initializer)


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
