"""Counts a layer's connections by differentiating it: the truth that fans.py must meet.

Nothing here knows kernel shapes or formulas for fans. A linear layer with a kernel of
ones has a Jacobian of zeros and ones: a row counts the weighted inputs summed into one
output, a column the outputs that one input reaches. Borders only ever take connections
away, so the largest row and column belong to positions far from them.
"""

import jax
import jax.numpy as jnp
import keras
import numpy as np


def _jit(function):
    # There is much to compile and little to compute.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)


def count(layer: keras.Layer, input_shape: tuple[int, ...]) -> dict[str, tuple]:
    """`{variable name: (fan_in, fan_out)}` of a linear layer, or of a recurrent cell.

    `input_shape` is without the batch axis.
    """
    x = jnp.zeros((1, *input_shape))
    if hasattr(layer, "state_size"):
        return _count_cell(layer, x)
    layer.build(x.shape)
    if hasattr(layer, "depthwise_kernel"):
        return _count_separable(layer, x)
    jacobian = _jacobian(layer, x)
    return {"kernel": _largest_sums(jacobian(kernel=np.ones(layer.kernel.shape)))}


def _count_separable(layer, x):
    """Each half is counted while the other only passes its values on."""
    depthwise = layer.depthwise_kernel.shape
    pointwise = layer.pointwise_kernel.shape
    center = tuple(size // 2 for size in layer.kernel_size)

    jacobian = _jacobian(layer, x)

    # One intermediate channel is let through: rows. All are gathered: columns.
    one, gather = np.zeros(pointwise), np.zeros(pointwise)
    one[..., 0, 0] = 1
    gather[..., :, 0] = 1
    ones = np.ones(depthwise)
    rows = jacobian(depthwise_kernel=ones, pointwise_kernel=one)
    columns = jacobian(depthwise_kernel=ones, pointwise_kernel=gather)
    depthwise_counts = _largest_sums(rows)[0], _largest_sums(columns)[1]

    # Each input is copied to all of its intermediate channels: rows. To one: columns.
    copies, copy = np.zeros(depthwise), np.zeros(depthwise)
    copies[(*center, slice(None), slice(None))] = 1
    copy[(*center, slice(None), 0)] = 1
    ones = np.ones(pointwise)
    rows = jacobian(depthwise_kernel=copies, pointwise_kernel=ones)
    columns = jacobian(depthwise_kernel=copy, pointwise_kernel=ones)
    return {
        "depthwise_kernel": depthwise_counts,
        "pointwise_kernel": (_largest_sums(rows)[0], _largest_sums(columns)[1]),
    }


def _count_cell(cell, x):
    """Gates multiply each other, so weights are counted where derivatives are not zero.

    A row: the inputs that one output depends on. A column: the weights that act when
    one input alone is switched on (each gate of each unit has its own).
    """
    rng = np.random.default_rng(0)
    cell.build(x.shape)
    values = [jnp.asarray(rng.uniform(0.1, 0.2, v.shape)) for v in cell.weights]
    seed = [v.value for v in cell.non_trainable_variables]  # of the dropout
    states = [
        jnp.asarray(rng.uniform(0.1, 0.2, state.shape))
        for state in cell.get_initial_state(batch_size=1)
    ]

    def run(values, x, first_state):
        (output, _), _ = cell.stateless_call(values, seed, x, [first_state, *states[1:]])
        return output

    names = [variable.name for variable in cell.weights]
    inputs = [values, x + 0.1, states[0]]
    positions = {"kernel": 1, "recurrent_kernel": 2}
    jacobians = _jit(jax.jacrev(run, tuple(positions.values())))(*inputs)
    gradient = _jit(jax.grad(lambda *inputs: run(*inputs).sum()))
    counts = {}
    for (name, position), rows in zip(positions.items(), jacobians, strict=True):
        source = inputs[position]
        fan_in = (np.asarray(rows) != 0).reshape(-1, source.size).sum(1).max()
        fan_out = 0
        for unit in range(source.size):
            alone = np.zeros(source.size, "float32")
            alone[unit] = 0.1
            switched = list(inputs)
            switched[position] = alone.reshape(source.shape)
            weights = np.asarray(gradient(*switched)[names.index(name)])
            fan_out = max(fan_out, (weights != 0).sum())
        counts[name] = int(fan_in), int(fan_out)
    return counts


def _jacobian(layer, x):
    """A function of named kernels: |d output / d input| as a matrix."""

    def run(x, kernels):
        weights = [
            kernels.get(v.name, jnp.zeros(v.shape)) for v in layer.trainable_variables
        ]
        return layer.stateless_call(weights, [], x)[0]

    differentiate = _jit(jax.jacrev(run))
    return lambda **kernels: np.abs(differentiate(x, kernels)).reshape(-1, x.size)


def _largest_sums(jacobian):
    return round(jacobian.sum(1).max()), round(jacobian.sum(0).max())
