"""The fans of every kind of layer against connections counted by differentiation.

Protects the rules in fans.py: the counter (connections.py) knows none of them.
"""

import keras
import numpy as np
import pytest
from layer_kinds import CONFIGURATIONS_PER_LAYER, KINDS

from keras_glorot import layer_fans

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="counts with jax.jacrev"
)


@pytest.mark.parametrize("number", range(CONFIGURATIONS_PER_LAYER))
@pytest.mark.parametrize("kind", KINDS)
def test_fans_equal_counted_connections(kind, number):
    from connections import count  # imports jax

    rng = np.random.default_rng([list(KINDS).index(kind), number])
    # Nothing has to be drawn, and JAX compiles each drawing of a new shape.
    zeros = dict.fromkeys(("glorot_uniform", "orthogonal"), keras.initializers.Zeros)
    with keras.saving.custom_object_scope(zeros):
        layer, input_shape = KINDS[kind](rng)
    counted = count(layer, input_shape)
    fans = {path.split("/")[-1]: pair for path, pair in layer_fans(layer).items()}
    # (The rest are biases of attention layers, which have two axes.)
    assert {name: fans[name] for name in counted} == counted, (
        f"{layer.get_config()} on {input_shape}"
    )
