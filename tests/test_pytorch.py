"""`initialize(model, "pytorch")` draws what the modules of `torch.nn` draw.

`python tests/test_pytorch.py` prints the p-values as a table.
"""

import hashlib
import importlib
import math
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from scipy.stats import ks_2samp

from keras_glorot import GlorotUniform, audit, initialize
from keras_glorot._drawing.distributions import Distribution

layers: Any = keras.layers
# To import it takes seconds; elsewhere the bits are the same.
is_oracle = keras.backend.backend() == "torch"
torch: Any = importlib.import_module("torch") if is_oracle else None
nn: Any = torch and torch.nn
ORACLE = pytest.mark.skipif(not is_oracle, reason="PyTorch is the oracle")

# One false alarm in a thousand seeds, for the 60 or so samples that are compared.
SIGNIFICANCE = 1e-3 / 60


def one(layer, shape, module):
    """Keras's weights in their order beside `weight` and `bias` of one module."""
    layer.build((None, *shape))
    return layer, dict(zip(names(layer), [module.weight, module.bias], strict=True))


def names(layer):
    return [variable.path.split("/", 1)[1] for variable in layer.weights]


def linear():
    return one(layers.Dense(2000), (10,), nn.Linear(10, 2000))


def einsum():
    """Two axes are summed."""
    layer = layers.EinsumDense("abc,bcde->ade", (40, 50), bias_axes="de")
    return one(layer, (3, 4), nn.Linear(12, 2000))


def conv(rank, channels=8, groups=1):
    def make():
        layer = getattr(layers, f"Conv{rank}D")(2000, 2, groups=groups)
        module = getattr(nn, f"Conv{rank}d")(channels, 2000, 2, groups=groups)
        return one(layer, (5,) * rank + (channels,), module)

    return make


def transposed(rank):
    """In PyTorch, fan_in counts the outputs of these."""

    def make():
        layer = getattr(layers, f"Conv{rank}DTranspose")(500, 2)
        module = getattr(nn, f"ConvTranspose{rank}d")(4, 500, 2)
        return one(layer, (5,) * rank + (4,), module)

    return make


def depthwise(rank, multiplier=1):
    def make():
        layer = getattr(layers, f"DepthwiseConv{rank}D")(3, depth_multiplier=multiplier)
        module = getattr(nn, f"Conv{rank}d")(1000, 1000 * multiplier, 3, groups=1000)
        return one(layer, (5,) * rank + (1000,), module)

    return make


def separable(rank):
    def make():
        layer = getattr(layers, f"SeparableConv{rank}D")(2000, 3)
        layer.build((None,) + (5,) * rank + (600,))
        conv = getattr(nn, f"Conv{rank}d")
        first, second = conv(600, 600, 3, groups=600, bias=False), conv(600, 2000, 1)
        tensors = first.weight, second.weight, second.bias
        return layer, dict(zip(names(layer), tensors, strict=True))

    return make


def recurrent(name, module, gates, **options):
    """Where Keras has one bias, PyTorch adds two."""

    def make():
        layer = getattr(layers, name)(300, **options)
        layer.build((None, 4, 30))
        other = getattr(nn, module)(30, 300)
        biases = other.bias_ih_l0, other.bias_hh_l0
        bias = torch.stack(biases)
        if not options.get("reset_after"):
            bias = bias.sum(0)
        tensors = other.weight_ih_l0, other.weight_hh_l0, bias
        assert tensors[0].shape == (300 * gates, 30)
        return layer, dict(zip(names(layer), tensors, strict=True))

    return make


def embedding():
    model = keras.Sequential([keras.Input((3,)), layers.Embedding(500, 20)])
    return model, {"embeddings": nn.Embedding(500, 20).weight}


def attention(keys=None, values=None):
    """PyTorch keeps query, key and value in one matrix if their inputs have one size."""

    def make():
        layer = layers.MultiHeadAttention(4, 16)
        layer.build((None, 5, 64), (None, 5, values or 64), (None, 5, keys or 64))
        other = nn.MultiheadAttention(64, 4, kdim=keys, vdim=values)
        if keys is None:
            parts = other.in_proj_weight.chunk(3)
        else:
            parts = other.q_proj_weight, other.k_proj_weight, other.v_proj_weight
        biases = other.in_proj_bias.chunk(3)
        tensors = [each for pair in zip(parts, biases, strict=True) for each in pair]
        tensors += other.out_proj.weight, other.out_proj.bias
        return layer, dict(zip(names(layer), tensors, strict=True))

    return make


def batch_norm():
    layer = layers.BatchNormalization(gamma_initializer="zeros")
    layer.build((None, 500))
    other = nn.BatchNorm1d(500)
    tensors = other.weight, other.bias, other.running_mean, other.running_var
    return layer, dict(zip(names(layer), tensors, strict=True))


def layer_norm():
    return one(layers.LayerNormalization(), (500,), nn.LayerNorm(500))


def group_norm():
    return one(layers.GroupNormalization(4), (500,), nn.GroupNorm(4, 500))


def rms_norm():
    layer = layers.RMSNormalization()
    layer.build((None, 500))
    return layer, {"scale": nn.RMSNorm(500).weight}


def prelu():
    layer = layers.PReLU()
    layer.build((None, 500))
    return layer, {"alpha": nn.PReLU(500).weight}


KINDS = {
    "Linear": linear,
    "Linear, EinsumDense": einsum,
    **{f"Conv{rank}d": conv(rank) for rank in (1, 2, 3)},
    "Conv2d, grouped": conv(2, 40, 20),
    **{f"ConvTranspose{rank}d": transposed(rank) for rank in (1, 2, 3)},
    **{f"Conv{rank}d, depthwise": depthwise(rank) for rank in (1, 2)},
    "Conv2d, depthwise, 3 each": depthwise(2, 3),
    **{f"Conv{rank}d, separable": separable(rank) for rank in (1, 2)},
    "RNN": recurrent("SimpleRNN", "RNN", 1),
    "LSTM": recurrent("LSTM", "LSTM", 4),
    "GRU": recurrent("GRU", "GRU", 3, reset_after=True),
    "GRU, one bias": recurrent("GRU", "GRU", 3, reset_after=False),
    "Embedding": embedding,
    "MultiheadAttention": attention(),
    "MultiheadAttention, kdim, vdim": attention(32, 48),
    "BatchNorm": batch_norm,
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "RMSNorm": rms_norm,
    "PReLU": prelu,
}


def compare(kind):
    """For each weight its name, size, std in both, and p-value; of constants, 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("cpu"):
            layer, tensors = KINDS[kind]()
    assert len(tensors) == len(layer.weights)
    initialize(layer, "pytorch", seed=0)
    for (name, tensor), variable in zip(tensors.items(), layer.weights, strict=True):
        ours = keras.ops.convert_to_numpy(variable).ravel()
        theirs = tensor.detach().numpy().ravel()
        if np.ptp(theirs) == 0:
            p = float(np.array_equal(np.unique(ours), np.unique(theirs)))
        else:
            p = ks_2samp(ours, theirs, method="asymp").pvalue
        yield name, ours.size, ours.std(), theirs.std(), p


@ORACLE
@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_has_the_distribution_of_pytorch(kind):
    assert {name: p for name, *_, p in compare(kind) if p < SIGNIFICANCE} == {}


@ORACLE
@pytest.mark.parametrize("kind", KINDS)
def test_audit_finds_it_sound(kind):
    layer, _ = KINDS[kind]()
    initialize(layer, "pytorch", seed=1)
    assert audit(layer, "pytorch").findings == []


def test_audit_finds_one_uniform_draw_in_place_of_the_sum_of_two():
    cell = layers.LSTMCell(200)
    cell.build((None, 3))
    initialize(cell, "pytorch", seed=1)
    limit = math.sqrt(2 / 200)  # of the same std
    rng = np.random.default_rng(0)
    cell.bias.assign(rng.uniform(-limit, limit, cell.bias.shape))
    (finding,) = audit(cell, "pytorch").findings
    assert (finding.code, finding.path) == ("form", "lstm_cell/bias")


def test_the_same_bits_on_every_backend():
    """Any change of them is a change of the random stream: see CONTRIBUTING.md."""
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Reshape((36, 4))]
    )
    model.add(layers.LSTM(5))
    model.add(layers.Dense(2))
    digests = []
    for _ in range(2):
        initialize(model, "pytorch", seed=1)
        joined = b"".join(each.astype("<f4").tobytes() for each in model.get_weights())
        digests.append(hashlib.sha256(joined).hexdigest()[:16])
    assert digests == ["6e515575ee52414a"] * 2


def test_other_layers_keep_their_own_initializers():
    model = keras.Sequential(
        [keras.Input((4, 8, 8, 3)), layers.ConvLSTM2D(4, 3), layers.Dense(2)]
    )
    table = initialize(model, "pytorch", seed=0)
    done = [row["done"] for row in table if row["std"] or "bias" in row["path"]]
    assert done == [
        "GlorotUniform",
        "Orthogonal",
        "bias_initializer",
        "torch.nn.Linear",
        "torch.nn.Linear",
    ]
    assert table.note.endswith("2 of 5 weights are as torch.nn draws them.")


def test_lora_factors_keep_their_own_initializers():
    layer = layers.Dense(8, lora_rank=2)
    layer.build((None, 4))
    done = [row["done"] for row in initialize(layer, "pytorch", seed=0)]
    assert done == ["torch.nn.Linear", "torch.nn.Linear", "HeUniform", "Zeros"]


def test_given_vectors_stay():
    vectors = np.ones((4, 3))
    layer = layers.Embedding(4, 3, weights=vectors, trainable=False)
    layer.build()
    table = initialize(layer, "pytorch", seed=0)
    assert table.rows[0]["done"].startswith("not changed")
    np.testing.assert_array_equal(layer.get_weights()[0], vectors)


@ORACLE
def test_the_guide_draws_as_the_function_beside_it():
    """Of all of a layer's weights, as `apply` changes them."""
    guide = Path(__file__).parent.parent / "docs" / "guides" / "pytorch.md"
    page = guide.read_text(encoding="utf-8")
    (call,) = re.findall(r"\| `model.apply\(init_fn\)`.*\| `(initialize\(.*?\))` \|", page)
    (function,) = re.findall(r"```\n(def init_fn.*?)\n\nmodel.apply", page, re.DOTALL)
    names: dict[str, Any] = {"nn": nn}
    exec(function, names)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(40, 100), nn.Tanh(), nn.Linear(100, 30))
    theirs.apply(names["init_fn"])
    ours = keras.Sequential(
        [keras.Input((40,)), layers.Dense(100, "tanh"), layers.Dense(30)]
    )
    eval(call, {"initialize": initialize, "GlorotUniform": GlorotUniform, "model": ours})
    for variable, parameter in zip(ours.weights, theirs.parameters(), strict=True):
        values = keras.ops.convert_to_numpy(variable).ravel()
        p = ks_2samp(values, parameter.detach().numpy().ravel()).pvalue
        assert p > SIGNIFICANCE, variable.path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_sum_of_two_uniform_draws_in_every_dtype(dtype):
    distribution = Distribution.from_scale("triangular", 0.1)
    whole = distribution.draw((40, 50), dtype, (1,))
    assert whole.dtype.name == dtype
    part = distribution.draw((40, 50), dtype, (1,), ((3, 9), (10, 50)))
    np.testing.assert_array_equal(part, whole[3:9, 10:])
    values = whole.astype(np.float64)
    # The relative variance of a sample variance is (kurtosis - 1) / n; five stds.
    tolerance = 5 * math.sqrt((distribution.standard.kurtosis - 1) / values.size) / 2
    assert abs(values.std() / distribution.std - 1) < tolerance
    assert np.abs(values).max() <= distribution.bound * 1.01


if __name__ == "__main__":
    print("| torch.nn | weight | values | std, ours | std, PyTorch | p-value |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        for name, size, ours, theirs, p in compare(kind):
            p = f"{p:.3f}" if theirs else "equal" if p else "differs"
            print(f"| {kind} | {name} | {size} | {ours:.4g} | {theirs:.4g} | {p} |")
