"""The tools leave your random numbers, names and objects as they are."""

import collections
import dataclasses
import functools
import importlib.util
import random
import sys
import types
import weakref
from typing import Any

import keras
import numpy as np
import pytest

import keras_glorot
from keras_glorot._keras.state import unmoved_generators

layers: Any = keras.layers  # Keras declares many arguments as `str`
ops: Any = keras.ops
BACKEND = keras.backend.backend()

# Global generators


def backend_draw():
    """A number from the backend's global generator; JAX has none."""
    if BACKEND == "torch":
        import torch

        return float(torch.rand(()))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return float(tf.random.uniform(()))
    return 0.0


def draw_from_all():
    """What the user's code would get next from each global generator."""
    made = layers.Dense(2)
    made.build((None, 2))
    return {
        "Python": random.random(),
        "NumPy": np.random.random(),  # noqa: NPY002 - the global one
        "backend": backend_draw(),
        "Keras": float(keras.random.uniform(())),
        "weights": np.array(ops.convert_to_numpy(made.kernel)).tolist(),
        "names": made.name,
    }


class Draws(layers.Layer):
    """Its `__init__` and its `build` draw from everything global, and make names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made_with = keras.initializers.RandomNormal(stddev=random.random() + 0.5)

    def build(self, shape):
        size = (int(shape[-1]),)
        self.inner = [layers.Dense(2), layers.Dropout(0.5)]
        self.inner[0].build(shape)
        self.scale = self.add_weight(shape=size, initializer=self.made_with, name="scale")
        noise = np.random.random() + backend_draw()  # noqa: NPY002 - the global one
        self.scale.assign(self.scale * noise * keras.random.uniform(()))

    def call(self, x):
        return x * self.scale


class FromConfig(Draws):
    """Its weights are made in `__init__`, which only a config can run again."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noise = keras.random.SeedGenerator()
        self.early = self.add_weight(shape=(3,), initializer="normal", name="early")


def spectral(**kwargs):
    return layers.SpectralNormalization(layers.Dense(3), **kwargs)


def look(model):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    keras_glorot.layer_fans(model)
    keras_glorot.audit(model)
    keras_glorot.propagate(model, x, seed=1)


@pytest.mark.parametrize("make", [Draws, FromConfig, spectral])
def test_a_look_moves_no_global_generator(make):
    drawn = []
    for tool in (lambda model: None, look):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), make()])
        if make is Draws:  # else Keras has yet to make its own generator
            keras.random.uniform(())
        tool(model)
        drawn.append(draw_from_all())
    assert drawn[0] == drawn[1]


def test_generators_also_in_this_thread():
    drawn = []
    for inside in (lambda: None, draw_from_all):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        with unmoved_generators():
            inside()
        drawn.append(draw_from_all())
    assert drawn[0] == drawn[1]


# Objects that hold weights


class Holder(layers.Layer):
    """Keeps the weight that `build` makes in an object that `__init__` makes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.place = self.make_place()

    def make_place(self) -> Any:
        return types.SimpleNamespace()

    def build(self, shape):
        size = (int(shape[-1]),)
        made_with = keras.initializers.RandomUniform(0.5, 1.5)
        self.keep(self.add_weight(shape=size, initializer=made_with, name="odd"))

    def keep(self, weight):
        self.place.weight = weight

    def kept(self) -> Any:
        return [self.place.weight]

    def call(self, x):
        return x * self.kept()[-1]


class InNested(Holder):
    def make_place(self) -> Any:
        return types.SimpleNamespace(inner=types.SimpleNamespace(weight=None))

    def keep(self, weight):
        self.place.inner.weight = weight

    def kept(self) -> Any:
        return [self.place.inner.weight]


@dataclasses.dataclass
class Record:
    weight: Any = None
    others: list = dataclasses.field(default_factory=list)


class InDataclass(Holder):
    def make_place(self) -> Any:
        return Record()


class Slots:
    __slots__ = ("weight",)


class InSlots(Holder):
    def make_place(self) -> Any:
        return Slots()


class Helper:
    def __init__(self):
        self.weights = {"all": []}

    def add(self, weight):
        self.weights["all"].append(weight)


class InHelper(Holder):
    def make_place(self) -> Any:
        return Helper()

    def keep(self, weight):
        self.place.add(weight)

    def kept(self) -> Any:
        return self.place.weights["all"]


class ByBoundMethod(InHelper):
    def make_place(self) -> Any:
        return Helper().add

    def keep(self, weight):
        self.place(weight)

    def kept(self) -> Any:
        return self.place.__self__.weights["all"]


class InSequence(Holder):
    def make_place(self) -> Any:
        return collections.deque()

    def keep(self, weight):
        self.place.append(weight)

    def kept(self) -> Any:
        return list(self.place)


class InListInDict(InSequence):
    def make_place(self) -> Any:
        return {"deep": [({"all": []},)]}

    def keep(self, weight):
        self.place["deep"][0][0]["all"].append(weight)

    def kept(self) -> Any:
        return self.place["deep"][0][0]["all"]


class InArray(Holder):
    def make_place(self) -> Any:
        return np.array([None], dtype=object)

    def keep(self, weight):
        self.place[0] = weight

    def kept(self) -> Any:
        return list(self.place)


class InInitializer(Holder):
    """An initializer of the user's own is an object like others."""

    def make_place(self) -> Any:
        class Own(keras.initializers.Initializer):
            def __call__(self, shape, dtype=None):
                return ops.ones(shape, dtype)

        return Own()


class InClosure(Holder):
    def make_place(self) -> Any:
        kept = []
        return (kept.append, lambda: kept)

    def keep(self, weight):
        self.place[0](weight)

    def kept(self) -> Any:
        return self.place[1]()


class InCell(Holder):
    def make_place(self) -> Any:
        kept = []

        def keep(weight):
            nonlocal kept
            kept = [weight]

        return (keep, lambda: kept)

    def keep(self, weight):
        self.place[0](weight)

    def kept(self) -> Any:
        return self.place[1]()


class ByLambdaOfSelf(Holder):
    def make_place(self) -> Any:
        self.real = types.SimpleNamespace()
        return lambda weight: vars(self.real).update(weight=weight)

    def keep(self, weight):
        self.place(weight)

    def kept(self) -> Any:
        return [self.real.weight]


class ByPartial(InSequence):
    def make_place(self) -> Any:
        return functools.partial(list.append, [])

    def keep(self, weight):
        self.place(weight)

    def kept(self) -> Any:
        return self.place.args[0]


class ByWeakReference(Holder):
    def make_place(self) -> Any:
        self.real = Record()
        return weakref.ref(self.real)

    def keep(self, weight):
        self.place().weight = weight

    def kept(self) -> Any:
        return [self.real.weight]


class ByGenerator(InSequence):
    def make_place(self) -> Any:
        self.real = Helper()

        def receive(helper):
            while True:
                helper.add((yield))

        generator = receive(self.real)
        next(generator)
        return generator

    def keep(self, weight):
        self.place.send(weight)

    def kept(self) -> Any:
        return self.real.weights["all"]


class AfterAReading(ByGenerator):
    def build(self, shape):
        assert self.place
        super().build(shape)


REGISTRY: list = []


class InRegistry(Holder):
    def keep(self, weight):
        REGISTRY.append(weight)

    def kept(self) -> Any:
        return REGISTRY


class BesideRegistry(Holder):
    """As in KerasHub: a method for later reaches out, and `build` does not call it."""

    def register(self):
        REGISTRY.append(self)


class ByFunction(InRegistry):
    def keep(self, weight):
        register(weight)


def register(weight, registry=REGISTRY):
    registry.append(weight)


class ByImport(InRegistry):
    def keep(self, weight):
        import test_side_effects

        test_side_effects.REGISTRY.append(weight)


class ByModules(InRegistry):
    def keep(self, weight):
        sys.modules[__name__].REGISTRY.append(weight)


class ByName(InRegistry):
    def keep(self, weight):
        globals()["REGISTRY"].append(weight)


class InClass(Holder):
    shared: Any = []  # noqa: RUF012 - of all layers

    def keep(self, weight):
        self.shared.append(weight)

    def kept(self) -> Any:
        return self.shared


class OnClass(Holder):
    latest = 0

    def keep(self, weight):
        type(self).latest = weight

    def kept(self) -> Any:
        return [self.latest]


class BySetattr(OnClass):
    latest = 0

    def keep(self, weight):
        setattr(type(self), "latest", weight)  # noqa: B010


class CountsOnClass(Holder):
    count = 0

    def keep(self, weight):
        super().keep(weight)
        type(self).count += 1
        type(self).latest_count = self.count


class OnFunction(Holder):
    def keep(self, weight):
        register.latest = weight  # type: ignore

    def kept(self) -> Any:
        return [register.latest]  # type: ignore


LATEST: Any = None


class InGlobal(Holder):
    def keep(self, weight):
        global LATEST
        LATEST = weight

    def kept(self) -> Any:
        return [LATEST]


class Single:
    instance = None

    def __new__(cls):
        if cls.instance is None:
            cls.instance = super().__new__(cls)
        return cls.instance


class InSingleton(Holder):
    def make_place(self) -> Any:
        return Single()


class InDefault(Holder):
    def keep(self, weight, kept=[]):  # noqa: B006
        kept.append(weight)

    def kept(self) -> Any:
        return InDefault.keep.__defaults__[0]  # type: ignore


class InDescriptor(Holder):
    class Descriptor:
        def __init__(self):
            self.weights = []

        def __get__(self, instance, owner):
            return self.weights

    weights_of_all: Any = Descriptor()

    def keep(self, weight):
        self.weights_of_all.append(weight)

    def kept(self) -> Any:
        return self.weights_of_all


class FromConfigToo(InHelper):
    """Its config hands out the very object."""

    def __init__(self, place=None, **kwargs):
        super().__init__(**kwargs)
        self.place = place or Helper()

    def get_config(self):
        return {"place": self.place}


def kinds_of_holders(kind=Holder):
    below = [each for child in kind.__subclasses__() for each in kinds_of_holders(child)]
    return [kind, *below]


def initialize(model, x):
    keras_glorot.initialize(model, seed=1)


def calibrate(model, x):
    keras_glorot.calibrate(model, x, seed=1)


TOOLS = {
    "audit": lambda model, x: keras_glorot.audit(model),
    "layer_fans": lambda model, x: keras_glorot.layer_fans(model),
    "propagate": lambda model, x: keras_glorot.propagate(model, x, seed=1),
    "initialize": initialize,
    "calibrate": calibrate,
}
if importlib.util.find_spec("matplotlib"):
    TOOLS["report"] = keras_glorot.report


# One of a sort: in the copy, out of it, code that reaches it, code that is set on a class.
QUICK = (InHelper, InClosure, InRegistry, OnClass)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
        for kind in kinds_of_holders()
    ],
)
@pytest.mark.filterwarnings("ignore:`initialize` did not reset")
def test_a_model_computes_with_the_same_variables_after_each_tool(
    kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # for the report
    REGISTRY.clear()
    layer = kind()
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), layer, layers.Dense(1)])
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    weights = list(model.weights)
    kept = layer.kept()
    ids = [id(each) for each in kept]
    state = {name: id(value) for name, value in vars(layer).items()}
    for name, tool in TOOLS.items():
        before = np.array(ops.convert_to_numpy(model(x)))
        tool(model, x)
        assert [id(each) for each in model.weights] == [id(each) for each in weights], name
        assert [id(each) for each in layer.kept()] == ids, name
        assert {key: id(value) for key, value in vars(layer).items()} == state, name
        if name not in ("initialize", "calibrate"):
            after = ops.convert_to_numpy(model(x))
            np.testing.assert_array_equal(after, before, err_msg=name)
    assert kept[-1] is layer.weights[0]
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    before = np.array(ops.convert_to_numpy(layer.weights[0]))
    model.train_on_batch(x, np.ones((32, 1), "float32"))
    after = np.array(ops.convert_to_numpy(layer.weights[0]))
    assert not np.array_equal(after, before)
    ones = layer(np.ones((1, 3), "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(ones)[0], after)


# All that `build` reaches is in the copy; or the copy is without it, and `build` ends when
# its weight is made.
RESET = (
    *(Holder, InNested, InDataclass, InSlots, InHelper, ByBoundMethod, InSequence),
    *(InListInDict, InArray, ByPartial, FromConfigToo, InInitializer),
    *(InClosure, InCell, ByLambdaOfSelf, ByGenerator, ByWeakReference),
    *(CountsOnClass, BesideRegistry),
)


def test_attributes_of_classes_are_put_back():
    layer = CountsOnClass()
    layer.build((None, 3))
    del CountsOnClass.latest_count
    before = dict(vars(CountsOnClass))
    keras_glorot.initialize(layer, seed=1)
    assert dict(vars(CountsOnClass)) == before


@pytest.mark.parametrize("kind", kinds_of_holders())
def test_a_weight_is_reset_where_its_layer_can_be_copied(kind):
    REGISTRY.clear()
    layer = kind(name="holder")
    layer.build((None, 64))
    layer.weights[0].assign(ops.zeros(64))
    if kind in RESET:
        keras_glorot.initialize(layer, seed=1)
        assert 0.2 < np.std(ops.convert_to_numpy(layer.weights[0])) < 0.4
    else:
        with pytest.warns(
            UserWarning, match=r"did not reset holder/odd: .*can't be rebuilt: its"
        ):
            keras_glorot.initialize(layer, seed=1)
