"""Layers of every kind with random arguments, each with a shape of its inputs."""

from typing import Any

import keras

layers: Any = keras.layers  # Keras declares many arguments as `str`
CONFIGURATIONS_PER_LAYER = 10


def dense(rng):
    return layers.Dense(_size(rng)), (_size(rng),)


def einsum_dense(rng):
    """Any mix of axes, in any order: positions, batches, summed, new, an ellipsis."""
    letters = iter(rng.permutation(list("abcdefghijklmnopqrstuvwxyz")))
    sizes = {}

    def some(least, most):
        chosen = [next(letters) for _ in range(rng.integers(least, most + 1))]
        sizes.update({letter: _size(rng, 4) for letter in chosen})
        return chosen

    # Without an ellipsis the first letter is the batch axis of the data.
    positions, batches, summed, new = some(0, 2), some(0, 1), some(1, 2), some(0, 2)
    if not (summed + new):
        new = some(1, 1)
    data = next(letters)
    kernel = "".join(rng.permutation(batches + summed + new))
    inputs = [str(letter) for letter in rng.permutation(positions + batches + summed)]
    outputs = [str(letter) for letter in rng.permutation(positions + batches + new)]
    input_shape = tuple(sizes[letter] for letter in inputs)
    output_shape = tuple(sizes[letter] for letter in outputs)
    dots = rng.choice(["none", "left", "right"])
    inputs, outputs = "".join(inputs), "".join(outputs)
    if dots == "left":
        equation = f"...{inputs},{kernel}->...{outputs}"
        extra = tuple(_size(rng, 3) for _ in range(rng.integers(0, 2)))
        return layers.EinsumDense(equation, output_shape), (*extra, *input_shape)
    if dots == "right":
        equation = f"{data}{inputs}...,{kernel}->{data}{outputs}..."
        extra = tuple(_size(rng, 3) for _ in range(rng.integers(0, 2)))
        layer = layers.EinsumDense(equation, output_shape + extra)
        return layer, (*input_shape, *extra)
    equation = f"{data}{inputs},{kernel}->{data}{outputs}"
    return layers.EinsumDense(equation, output_shape), input_shape


def conv(rank):
    def make(rng):
        groups = _size(rng, 3)
        channels, filters = groups * _size(rng, 3), groups * _size(rng, 3)
        options = _window(rng, rank)
        layer = getattr(layers, f"Conv{rank}D")(
            filters, options.pop("kernel_size"), groups=groups, **options
        )
        return layer, _image(rng, layer, channels)

    return make


def conv_transpose(rank):
    def make(rng):
        options = _window(rng, rank)
        del options["dilation_rate"]  # not supported together with JAX's padding
        layer = getattr(layers, f"Conv{rank}DTranspose")(_size(rng), **options)
        return layer, _image(rng, layer, _size(rng))

    return make


def depthwise(rank):
    def make(rng):
        layer = getattr(layers, f"DepthwiseConv{rank}D")(
            depth_multiplier=_size(rng, 3), **_window(rng, rank)
        )
        return layer, _image(rng, layer, _size(rng))

    return make


def separable(rank):
    def make(rng):
        layer = getattr(layers, f"SeparableConv{rank}D")(
            _size(rng), depth_multiplier=_size(rng, 3), **_window(rng, rank)
        )
        return layer, _image(rng, layer, _size(rng))

    return make


def cell(name):
    def make(rng):
        return getattr(layers, name)(_size(rng)), (_size(rng),)

    return make


def conv_lstm(rank):
    def make(rng):
        layer = getattr(layers, f"ConvLSTM{rank}D")(
            _size(rng, 2), int(rng.integers(1, 4 if rank < 3 else 3)), padding="same"
        )
        side = 2 * max(layer.kernel_size) - 1
        return layer.cell, (side,) * rank + (_size(rng, 3),)

    return make


def attention(rng):
    """One of the projections inside an attention layer."""
    heads = _size(rng, 3)
    sizes = {"key_dim": _size(rng, 4), "value_dim": _size(rng, 4)}
    layer = layers.MultiHeadAttention(heads, **sizes)
    return _projection(rng, layer)


def grouped_attention(rng):
    groups = _size(rng, 2)
    layer = layers.GroupQueryAttention(_size(rng, 4), groups * _size(rng, 2), groups)
    return _projection(rng, layer)


def _projection(rng, attention):
    shape = (1, 3, _size(rng))
    attention.build(shape, shape)
    parts = [
        layer
        for layer in attention._flatten_layers(include_self=False)
        if isinstance(layer, layers.EinsumDense)
    ]
    assert len(parts) == 4
    part = parts[rng.integers(4)]
    built = part.get_build_config()["input_shape"]
    return type(part).from_config(part.get_config()), tuple(n or 3 for n in built[1:])


def _size(rng, most=5):
    return int(rng.integers(1, most + 1))


def _window(rng, rank):
    widest = {1: 5, 2: 3, 3: 2}[rank]
    dilation = int(rng.integers(1, 3)) if rank < 3 else 1
    return {
        "kernel_size": tuple(int(n) for n in rng.integers(1, widest + 1, rank)),
        "padding": str(rng.choice(["valid", "same"])),
        "dilation_rate": dilation,
    }


def _image(rng, layer, channels):
    """Just large enough for one position that no border touches."""
    dilation = max(getattr(layer, "dilation_rate", (1,)))
    return (
        *(2 * dilation * (size - 1) + 1 for size in layer.kernel_size),
        channels,
    )


KINDS = {
    "Dense": dense,
    "EinsumDense": einsum_dense,
    "EinsumDense-more": einsum_dense,
    "MultiHeadAttention": attention,
    "GroupQueryAttention": grouped_attention,
    **{f"Conv{rank}D": conv(rank) for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"DepthwiseConv{rank}D": depthwise(rank) for rank in (1, 2)},
    **{f"SeparableConv{rank}D": separable(rank) for rank in (1, 2)},
    **{name: cell(name) for name in ("SimpleRNNCell", "LSTMCell", "GRUCell")},
    **{f"ConvLSTM{rank}D": conv_lstm(rank) for rank in (1, 2)},
}
