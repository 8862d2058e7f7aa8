"""Adam with Keras's defaults, in a program that JAX traces."""

import jax
import jax.numpy as jnp


def start(weights):
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return weights, zeros, zeros, jnp.float32(0)


def update(loss, rate, state, batch):
    """The next state, and the loss on the batch; as `jax.lax.scan` calls it."""
    weights, means, squares, count = state
    value, slopes = jax.value_and_grad(loss)(weights, *batch)
    count += 1
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, slopes)
    squares = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, squares, slopes)
    size = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    weights = jax.tree.map(
        lambda w, m, v: w - size * m / (jnp.sqrt(v) + 1e-7), weights, means, squares
    )
    return (weights, means, squares, count), value
