"""Layers that are called in loops, derivatives and compiled programs of their own: they are
seen where the backend runs Python there, and listed where it traces."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_glorot import _backends as backends
from keras_glorot import calibrate, propagate
from keras_glorot._drawing.stream import draw

BACKEND = keras.backend.backend()
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="about the torch backend")


def compiled(function, **options):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    if BACKEND == "jax":
        import jax

        return jax.jit(function, **options)
    import torch

    return torch.compile(function, backend="eager")


def derivative(layer, x):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = ops.sum(layer(x) ** 2)
        return tape.gradient(outputs, x)
    if BACKEND == "jax":
        import jax

        return jax.grad(lambda x: ops.sum(layer(x) ** 2))(x)
    import torch

    x = x.requires_grad_()
    outputs = ops.sum(layer(x) ** 2)
    return torch.autograd.grad(outputs, x, create_graph=True)[0]


def kept_remat(layer, x):
    """As a model has it that made the function in `__init__`."""
    return REMAT(lambda x: layer(x))(x)


REMAT = keras.remat
# How a layer is called, and on which backends its calls can be seen.
EAGER = {"tensorflow", "torch"}
KINDS = {
    "plain": (lambda f, x: f(x), {*EAGER, "jax"}),
    "fori_loop": (lambda f, x: ops.fori_loop(0, 2, lambda i, x: f(x), x), EAGER),
    "scan": (lambda f, x: ops.scan(lambda x, _: (f(x), x), x, length=2)[0], EAGER),
    "cond": (lambda f, x: ops.cond(ops.sum(x) < 1e9, lambda: f(x), lambda: x), EAGER),
    "map": (lambda f, x: ops.map(lambda row: f(row[None])[0], x), EAGER),
    "vectorized_map": (
        lambda f, x: ops.vectorized_map(lambda row: f(row[None])[0], x),
        set(),
    ),
    "derivative": (derivative, EAGER),
    "remat": (lambda f, x: keras.remat(f)(x), {*EAGER, "jax"}),
    "kept remat": (kept_remat, set()),
    "compiled": (lambda f, x: compiled(lambda x: f(x))(x), {"torch"}),
}


class Around(layers.Layer):
    """Calls the layer in its middle in a way of its own."""

    def __init__(self, call_middle):
        super().__init__(name="around")
        self.first = layers.Dense(6, "tanh", name="first")
        self.middle = layers.Dense(6, "tanh", name="middle")
        self.last = layers.Dense(3, name="last")
        self.call_middle = call_middle

    def build(self, shape):
        self.first.build(shape)
        self.middle.build((None, 6))
        self.last.build((None, 6))

    def call(self, x):
        return self.last(self.call_middle(self.middle, self.first(x)))


def built(model):
    model.build((None, 6))
    for number, weight in enumerate(model.weights):
        if len(weight.shape) > 1:
            weight.assign(draw("uniform", weight.shape, 1.0, "float32", (number,)))
    return model


def enlarge(model):
    """Then all kernels need to be scaled."""
    model.set_weights([9 * weight for weight in model.get_weights()])


def data():
    return draw("truncated_normal", (12, 6), 1.0, "float32", (9,))


def of_code(table, code):
    return {finding.path for finding in table.findings if finding.code == code}


def by_path(table):
    return {row["path"]: row for row in table}


def outputs_of(model, x):
    with backends.without_compilation():  # PyTorch's compiler warns of much
        return np.array(ops.convert_to_numpy(model(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_propagate_sees_the_layer_or_lists_it(kind):
    call_middle, seen_on = KINDS[kind]
    model, x = built(Around(call_middle)), data()
    before = outputs_of(model, x)
    table = propagate(model, x)
    rows = by_path(table)
    assert of_code(table, "not-seen") == (set() if BACKEND in seen_on else {"middle"})
    assert ("middle" in rows) == (BACKEND in seen_on)
    # What is beside it, and what goes into the model and out, is right in any case.
    hidden = np.tanh(x @ np.float64(model.get_weights()[0]))
    assert rows["first"]["std"] == pytest.approx(hidden.std(), rel=1e-4)
    assert rows["last"]["std"] == pytest.approx(before.std(), rel=1e-4)
    assert rows["first"]["kernel_gradient_std"] > 0
    np.testing.assert_allclose(outputs_of(model, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kept remat", "vectorized_map", "compiled"])
def test_gradients_pass_what_is_not_seen(kind):
    """They are those of the same layer, called plainly."""
    table = propagate(built(Around(KINDS[kind][0])), data())
    plain = by_path(propagate(built(Around(KINDS["plain"][0])), data()))
    for path, row in by_path(table).items():
        for key in ("std", "gradient_std"):
            assert row[key] == pytest.approx(plain[path][key], rel=1e-4), (path, key)


@pytest.mark.parametrize("kind", ["fori_loop", "derivative", "kept remat", "compiled"])
def test_calibrate_scales_what_it_sees_and_lists_the_rest(kind):
    call_middle, seen_on = KINDS[kind]
    model, x = built(Around(call_middle)), data()
    enlarge(model)
    old = np.array(model.get_weights()[2])
    table = calibrate(model, x)
    unseen = set() if BACKEND in seen_on else {"middle/kernel"}
    assert of_code(table, "not-scaled") == unseen
    assert (
        by_path(table).keys()
        == {f"{name}/kernel" for name in ("first", "middle", "last")} - unseen
    )
    assert np.array_equal(old, model.get_weights()[2]) == bool(unseen)
    rows = by_path(propagate(model, x[1::2]))
    assert by_path(table)["last/kernel"]["std"] == pytest.approx(rows["last"]["std"], 0.02)


@pytest.mark.skipif(BACKEND != "jax", reason="other backends run the loop in Python")
def test_a_loop_that_has_no_gradient_is_named():
    def call_middle(layer, x):
        return ops.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, layer(x)), (0, x))[1]

    for tool in (propagate, calibrate):
        with pytest.raises(ValueError, match=r"`model` must be differentiable.*while_loop"):
            tool(built(Around(call_middle)), data())


SELF_IS_STATIC = {"static_argnums": 0} if BACKEND == "jax" else {}


class Compiled(layers.Dense):
    """A layer whose `call` is compiled by a decorator."""

    call = compiled(layers.Dense.call, **SELF_IS_STATIC)


def with_compiled_call():
    layer = layers.Dense(6, "tanh", name="middle")
    layer.build((None, 6))
    layer.call = compiled(layer.call)
    return layer


def compiled_whole():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, "tanh", name="middle")])
    model.call = compiled(model.call)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: Compiled(6, "tanh", name="middle"), with_compiled_call, compiled_whole],
    ids=["decorator", "attribute", "model"],
)
@pytest.mark.parametrize("is_called_before", [False, True])
def test_compiled_layers_are_seen_and_work_as_before(make, is_called_before):
    """The program of a layer must hold neither our wrappers nor the values of one pass."""
    parts = [layers.Dense(6, "tanh", name="first"), make(), layers.Dense(3, name="last")]
    model, x = built(keras.Sequential(parts)), data()
    if is_called_before:
        outputs_of(model, x)
    rows = by_path(propagate(model, x))
    middle = next(path for path in rows if path.endswith("middle"))
    first, kernel, _ = (np.float64(w) for w in model.get_weights() if w.ndim == 2)
    hidden = np.tanh(np.tanh(x @ first) @ kernel)
    assert rows[middle]["std"] == pytest.approx(hidden.std(), rel=1e-4)
    assert rows[middle]["kernel_gradient_std"] > 0

    enlarge(model)
    table = calibrate(model, x)
    assert not of_code(table, "not-scaled")
    first, kernel, last = (np.float64(w) for w in model.get_weights() if w.ndim == 2)
    std = (np.tanh(x[1::2] @ first) @ kernel).std()
    assert by_path(table)[f"{middle}/kernel"]["std"] == pytest.approx(std, rel=1e-3)
    # (A compiled function of JAX keeps the weights that it was traced with.)
    if BACKEND != "jax" or not is_called_before:
        expected = np.tanh(np.tanh(x @ first) @ kernel) @ last
        np.testing.assert_allclose(outputs_of(model, x), expected, rtol=1e-3, atol=1e-5)


@only_torch
@pytest.mark.slow  # PyTorch takes seconds to find the shapes of its modules
def test_a_torch_module_among_layers():
    import torch

    class Around(layers.Layer):
        def __init__(self):
            super().__init__(name="model")
            self.module = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
            self.last = layers.Dense(3, name="last")

        def build(self, shape):
            self.last.build(shape)

        def call(self, x):
            return self.last(self.module(x))

    model, x = built(Around()), data()
    assert by_path(propagate(model, x))["last"]["kernel_gradient_std"] > 0
    enlarge(model)
    assert by_path(calibrate(model, x))["last/kernel"]["factor"] < 0.5
    assert all(weight.value.grad is None for weight in model.weights)


@only_torch
@pytest.mark.parametrize("where", ["built", "called", "both"])
def test_inference_mode(where):
    import torch

    def mode(place):
        is_on = where in (place, "both")
        return torch.inference_mode() if is_on else contextlib.nullcontext()

    expected = propagate(built(Around(KINDS["plain"][0])), data())
    with mode("built"):
        model = built(Around(KINDS["plain"][0]))
    with mode("called"):
        assert propagate(model, data()).rows == expected.rows
        calibrate(model, data())
