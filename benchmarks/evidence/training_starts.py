"""The data of `training.py`, and the first weights of its nets, with PyTorch."""

import contextlib
import functools
import itertools
import zlib
from unittest import mock

import deep_nets  # before Keras: it chooses the backend
import keras
import numpy as np
from deep_nets import MEASURED, METHODS, replaced
from keras import layers, ops
from training_nets import NETS

import keras_glorot

HELD_OUT = {"validation": 500, "test": 500}
RECTIFIERS = "relu", "relu6", "gelu", "silu"  # they pass on about half of z²


# --- Data


@functools.lru_cache(maxsize=16)
def load(net, seed):
    """(x, y) by part; the seed picks the examples, and which is in which part."""
    data, sizes = NETS[net].data, {"train": NETS[net].train, **HELD_OUT}
    if callable(data):
        x, y = data(np.random.default_rng(seed), sum(sizes.values()))
        ends = np.cumsum([0, *sizes.values()])
        spans = [slice(*span) for span in itertools.pairwise(ends)]
        return {
            part: keras.tree.map_structure(lambda a, s=span: narrow(a[s]), (x, y))
            for part, span in zip(sizes, spans, strict=True)
        }
    source = ("mnist", 28) if data == "mnist" else ("digits", 8)
    x, labels = deep_nets.images(*source)
    parts = deep_nets.split(x.numpy(), labels, sizes, seed)
    noise = np.random.default_rng(seed)
    kinds = {
        "digits": lambda x, labels: (x, narrow(labels)),
        "mnist": lambda x, labels: (x, narrow(labels)),
        "autoencoded": lambda x, _: (x, x),
        "masks": lambda x, _: (x + narrow(noise.normal(0, 0.7, x.shape)), narrow(x > 0)),
    }
    return {part: kinds[data](*pair) for part, pair in parts.items()}


def narrow(array):
    """In 32 bits; truth as numbers."""
    return array.astype("int32" if array.dtype.kind == "i" else "float32")


# --- Starts: from a net, a seed and a batch to the model with its first weights.


def drawn(method, net, seed, x):
    return METHODS[method](net.build, x, seed)


def orthogonal(net, seed, x):
    """Keras's in every layer, with a gain of √2 before a rectifier."""
    model = replaced(keras.initializers.Orthogonal, net.build)
    for layer in model.layers:
        activation = getattr(layer, "activation", None)
        if getattr(activation, "__name__", "") in RECTIFIERS and layer.weights:
            kernel = last_kernel(layer)
            kernel.assign(kernel * 2**0.5)
    return model


def last_kernel(layer):
    is_separable = hasattr(layer, "pointwise_kernel")
    return layer.pointwise_kernel if is_separable else layer.kernel


KINDS = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv2D,
    layers.DepthwiseConv2D,
    layers.SeparableConv2D,
)


def lsuv(net, seed, x):
    """Orthogonal kernels over the std of what they give (Mishkin & Matas, 2016)."""
    model = replaced(keras.initializers.Orthogonal, net.build)
    with contextlib.ExitStack() as patches:
        for kind in KINDS:
            patched = mock.patch.object(kind, "call", unit_variance(kind.call))
            patches.enter_context(patched)
        model(x)
    return model


def unit_variance(call):
    def scaled(layer, inputs, **options):
        activation, layer.activation = layer.activation, keras.activations.linear
        y = call(layer, inputs, **options)
        layer.activation = activation
        std, kernel = ops.std(y), last_kernel(layer)
        kernel.assign(kernel / std)
        return activation(y / std)

    return scaled


def fixup(net, seed, x):
    """After Zhang et al. (2019), without the scalars that they add to the net."""
    model = replaced(keras.initializers.HeNormal, net.build)
    blocks = {path.split("/")[0].split("_")[1] for path in paths(model) if "block_" in path}
    for variable in model.trainable_variables:
        if any(name in variable.path for name in ("head", "_end", "attention_output")):
            variable.assign(ops.zeros_like(variable))
        elif "block_" in variable.path:
            variable.assign(variable * len(blocks) ** (-1 / (2 * net.branch - 2)))
    return model


def paths(model):
    return [variable.path for variable in model.trainable_variables]


def isometric(net, seed, x):
    model = net.build()
    keras_glorot.initialize(model, "isometric", seed, verbose=False)
    return model


STARTS = {
    "stock": functools.partial(drawn, "stock"),
    "he_normal": functools.partial(drawn, "he_normal"),
    "orthogonal": orthogonal,
    "LSUV": lsuv,
    "AnyInit": functools.partial(drawn, "AnyInit empirical"),
    "Fixup-like": fixup,
    "gain auto": functools.partial(drawn, "initialize"),
    "isometric": isometric,
}


@functools.lru_cache(maxsize=16)
def first_weights(net, start, calibrated, seed):
    """What `start` gives, then `calibrate` if asked for; raises what AnyInit raises."""
    x, _ = load(net, seed)["train"]
    x = keras.tree.map_structure(lambda a: a[:MEASURED], x)
    keras.backend.clear_session()  # the nets before this one
    keras.utils.set_random_seed(seed)
    model = STARTS[start](NETS[net], seed, x)
    if calibrated:
        keras_glorot.calibrate(model, x, verbose=False)
    return [variable.numpy() for variable in model.trainable_variables]


def checksum(net, start, calibrated, seed):
    """Of the first weights, bit by bit."""
    weights = first_weights(net, start, calibrated, seed)
    return f"{zlib.crc32(b''.join(weight.tobytes() for weight in weights)):08x}"
