"""What a model says about its variables: their initializers, and what these draw from."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from keras_glorot import keras_bridge
from keras_glorot.fans import Fans, compute_fans, kernel_activation
from keras_glorot.initializers import GlorotNormal, GlorotUniform
from keras_glorot.keras_bridge import Target
from keras_glorot.sampling import TRUNCATED_STD, draw

__all__ = [
    "Law",
    "activation_after",
    "initializer_of",
    "law_of",
    "sample",
]

# `kernel_initializer` and the like are the arguments for kernels.
_KERNELS = ("kernel", "depthwise", "pointwise")
# Initializers that are meant for kernels: they look at the fans.
_SCALED = (keras.initializers.VarianceScaling, GlorotNormal, GlorotUniform)


class Law(NamedTuple):
    """A distribution: `scale` is what the sampler takes, `std` what comes out of it."""

    form: Literal["constant", "uniform", "truncated_normal", "normal", "orthogonal"]
    scale: float
    std: float
    mean: float = 0.0

    @property
    def bound(self) -> float:
        """How far from the mean a value can lie."""
        factors = {"constant": 0.0, "uniform": 1.0, "truncated_normal": 2.0}
        return self.scale * factors.get(self.form, math.inf) if self.scale else 0.0


def initializer_of(
    owner: keras.Layer | None, variable: keras.Variable, fans: Fans | None
) -> tuple[Any, bool]:
    """The initializer that a variable was made with, and whether the variable is a kernel.

    Found by Keras's convention (`bias` is made with `bias_initializer`); where a layer does
    not follow it, by looking at how the layer would make the variable again.

    A kernel is what Glorot's derivation holds for: it has fans, and the layer says so by
    the argument's name or, where it has none, by an initializer that scales with the fans.
    Embeddings and recurrent kernels do not count.

    Raises:
        LookupError: If it can't be known; the message says why.
    """
    if owner is None:
        raise LookupError("Keras does not tell its layer")
    if owner.quantization_mode is not None:
        raise LookupError("its layer is quantized")
    if isinstance(owner, keras.layers.Normalization):
        raise LookupError("it holds statistics of a data set, from `adapt`")
    name = "depthwise_kernel" if _is_depthwise(owner, variable) else variable.name
    counts = fans is not None and not re.search("embedding|recurrent", variable.name)
    # An LSTM puts ones into its bias, whatever its `bias_initializer` is.
    if not (name == "bias" and getattr(owner, "unit_forget_bias", False)):
        for stem in (name, name.removesuffix("_kernel")):
            initializer = getattr(owner, f"{stem}_initializer", None)
            if callable(initializer):
                return initializer, counts and stem.endswith(_KERNELS)
    try:
        pairs = keras_bridge.blueprint(owner)
    except Exception as error:  # from a layer of the user: anything
        reason = f"its layer can't be made anew from its config ({type(error).__name__})"
        raise LookupError(reason) from error
    for own, initializer in pairs:
        if own is variable and callable(initializer):
            return initializer, counts and isinstance(initializer, _SCALED)
    raise LookupError("it was not made with an initializer")


def _is_depthwise(owner: keras.Layer, variable: keras.Variable) -> bool:
    # Keras calls this kernel just `kernel`, but its initializer `depthwise_initializer`.
    kinds = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
    return isinstance(owner, kinds) and variable is owner.kernel


def law_of(
    initializer: Any, shape: Sequence[int], fans: Fans | None, target: Target
) -> Law | None:
    """What an initializer of Keras or of ours draws from; None for all others."""
    if isinstance(initializer, (GlorotUniform, GlorotNormal)):
        scale, std = initializer._scale(shape, target), initializer._std(shape, target)
        return Law(initializer._distribution, scale, std)
    name = type(initializer).__name__
    if getattr(keras.initializers, name, None) is not type(initializer):
        return None  # a subclass may do anything
    match initializer:
        case keras.initializers.Zeros():
            return Law("constant", 0.0, 0.0)
        case keras.initializers.Ones():
            return Law("constant", 0.0, 0.0, mean=1.0)
        case keras.initializers.Constant(value=int() | float() as value):
            return Law("constant", 0.0, 0.0, mean=value)
        case keras.initializers.RandomUniform(minval=low, maxval=high):
            return _law("uniform", (high - low) / math.sqrt(12), (high + low) / 2)
        case keras.initializers.RandomNormal(mean=mean, stddev=std):
            return _law("normal", std, mean)
        case keras.initializers.TruncatedNormal(mean=mean, stddev=scale):
            return _law("truncated_normal", scale * TRUNCATED_STD, mean)
        case keras.initializers.Orthogonal(gain=gain):
            std = gain / math.sqrt(max(math.prod(shape[:-1]), shape[-1]))
            return Law("orthogonal", gain, std)
        case keras.initializers.VarianceScaling(mode=mode, distribution=form):
            fan_in, fan_out = fans or compute_fans(shape)
            fan_avg = (fan_in + fan_out) / 2
            fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": fan_avg}[mode]
            std = math.sqrt(initializer.scale / max(1, fan))
            return _law("normal" if form == "untruncated_normal" else form, std)
    return None


def _law(form: Any, std: float, mean: float = 0.0) -> Law:
    factor = {"uniform": math.sqrt(3), "truncated_normal": 1 / TRUNCATED_STD}
    return Law(form, std * factor.get(form, 1.0), std, mean)


def sample(law: Law, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Draws a tensor by NumPy alone, so that it is the same on every backend."""
    if law.form == "constant":
        return np.full(shape, law.mean, dtype)
    if law.form in ("uniform", "truncated_normal"):
        work = dtype if law.mean == 0 else "float32"
        values = draw(law.form, shape, law.scale, work, (seed,))
    else:
        # Not bits for eternity, as our own stream is: NumPy may improve its methods.
        generator = np.random.Generator(np.random.PCG64(seed))
        if law.form == "normal":
            values = generator.standard_normal(shape, np.float32)
        else:
            rows, columns = math.prod(shape[:-1]), shape[-1]
            tall = generator.standard_normal((max(rows, columns), min(rows, columns)))
            q, r = np.linalg.qr(tall)
            q *= np.sign(np.diagonal(r))  # else not uniform over orthogonal matrices
            values = np.ascontiguousarray(q if rows >= columns else q.T).reshape(shape)
        values *= law.scale
    if law.mean != 0:
        values += law.mean
    return values.astype(dtype, copy=False)


def activation_after(
    owner: keras.Layer | None, variable: keras.Variable, members: set[int]
) -> Callable[[Any], Any] | None:
    """The activation that a kernel's output goes through; None where there is none.

    That of the layer itself or, where this is linear and the graph is known, that of the
    layers that follow it directly, if they agree. `members` are the ids of the model's
    layers: a layer can stand in other models too.
    """
    own = kernel_activation(owner, variable)
    if owner is None or own not in (None, keras.activations.linear):
        return own
    if own is None and getattr(owner, "activation", None) is not None:
        return None  # it stands behind another kernel of this layer
    following = [layer for layer in keras_bridge.consumers(owner) if id(layer) in members]
    found = [_activation_of(layer) for layer in following]
    return found[0] if found and all(one == found[0] for one in found) else None


def _activation_of(layer: Any) -> Callable[[Any], Any] | None:
    match layer:
        case keras.layers.Activation():
            return layer.activation
        case keras.layers.ReLU(negative_slope=0, threshold=0, max_value=None):
            return keras.activations.relu
        case keras.layers.PReLU():
            return keras.activations.relu  # its slopes start at zero
        case keras.layers.ReLU() | keras.layers.LeakyReLU() | keras.layers.ELU():
            return layer.call
    return None
