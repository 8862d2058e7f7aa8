"""The start of `torch.nn`: each layer as its counterpart there draws it by default.

PyTorch 2.13, `torch/nn/modules`: `reset_parameters` in `linear.py`, `conv.py`, `rnn.py`
and `sparse.py`, `_reset_parameters` of attention in `activation.py`. He's uniform
initializer with a slope of sqrt(5), as they have it, is uniform on ±1 / sqrt(fan_in).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import keras

from keras_glorot._drawing.distributions import Distribution
from keras_glorot._keras.rebuild import BuildValue
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.fans import Fans
from keras_glorot.layer_rules import TRANSPOSED
from keras_glorot.recipes._start import Start, Starts

__all__ = ["pytorch"]

# Of each layer, by `id`, the weights that can be drawn, by name.
_Weights = dict[int, dict[str, Weight]]
_Drawn = Iterator[tuple[Weight, Distribution]]
_Rule = Callable[[keras.Layer, _Weights], _Drawn]


def pytorch(survey: Survey) -> Starts:
    """As PyTorch draws; layers that it does not have keep their own initializers."""
    weights: _Weights = defaultdict(dict)
    for weight in survey.weights:
        is_own = not weight.reason and not isinstance(weight.initializer, BuildValue)
        if is_own and keras.backend.is_float_dtype(weight.variable.dtype):
            weights[id(weight.owner)][weight.variable.name] = weight
    starts: dict[int, Start] = {}
    for layer in survey.layers:
        known = next((each for each in type(layer).__mro__ if each in _RULES), None)
        if known is not None:
            counterpart, rule = _RULES[known]
            for weight, distribution in rule(layer, weights):
                start = Start(f"torch.nn.{counterpart}", distribution, {})
                # Parents come first: attention has its own rule for the layers in it.
                starts.setdefault(id(weight.variable), start)
    count = f"{len(starts)} of {len(survey.weights)}"
    return Starts(starts, (), f"{count} weights are as torch.nn draws them.")


def _linear(layer: keras.Layer, weights: _Weights) -> _Drawn:
    """Kernels, and the bias by the last of them."""
    own, limit = weights[id(layer)], None
    for name in ("kernel", "depthwise_kernel", "pointwise_kernel", "bias"):
        if name in own:
            if fans := own[name].fans:
                # A transposed kernel is the other way round there, and so is its fan_in.
                fan = fans.fan_out if isinstance(layer, TRANSPOSED) else fans.fan_in
                limit = 1 / math.sqrt(max(1, fan))
            if limit is not None:
                yield own[name], Distribution.from_scale("uniform", limit)


def _recurrent(layer: keras.Layer, weights: _Weights) -> _Drawn:
    """All by the size of the state."""
    own = weights[id(layer)]
    if "recurrent_kernel" not in own:
        return
    limit = 1 / math.sqrt(max(1, own["recurrent_kernel"].shape[0]))
    for name in ("kernel", "recurrent_kernel", "bias"):
        if name in own:
            # PyTorch has two biases, which it adds; of Keras's layers GRU can have both.
            is_sum = name == "bias" and len(own[name].shape) == 1
            form = "triangular" if is_sum else "uniform"
            yield own[name], Distribution.from_scale(form, limit)


def _attention(layer: keras.Layer, weights: _Weights) -> _Drawn:
    """Query, key and value are one matrix there, if all take inputs of the same size."""
    names = ("query_dense", "key_dense", "value_dense", "output_dense")
    *inner, outer = [weights[id(getattr(layer, name, None))] for name in names]
    fans = [part["kernel"].fans or Fans(1, 1) for part in inner if "kernel" in part]
    is_packed = len(fans) == 3 and len({each.fan_in for each in fans}) == 1
    packed = Fans(fans[0].fan_in, sum(each.fan_out for each in fans)) if is_packed else None
    for part in inner:
        if "kernel" in part:
            total = sum(packed or part["kernel"].fans or ())
            limit = math.sqrt(6 / max(1, total))
            yield part["kernel"], Distribution.from_scale("uniform", limit)
    for part in (*inner, outer):
        if "bias" in part:
            yield part["bias"], Distribution.constant(0.0)


def _embedding(layer: keras.Layer, weights: _Weights) -> _Drawn:
    if "embeddings" in weights[id(layer)]:
        yield weights[id(layer)]["embeddings"], Distribution.from_std("normal", 1.0)


def _constants(**values: float) -> _Rule:
    def rule(layer: keras.Layer, weights: _Weights) -> _Drawn:
        for name, weight in weights[id(layer)].items():
            if name in values:
                yield weight, Distribution.constant(values[name])

    return rule


# By Keras's class, inherited by subclasses: the name of its counterpart, and a rule.
_RULES: dict[type, tuple[str, _Rule]] = {
    keras.layers.Dense: ("Linear", _linear),
    keras.layers.EinsumDense: ("Linear", _linear),
    keras.layers.Conv1D: ("Conv1d", _linear),
    keras.layers.Conv2D: ("Conv2d", _linear),
    keras.layers.Conv3D: ("Conv3d", _linear),
    keras.layers.Conv1DTranspose: ("ConvTranspose1d", _linear),
    keras.layers.Conv2DTranspose: ("ConvTranspose2d", _linear),
    keras.layers.Conv3DTranspose: ("ConvTranspose3d", _linear),
    keras.layers.DepthwiseConv1D: ("Conv1d", _linear),
    keras.layers.DepthwiseConv2D: ("Conv2d", _linear),
    keras.layers.SeparableConv1D: ("Conv1d", _linear),
    keras.layers.SeparableConv2D: ("Conv2d", _linear),
    keras.layers.SimpleRNNCell: ("RNN", _recurrent),
    keras.layers.LSTMCell: ("LSTM", _recurrent),
    keras.layers.GRUCell: ("GRU", _recurrent),
    keras.layers.MultiHeadAttention: ("MultiheadAttention", _attention),
    keras.layers.Embedding: ("Embedding", _embedding),
    keras.layers.BatchNormalization: (
        "BatchNorm",
        _constants(gamma=1, beta=0, moving_mean=0, moving_variance=1),
    ),
    keras.layers.LayerNormalization: ("LayerNorm", _constants(gamma=1, beta=0)),
    keras.layers.GroupNormalization: ("GroupNorm", _constants(gamma=1, beta=0)),
    keras.layers.RMSNormalization: ("RMSNorm", _constants(scale=1)),
    keras.layers.PReLU: ("PReLU", _constants(alpha=0.25)),
}
