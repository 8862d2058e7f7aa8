"""Fresh means: what building the model again would give. What is not, is said."""

import math
import re
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import rich.progress
from models import convnet

from keras_glorot import audit, initialize, layer_fans, register_fans
from keras_glorot._keras.rebuild import rebuild_sources
from keras_glorot._keras.tree import Tree
from keras_glorot._models import survey
from keras_glorot._models.survey import Survey

layers: Any = keras.layers  # Keras declares many arguments as `str`
optimizers: Any = keras.optimizers
ops: Any = keras.ops
BACKEND = keras.backend.backend()


def array(variable):
    return np.array(keras.ops.convert_to_numpy(variable))


def values(variables):
    return [array(variable) for variable in variables]


def assert_equal(one, other):
    for mine, its in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, its)


def disturb(variables, value=7):
    for variable in variables:
        variable.assign(keras.ops.full(variable.shape, value, variable.dtype))


def std(variable):
    return float(np.std(array(variable).astype(np.float64)))


def small():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, "tanh", name="one"), layers.Dense(3)]
    )


# Optimizers


def all_optimizers():
    classes = {
        value
        for value in vars(optimizers).values()
        if isinstance(value, type) and issubclass(value, optimizers.Optimizer)
    }
    wrappers = {optimizers.Optimizer, optimizers.LossScaleOptimizer}
    wrappers.add(getattr(optimizers, "MultiOptimizer", None))
    return sorted(classes - wrappers, key=lambda each: each.__name__)


WRAPPED = {
    "plain": lambda kind: kind(),
    "ema": lambda kind: kind(use_ema=True),
    "accumulation": lambda kind: kind(gradient_accumulation_steps=2),
    "loss scale": lambda kind: optimizers.LossScaleOptimizer(kind()),
    "schedule": lambda kind: kind(optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)),
}


def optimizer_state(optimizer):
    """By way of attributes: Keras does not list all variables of each optimizer."""
    states, seen = {}, set()

    def walk(value, name):
        if isinstance(value, keras.Variable):
            states[name] = array(value)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(item, f"{name}/{index}")
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{name}/{key}")
        elif isinstance(value, optimizers.Optimizer) and id(value) not in seen:
            seen.add(id(value))
            for key, item in vars(value).items():
                listed = ("_trainable_variables", "_learning_rate", "_variables")
                if key not in listed and not key.startswith("_self_"):
                    walk(item, f"{name}/{key}")

    walk(optimizer, "")
    return states


# What each optimizer keeps, and what each way to wrap one keeps; all pairs are slow.
@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [
        pytest.param(
            kind,
            wrapped,
            marks=[] if wrapped == "plain" or kind is optimizers.Adam else pytest.mark.slow,
            id=f"{kind.__name__}-{wrapped}",
        )
        for kind in all_optimizers()
        for wrapped in WRAPPED
    ],
)
def test_every_optimizer_of_keras_is_as_new(kind, wrapped):
    if (kind.__name__, BACKEND) == ("Muon", "tensorflow") and keras.__version__ < "3.11":
        pytest.skip("Keras 3.10's Muon can't train on TensorFlow")
    optimizer = WRAPPED[wrapped](kind)
    model = small()
    model.compile(optimizer, "mse", run_eagerly=True)
    x, y = np.ones((8, 4), "float32"), np.ones((8, 3), "float32")
    model.fit(x, y, batch_size=2, verbose=0)
    initialize(model, seed=0)
    reset = optimizer_state(optimizer)
    fresh = WRAPPED[wrapped](kind)
    fresh.build(model.trainable_variables)  # some start from the weights
    expected = optimizer_state(fresh)
    assert reset.keys() == expected.keys()
    assert len(reset) >= 1
    for name, value in expected.items():
        np.testing.assert_array_equal(reset[name], value, err_msg=name)


@pytest.mark.skipif(not hasattr(optimizers, "MultiOptimizer"), reason="a newer Keras's")
def test_several_optimizers_in_one():
    inner = {".*/one/.*": optimizers.Adam()}
    both = optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.SGD(momentum=0.9), inner)
    )
    by_function = optimizers.MultiOptimizer(lambda variable: inner[".*/one/.*"])
    for optimizer in (both, by_function):
        model = small()
        model.compile(optimizer, "mse", run_eagerly=True)
        model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
        assert array(inner[".*/one/.*"].iterations) > 0
        initialize(model)
        assert not any(np.any(value) for value in optimizer_state(optimizer).values())
        inner[".*/one/.*"] = optimizers.Adam()


class Gan(keras.Model):
    """Its optimizers are attributes, in a list and in a dictionary too."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = layers.Dense(3), layers.Dense(1)
        self.g_opt = optimizers.Adam()
        self.others = {"d": [optimizers.Nadam()]}

    def build(self, shape):
        self.generator.build(shape)
        self.critic.build((None, 3))

    def call(self, x):
        return self.critic(self.generator(x))


def test_every_optimizer_of_a_model_is_reset():
    gan = Gan()
    gan.build((None, 4))
    critic_optimizer = gan.others["d"][0]
    for optimizer, layer in ((gan.g_opt, gan.generator), (critic_optimizer, gan.critic)):
        variables = layer.trainable_variables
        optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    outer = keras.Sequential([keras.Input((4,)), gan])  # also one within another model
    initialize(outer)
    for optimizer in (gan.g_opt, critic_optimizer):
        assert array(optimizer.iterations) == 0
        for momentum in optimizer._momentums:
            assert not array(momentum).any()


class Stubborn(optimizers.SGD):
    def get_config(self):
        raise RuntimeError("no config")


def test_an_optimizer_that_can_not_be_reset_is_a_finding_and_a_warning():
    model = small()
    model.compile(Stubborn(0.1, momentum=0.9), "mse", run_eagerly=True)
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    with pytest.warns(UserWarning, match=r"did not reset .*: .*no config"):
        finding, _ = initialize(model).findings
    assert (finding.severity, finding.code) == ("warning", "optimizer")


# States


def test_states_of_recurrent_layers_start_again():
    class Started(layers.SimpleRNNCell):
        def get_initial_state(self, batch_size=None):
            return [ops.ones((batch_size, 3))]

    for rnn in (
        layers.LSTM(3, stateful=True),
        layers.Bidirectional(layers.GRU(3, stateful=True, return_sequences=True)),
        layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)], stateful=True),
        layers.RNN(Started(3), stateful=True),
        layers.ConvLSTM1D(2, 2, stateful=True),
    ):
        shape = (2, 5, 4, 1) if isinstance(rnn, layers.ConvLSTM1D) else (2, 5, 4)
        model = keras.Sequential([keras.Input(batch_shape=shape), rnn])
        states = [
            state
            for layer in Tree(rnn).layers
            if isinstance(layer, layers.RNN)
            for state in keras.tree.flatten(layer.states)
        ]
        before = values(states)
        model.predict(np.ones(shape), verbose=0)
        disturb(states)
        table = initialize(model, seed=0)
        assert_equal(values(states), before)
        count = len([r for r in table if r["done"] == "initial state"])
        assert count == len(states) > 0


class Hoarder(layers.Layer):
    """Holds a variable out of Keras's sight."""

    def build(self, shape):
        self.kept = keras.Variable(np.zeros(3), trainable=False, name="kept")
        self._tracker.untrack(self.kept)

    def call(self, x):
        return x


def test_no_variable_is_passed_over():
    layer = Hoarder()
    layer.build((None, 4))
    layer.kept.assign(np.ones(3))
    with pytest.warns(UserWarning, match="did not reset hoarder.*/kept"):
        table = initialize(layer)
    assert [row["path"] for row in table] == [f"{layer.name}/kept"]
    assert table.note.startswith("Reinitialized 0 of 1")


def test_seed_generators_and_metrics_anywhere():
    class Layer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.generators = {"a": [keras.random.SeedGenerator(5)]}
            self.mean = keras.metrics.Mean()

        def call(self, x):
            return x

    layer = Layer()
    layer(np.ones((1, 2)))
    layer.mean.update_state(3.0)
    layer.generators["a"][0].next()
    initialize(layer)
    assert array(layer.mean.total) == 0
    assert array(layer.generators["a"][0].state).tolist() == [5, 0]


# What `build` assigns


@keras.saving.register_keras_serializable("keras_glorot_tests")
class Positions(layers.Layer):
    """As in SigLIP, DINOv2 and DFine: a constant, a copy, and a sublayer's bias."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.offsets = layers.Dense(6, name="offsets")

    def build(self, shape):
        self.ids = self.add_weight(
            shape=(4,), initializer="zeros", dtype="int32", trainable=False, name="ids"
        )
        self.ids.assign(ops.arange(4))
        self.table = self.add_weight(shape=(8, 6), initializer="normal", name="table")
        self.half = self.add_weight(shape=(4, 6), initializer="zeros", name="half")
        self.half.assign(self.table[::2])
        self.unit = self.add_weight(shape=(8, 6), initializer="normal", name="unit")
        self.unit.assign(self.unit / ops.norm(self.unit))
        self.offsets.build(shape)
        self.offsets.bias.assign(ops.arange(6, dtype="float32"))
        self.offsets.kernel.assign(ops.eye(6))

    def call(self, x):
        return self.offsets(x)


class Unconfigured(Positions):
    """The same without a config."""

    def __init__(self, something, **kwargs):
        super().__init__(**kwargs)
        self.something = something

    def get_config(self):
        raise NotImplementedError("none")


class Outer(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [Positions(name="first"), Positions(name="second")]

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)

    def call(self, x):
        return self.blocks[1](self.blocks[0](x))


@pytest.mark.parametrize("make", [Positions, lambda: Unconfigured(object()), Outer])
def test_what_build_assigns_is_what_fresh_means(make):
    model = keras.Sequential([keras.Input((6,)), make()])
    fresh = values(model.variables)
    results = []
    for _ in range(2):
        disturb(model.variables, 3)
        table = initialize(model, seed=1)
        assert not table.findings
        results.append(values(model.variables))
    assert_equal(*results)
    found = {}
    for weight, new, built in zip(Survey(model).weights, results[0], fresh, strict=True):
        found.setdefault(weight.variable.name, []).append(new)
        if weight.variable.name in ("ids", "bias", "kernel"):
            np.testing.assert_array_equal(new, built)
    for half, whole in zip(found["half"], found["table"], strict=True):
        np.testing.assert_array_equal(half, whole[::2])
        assert 0.02 < whole.std() < 0.08
    for unit in found["unit"]:
        assert np.linalg.norm(unit) == pytest.approx(1, rel=1e-5)
    for repeated in (found["table"], found["unit"]):
        assert len({values.tobytes() for values in repeated}) == len(repeated)


class Overwritten(layers.Layer):
    """As in DFine: `build` puts the variable where its number was."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.factors = []

    def build(self, shape):
        initializer = keras.initializers.Constant(self.factor)
        self.factor = self.add_weight(shape=(1,), initializer=initializer, name="factor")
        for index in range(2):
            self.factors.append(self.add_weight(shape=(1,), name=f"factor_{index}"))

    def call(self, x):
        return x


def test_what_build_made_is_not_what_it_reads():
    layer = Overwritten(0.5)
    layer.build((None, 3))
    layer.factor.assign([7.0])
    assert not initialize(layer, seed=0).findings
    assert array(layer.factor) == 0.5
    assert len(layer.factors) == 2


class Buffered(layers.Layer):
    """As in rotary embeddings: a buffer that is made of a value, beside weights."""

    def build(self, shape):
        self.freq = keras.Variable(np.arange(4.0), trainable=False, name="freq")
        made_with = keras.initializers.RandomNormal(stddev=3.0)
        self.odd = self.add_weight(shape=(4, 64), initializer=made_with, name="odd")
        self.twice = keras.Variable(self.odd * 2, name="twice")
        self.freq.assign(self.freq + 1)

    def call(self, x):
        return x


def test_a_variable_made_of_a_value():
    layer = Buffered()
    layer.build((None, 3))
    disturb(layer.variables, 0)
    assert not initialize(layer, seed=0).findings
    np.testing.assert_array_equal(layer.freq, np.arange(4) + 1)
    assert abs(std(layer.odd) / 3 - 1) < 0.2
    np.testing.assert_array_equal(array(layer.twice), 2 * array(layer.odd))


class Counting(keras.Model):
    """A variable that `__init__` makes of a value, beside one of an initializer."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.steps = keras.Variable(5, trainable=False, dtype="int32", name="steps")

    def call(self, x):
        return x * self.scale


def test_a_variable_that_init_makes_of_a_value():
    model = Counting()
    model(np.ones((1, 2)))
    disturb(model.variables)
    assert not initialize(model, seed=0).findings
    assert [float(value) for value in values(model.weights)] == [1, 5]


class DenseTranspose(layers.Layer):
    """As in tied autoencoders: no config, and the kernel of another layer."""

    def __init__(self, dense, activation=None):
        super().__init__()
        self.dense, self.activation = dense, activation

    def build(self, shape):
        size = self.dense.kernel.shape[0]
        self.offset = self.add_weight(shape=(size,), initializer="ones", name="offset")

    def call(self, x):
        return x @ ops.transpose(self.dense.kernel) + self.offset


def test_a_weight_of_a_layer_that_is_tied_to_another_one():
    dense = layers.Dense(2)
    tied = DenseTranspose(dense)
    model = keras.Sequential([keras.Input((4,)), dense, tied])
    kernel = dense.kernel
    disturb(model.variables)
    assert not initialize(model, seed=0).findings
    np.testing.assert_array_equal(array(tied.offset), np.ones(4))
    assert dense.kernel is tied.dense.kernel is kernel
    assert std(dense.kernel) > 0


class Settings(NamedTuple):
    units: int = 64
    initializer: Any = keras.initializers.RandomNormal(stddev=0.01)


class Configured(layers.Layer):
    """Its settings are a named tuple."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.settings = Settings()

    def build(self, shape):
        size, initializer = (64, self.settings.units), self.settings.initializer
        self.table = self.add_weight(shape=size, initializer=initializer, name="table")

    def call(self, x):
        return x


def test_a_layer_that_is_configured_by_a_named_tuple():
    layer = Configured()
    layer.build((None, 3))
    disturb(layer.variables)
    assert not initialize(layer, seed=0).findings
    assert abs(std(layer.table) / 0.01 - 1) < 0.05


class OverwrittenConfig(Overwritten):
    def get_config(self):
        return {"factor": self.factor}


def test_a_config_that_holds_what_build_made():
    layer = OverwrittenConfig(0.5)
    layer.build((None, 3))
    layer.factor.assign([7.0])
    with pytest.warns(UserWarning, match="did not reset overwritten_config"):
        initialize(layer, seed=0)
    assert array(layer.factor) == 7


class Incomplete(layers.Layer):
    """As in Qwen-MoE: a config that lacks an argument, and so gives another layer."""

    def __init__(self, std=1.0, **kwargs):
        super().__init__(**kwargs)
        self.std = std

    def build(self, shape):
        initializer = keras.initializers.RandomNormal(stddev=self.std)
        self.table = self.add_weight(shape=(64, 64), initializer=initializer, name="table")

    def call(self, x):
        return x

    def get_config(self):
        return {"name": self.name}


def test_a_config_that_lacks_something():
    layer = Incomplete(0.01)
    layer.build((None, 3))
    initialize(layer, seed=0)
    assert abs(std(layer.table) / 0.01 - 1) < 0.05


class Part(layers.Layer):
    """As in T5: its weight is made in `__init__`, and it has no config."""

    def __init__(self, something, **kwargs):
        super().__init__(**kwargs)
        self.table = self.add_weight(shape=(2, 2), initializer="ones", name="table")

    def call(self, x):
        return x

    def get_config(self):
        raise NotImplementedError("none")


class Backbone(keras.Model):
    """As in KerasHub: a functional model with a config of its own."""

    def __init__(self, size=3, **kwargs):
        inputs = keras.Input((size,))
        super().__init__(inputs, Part(object())(layers.Dense(size)(inputs)), **kwargs)
        self.size = size

    def get_config(self):
        return {"size": self.size}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)


def test_the_model_can_know_what_its_layer_does_not():
    model = Backbone(4)
    disturb(model.variables)
    assert not initialize(model, seed=0).findings
    np.testing.assert_array_equal(model.layers[-1].table, np.ones((2, 2)))


def test_a_survey_changes_nothing():
    layer = Unconfigured(object())
    layer.build((None, 6))
    before = values(layer.variables)
    held = {name: id(value) for name, value in vars(layer).items()}
    inside = {name: id(value) for name, value in vars(layer.offsets).items()}
    paths = [variable.path for variable in layer.variables]
    initialize(layer, seed=0)
    layer_fans(layer)
    assert {name: id(value) for name, value in vars(layer).items()} == held
    assert {name: id(value) for name, value in vars(layer.offsets).items()} == inside
    assert [variable.path for variable in layer.variables] == paths
    assert len(before) == len(layer.variables)


def test_each_layer_is_rebuilt_once_per_survey(monkeypatch):
    model = keras.Sequential([keras.Input((6,)), Outer(), Unconfigured(object())])
    rebuilt = []
    original = rebuild_sources

    def note(layer):
        rebuilt.append(layer)
        return original(layer)

    monkeypatch.setattr(survey, "rebuild_sources", note)
    layer_fans(model)
    assert rebuilt == model.layers  # not the blocks in them again


# Layers without a config


class Experts(layers.Layer):
    """As in Mixtral: no config, an initializer in an argument, no `kernel` in the names."""

    def __init__(self, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.made_with = keras.initializers.get(kernel_initializer)

    def build(self, shape):
        self.gate = self.add_weight(shape=(4, 32, 64), initializer=self.made_with)
        self.up = self.add_weight(shape=(4, 32, 64), initializer=self.made_with)
        self.scale = self.add_weight(shape=(64,), initializer="ones", name="scale")

    def call(self, x):
        return ops.sum(ops.einsum("bi,eio->beo", x, self.gate * self.up), 1)


class RuledExperts(Experts):
    """The same with a rule, as the guide to one layer teaches."""


@register_fans(RuledExperts)
def experts_fans(layer, shape):
    return shape[-2:]


def test_layers_without_a_config():
    given: Any = keras.initializers.GlorotUniform()  # an object is not in the auto-config
    for kind, fans in ((Experts, (4 * 32, 4 * 64)), (RuledExperts, (32, 64))):
        layer = kind(given)
        layer.build((None, 32))
        disturb(layer.variables)
        assert not initialize(layer, seed=0).findings
        gate, up = array(layer.gate), array(layer.up)
        assert not np.array_equal(gate, up)
        assert len(set(layer_fans(layer).values())) == 1
        assert next(iter(layer_fans(layer).values())) == fans or kind is Experts
        expected = math.sqrt(2 / sum(next(iter(layer_fans(layer).values()))))
        assert abs(gate.std() / expected - 1) < 0.02
        np.testing.assert_array_equal(layer.scale, np.ones(64))


def test_a_rule_or_a_name_makes_a_kernel():
    small_values = keras.initializers.RandomNormal(stddev=0.001)
    layer = RuledExperts(small_values)
    layer.build((None, 32))
    initialize(layer, seed=0)
    assert abs(std(layer.gate) / math.sqrt(2 / 96) - 1) < 0.02

    class Named(layers.Layer):
        """Made in `__init__`, without a config: nothing but the name is known."""

        def __init__(self, something):
            super().__init__()
            self.kernel = self.add_weight(shape=(64, 64), name="kernel")
            self.other = self.add_weight(shape=(64, 64), name="other")

        def call(self, x):
            return x

    layer = Named(object())
    layer(np.ones((1, 2)))
    disturb(layer.variables)
    with pytest.warns(UserWarning, match="did not reset named.*/other"):
        initialize(layer, seed=0)
    assert abs(std(layer.kernel) * 8 - 1) < 0.05
    assert (array(layer.other) == 7).all()

    class Blur(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(
                shape=(3, 3), initializer=keras.initializers.Constant(1 / 9), name="kernel"
            )

        def call(self, x):
            return x

    blur = Blur()
    blur.build((None, 3))
    initialize(blur)  # a constant filter stays
    np.testing.assert_allclose(blur.kernel, np.full((3, 3), 1 / 9))


# Vectors given to an Embedding


def with_vectors(trainable, vectors):
    given = layers.Embedding(50, 8, weights=[vectors], trainable=trainable, name="given")
    return keras.Sequential(
        [keras.Input((3,), dtype="int32"), given, layers.Flatten(), layers.Dense(2)]
    )


@pytest.mark.parametrize("trainable", [False, True])
def test_given_vectors_stay_and_are_listed(trainable, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype("float32")
    model = with_vectors(trainable, vectors)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        assert "std" not in {finding.code for finding in audit(each).findings}
        if trainable:  # they may have been trained
            with pytest.warns(UserWarning, match="did not reset given/embeddings"):
                table = initialize(each, seed=0)
        else:
            table = initialize(each, seed=0)
        (finding,) = table.findings
        assert finding.path == "given/embeddings"
        assert finding.severity == ("warning" if trainable else "info")
        assert "vectors given as `weights`" in finding.message
        np.testing.assert_array_equal(each.layers[0].embeddings, vectors)
        assert not audit(each).findings


def test_embeddings_without_vectors_are_drawn():
    class Outer(layers.Layer):
        """Builds it without a shape, as some of KerasHub's layers do."""

        def __init__(self):
            super().__init__()
            self.queries = layers.Embedding(50, 8)

        def build(self, shape):
            self.queries.build()

        def call(self, x):
            return self.queries(x)

    outer = Outer()
    outer(np.zeros((1, 2), "int32"))
    disturb(outer.weights)
    assert not initialize(outer, seed=0).findings
    assert 0.02 < std(outer.weights[0]) < 0.04


# Initializers


def test_initializers_that_return_scalars_and_arrays():
    class Layer(layers.Layer):
        def build(self, shape):
            scalar: Any = lambda *args, **options: math.log(1 / 0.07)  # noqa: E731
            rows: Any = lambda shape, dtype=None: np.arange(6.0).reshape(2, 3)  # noqa: E731
            self.scalar = self.add_weight(shape=(), initializer=scalar, name="scalar")
            self.rows = self.add_weight(shape=(2, 3), initializer=rows, name="rows")

        def call(self, x):
            return x

    layer = Layer()
    layer.build((None, 2))
    fresh = values(layer.variables)
    disturb(layer.variables)
    assert not initialize(layer).findings
    assert_equal(values(layer.variables), fresh)


@pytest.mark.parametrize(
    ("initializer", "fault"),
    [
        (keras.initializers.RandomNormal(stddev=math.nan), "numbers, not nan"),
        (keras.initializers.RandomUniform(math.nan, 1.0), "numbers, not nan"),
        (keras.initializers.Constant(math.nan), "numbers, not nan"),
        (
            keras.initializers.RandomNormal(stddev=1e-60),
            "must give values that are larger for",
        ),
        (lambda shape, dtype: ops.full(shape, math.nan, dtype), "returned nan"),
        (lambda shape, dtype: 1.0, "a tensor of shape"),
    ],
)
def test_initializers_that_give_no_usable_numbers(initializer, fault):
    model = small()
    before = values(model.variables)
    with pytest.raises(ValueError, match=fault):
        initialize(model, initializer)
    assert_equal(values(model.variables), before)


def test_a_gain_too_small_for_the_dtype():
    from keras_glorot import GlorotUniform

    layer = layers.Dense(8, dtype="float16")
    layer.build((None, 8))
    with pytest.raises(ValueError, match="larger for weights of float16"):
        initialize(layer, GlorotUniform(gain=1e-9))


# Same model, same weights


def named_like_automatic():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="dense_2"),
            layers.Dense(4, name="dense_1"),
            layers.Dense(4, name="other"),
        ]
    )


def nested_sequential():
    inner = keras.Sequential([layers.Dense(4), keras.Sequential([layers.Dense(4)])])
    return keras.Sequential([keras.Input((4,)), inner, layers.Dense(4)])


def nested_functional():
    x = keras.Input((4,))
    inner = keras.Model(x, layers.Dense(4)(layers.Dense(4)(x)))
    y = keras.Input((4,))
    return keras.Model(y, inner(layers.Dense(4)(inner(y))))


@keras.saving.register_keras_serializable("keras_glorot_tests")
class Early(layers.Layer):
    """Weights without a name, made in `__init__` of unnamed sublayers, as in ConvNeXt."""

    def __init__(self, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.w = self.add_weight(shape=(4, 4))
        self.v = self.add_weight(shape=(4, 4))
        self.inner = [Early(depth - 1) for _ in range(2)] if depth else []

    def build(self, shape):
        for layer in self.inner:
            layer.build(shape)

    def call(self, x):
        x = x @ self.w @ self.v
        for layer in self.inner:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


def early():
    return keras.Sequential([keras.Input((4,)), Early(), Early()])


@keras.saving.register_keras_serializable("keras_glorot_tests")
class NamedAfterParent(layers.Layer):
    """Its sublayers are named after itself, and its name is automatic; as in HGNetV2."""

    def build(self, shape):
        self.inner = layers.Dense(4, name=f"{self.name}_inner")
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


def named_after_parent():
    return keras.Sequential([keras.Input((4,)), NamedAfterParent(), NamedAfterParent()])


@keras.saving.register_keras_serializable("keras_glorot_tests")
class Encoder(layers.Layer):
    """The name that its author chose begins with an automatic one."""

    def build(self, shape):
        self.inner = layers.Dense(4, name="encoder_proj")
        self.inner.build(shape)
        self.w = self.add_weight(shape=(4,), initializer="normal", name=f"{self.name}_w")

    def call(self, x):
        return self.inner(x) * self.w


def named_by_its_author():
    return keras.Sequential([keras.Input((4,)), Encoder(), Encoder()])


def tied():
    x = keras.Input((4,), dtype="int32")
    embedding = layers.Embedding(6, 6)
    wrapped = layers.TimeDistributed(layers.Dense(6))
    return keras.Model(x, layers.Dense(2)(wrapped(embedding(x))))


@pytest.mark.parametrize(
    "make",
    [
        named_like_automatic,
        nested_sequential,
        nested_functional,
        early,
        named_after_parent,
        named_by_its_author,
        tied,
        convnet,
    ],
)
def test_the_same_model_gets_the_same_weights_whatever_its_history(make, tmp_path):
    model = make()
    initialize(model, seed=3)
    weights = values(model.weights)
    for _ in range(12):  # two digits sort differently
        layers.Dense(1)
        layers.Embedding(1, 1)
    model.save(tmp_path / "model.keras")
    others = {
        "built again": make(),
        "loaded": keras.saving.load_model(tmp_path / "model.keras"),
        "cloned": keras.models.clone_model(model),
        "from config": type(model).from_config(model.get_config()),
    }
    keras.utils.clear_session()
    others["in a new session"] = make()
    for history, other in others.items():
        disturb(other.variables)
        initialize(other, seed=3)
        for mine, its in zip(weights, values(other.weights), strict=True):
            np.testing.assert_array_equal(mine, its, err_msg=history)


# Names that an author can give to a sublayer or a weight: `own` is the name of the layer
# that makes it, `kind` is that name when it is the first of its class.
NAMINGS = {
    "fixed": lambda own, kind, word: f"{kind}_{word}",
    "own": lambda own, kind, word: f"{own}_{word}",
    "own, numbered": lambda own, kind, word: f"{own}_{len(word)}",
    "fixed, numbered": lambda own, kind, word: f"{kind}_{len(word)}",
    "own, another separator": lambda own, kind, word: f"{own}-{word}",
    "unlike": lambda own, kind, word: word,
    "automatic": lambda own, kind, word: None,
}


def generated_block(rng):
    """A class of blocks with names of all these kinds, at two depths."""

    def some_word(least):
        return "".join(rng.choice(list("abcdeopst"), rng.integers(least, 9)))

    class_name = "".join(some_word(1).title() for _ in range(rng.integers(1, 4)))
    chosen = tuple(NAMINGS[key] for key in rng.choice(list(NAMINGS), 8))
    words = tuple(f"{some_word(3)}{number}" for number in range(8))

    class Inner(layers.Layer):
        def __init__(self, outer_name, kind, **kwargs):
            super().__init__(**kwargs)
            name = chosen[6](outer_name, kind, words[6])
            self.inner = layers.Dense(4, name=name)

        def call(self, x):
            return self.inner(x)

    def init(self, **kwargs):
        layers.Layer.__init__(self, **kwargs)
        kind = re.sub(r"_\d+$", "", self.name)
        named = [
            name(self.name, kind, word)
            for name, word in zip(chosen[:5], words[:5], strict=True)
        ]
        self.dense = [layers.Dense(4, name=name) for name in named]
        self.nested = Inner(self.name, kind, name=chosen[5](self.name, kind, words[5]))
        name = chosen[7](self.name, kind, words[7])
        self.w = self.add_weight(shape=(4,), initializer="normal", name=name)

    def call(self, x):
        for dense in self.dense:
            x = dense(x)
        return self.nested(x) * self.w

    return type(class_name, (layers.Layer,), {"__init__": init, "call": call})


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=pytest.mark.slow if n > 3 else ()) for n in range(12)],
)
def test_a_block_gets_the_same_weights_whatever_its_number(number):
    """The first of a class is `encoder`, the second `encoder_1`, the twelfth `encoder_11`.

    One name can't be told apart: `encoder_1_proj` in `encoder_1` is taken for its own.
    """
    rng = np.random.default_rng(number)
    block = generated_block(rng)
    blocks = [block() for _ in range(12)]
    drawn = []
    for each in (blocks[0], blocks[1], blocks[-1]):
        model = keras.Sequential([keras.Input((4,)), each])
        initialize(model, seed=3)
        drawn.append(values(model.weights))
    names = [weight.path for weight in Survey(blocks[1]).weights]
    for other in drawn[1:]:
        for mine, its, name in zip(drawn[0], other, names, strict=True):
            np.testing.assert_array_equal(mine, its, err_msg=name)


def test_a_loaded_weight_keeps_its_maker(tmp_path):
    """Weights of a tied layer belong to the layer that made them, wherever it is."""

    class Tied(layers.Layer):
        def __init__(self, source):
            super().__init__()
            self.source = source

        def build(self, shape):
            self.kernel = self.source.kernel

        def call(self, x):
            return x @ ops.transpose(self.kernel)

    dense = layers.Dense(8, name="maker")
    dense.build((None, 4))
    head = Tied(dense)
    head.build((None, 8))
    outer = keras.Sequential([keras.Input((4,)), dense, head])
    owners = [owner.name for owner, _ in Tree(outer).owned_weights]
    assert owners == ["maker", "maker"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(n for n in vars(keras.applications) if n[0].isupper())
)
def test_applications_built_again_or_from_config_get_the_same_seeds(name):
    """By the canonical paths, which are all that a seed is made from."""
    if name == "NASNetMobile" and BACKEND == "torch":
        pytest.skip("Keras does not offer it there")

    def seeds(model):
        tree = Tree(model)
        return [tree.seed_path(*owned) for owned in tree.owned_weights]

    with keras.StatelessScope(initialize_variables=False):
        build = getattr(keras.applications, name)
        model = build(weights=None)
        layers.Dense(1)
        again = seeds(build(weights=None))
        loaded = seeds(keras.Model.from_config(model.get_config()))
    keras.utils.clear_session(free_memory=False)
    assert seeds(model) == again == loaded
    assert len(set(again)) == len(again)


# Half-way


def test_a_bar_that_fails_stops_nothing(monkeypatch):
    model = small()

    def fail(*arguments, **options):
        raise rich.errors.LiveError("another one")

    monkeypatch.setattr(rich.progress.Progress, "refresh", fail)
    monkeypatch.setattr(rich.progress.Progress, "start", fail)
    initialize(model, seed=1, verbose=True)
    drawn = values(model.variables)
    initialize(model, seed=1, verbose=False)
    assert_equal(values(model.variables), drawn)


def test_inside_another_live_display():
    import io

    from rich.console import Console
    from rich.progress import Progress

    terminal = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console=terminal) as outer:
        initialize(small(), seed=1, verbose=True)
        with Progress():  # the console that rich shares
            initialize(small(), seed=1, verbose=True)
        assert outer.live.is_started
    assert not keras_live_displays()


def keras_live_displays():
    console = rich.get_console()
    return getattr(console, "_live_stack", None) or getattr(console, "_live", None)


def test_an_interrupt_closes_the_bar():
    class Interrupting(keras.initializers.Initializer):
        calls = 0

        def __call__(self, shape, dtype=None):
            return ops.ones(shape, dtype)

    model = small()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keras_glorot._backends.assign", interrupt)
        with pytest.raises(KeyboardInterrupt):
            initialize(model, verbose=True)
    assert not keras_live_displays()


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's")
def test_variables_built_in_inference_mode():
    import torch

    with torch.inference_mode():
        model = convnet()
        model.compile("adam", "mse")
    disturbed = values(model.variables)
    initialize(model, seed=1)
    assert not all(map(np.array_equal, disturbed, values(model.variables)))
    twin = convnet()
    initialize(twin, seed=1)
    assert_equal(values(model.variables), values(twin.variables))
