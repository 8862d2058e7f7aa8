"""The names that `_keras` takes from inside Keras: without any one of them, the results
are right, or a warning says that they are not."""

import ast
import importlib
import math
import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_glorot
from keras_glorot import _keras

SOURCES = sorted(Path(_keras.__path__[0]).glob("[!_]*.py"))
MODULES = [f"{_keras.__name__}.{source.stem}" for source in SOURCES]
# Its own private attributes are those of these two.
OWN = {"self", "_deferred"}


def private_name(node):
    """The private name of Keras that a node of the syntax tree asks for, or None."""
    match node:
        case ast.Attribute(value=ast.Name(id=owner)) if owner in OWN:
            return None
        case ast.Attribute(attr=name) if name.startswith("__"):
            return None  # Python's own
        case ast.Attribute(attr=name) if name.startswith("_") or name == "caller":
            return name
        case ast.Call(
            func=ast.Name(id="getattr" | "hasattr" | "replaced_attribute"),
            args=[_, ast.Constant(value=str(name)), *_],
        ) if name.startswith("_"):
            return name
        case ast.Call(
            func=ast.Name(id="get_global_attribute"), args=[ast.Constant(value=name), *_]
        ):
            return name
    return None


def private_names():
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imports = [each for each in nodes if isinstance(each, ast.ImportFrom)]
    inner = [each for each in imports if (each.module or "").startswith("keras.src")]
    names = {private_name(node) for node in nodes} - {None}
    return sorted(names | {alias.name for each in inner for alias in each.names})


class Rename(ast.NodeTransformer):
    """Asks for another name everywhere, one that Keras does not have."""

    def __init__(self, name):
        self.name = name

    def visit(self, node):
        asked = private_name(node) == self.name
        self.generic_visit(node)
        match node:
            case ast.Attribute() if asked:
                node.attr += "_gone"
            case ast.Call() if asked:
                node.args = [self.rename_constant(argument) for argument in node.args]
            case ast.ImportFrom(module=str(module)) if module.startswith("keras.src"):
                for alias in node.names:
                    if alias.name == self.name:
                        alias.name, alias.asname = f"{self.name}_gone", self.name
        return node

    def rename_constant(self, node):
        is_name = isinstance(node, ast.Constant) and node.value == self.name
        return ast.Constant(f"{self.name}_gone") if is_name else node


@pytest.fixture
def without(monkeypatch):
    """Puts copies of the modules in place that know a name of Keras by a wrong one."""

    def replace(name):
        originals = [importlib.import_module(module) for module in MODULES]
        for module in originals:
            monkeypatch.delitem(sys.modules, module.__name__)
            monkeypatch.delattr(_keras, module.__name__.rpartition(".")[2])

        def get_code(loader, module):
            tree = Rename(name).visit(ast.parse(loader.get_source(module)))
            return compile(ast.fix_missing_locations(tree), loader.path, "exec")

        with monkeypatch.context() as patch:
            patch.setattr(SourceFileLoader, "get_code", get_code)
            copies = [importlib.import_module(module) for module in MODULES]
        pairs = {
            id(vars(original)[public]): vars(copy)[public]
            for original, copy in zip(originals, copies, strict=True)
            for public in original.__all__
        }
        for path, module in list(sys.modules.items()):
            if path.startswith("keras_glorot.") and module not in copies:
                for key, value in list(vars(module).items()):
                    if id(value) in pairs:
                        monkeypatch.setattr(module, key, pairs[id(value)])

    return replace


class Late(keras.Model):
    """Its kernel is made when its name scope is closed."""

    def __init__(self):
        super().__init__()
        self.depthwise = keras.layers.DepthwiseConv2D(
            3, depthwise_initializer=keras_glorot.GlorotUniform(seed=1), name="depthwise"
        )

    def call(self, x):
        return self.depthwise(x)


def results():
    """What the package says and does about a model, as text."""
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 64)).astype("float32")
    late = Late()
    late(x)
    entry = keras.Input((5, 8), name="x")
    y = keras.layers.Masking(name="mask")(entry)
    y = keras.layers.SimpleRNN(8, name="recurrent")(y)
    y = keras.layers.Dropout(0.5, name="dropout")(keras.layers.Dense(8, name="dense")(y))
    model = keras.Model(entry, keras.layers.ReLU(name="relu")(y), name="model")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    initializer = keras_glorot.GlorotUniform("auto")
    done = keras_glorot.initialize(model, initializer, seed=1)
    sequences = np.array(x.reshape(2, -1, 8)[:, :5])
    sequences[:, 3:] = 0  # masked
    return [
        float(np.std(keras.ops.convert_to_numpy(late.depthwise.kernel))),
        keras_glorot.layer_fans(late),
        done.rows,
        done.findings,
        keras_glorot.audit(model).rows,
        keras_glorot.propagate(model, sequences, seed=0).rows,
    ]


@pytest.fixture(scope="module")
def expected():
    return results()


def test_results_are_right_with_all_names(expected):
    std, fans = expected[:2]
    assert std == pytest.approx(1 / 3, rel=5 / math.sqrt(2 * 9 * 64))
    assert fans == {"depthwise/kernel": (9, 9)}
    assert {"_layers", "caller", "get_keras_mask", "uninitialized_variables"} <= {
        *private_names()
    }


@pytest.mark.parametrize("name", private_names())
def test_without_a_name_results_are_right_or_warned_about(name, expected, without):
    without(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = results()
    warned = [str(each.message) for each in caught if each.category is UserWarning]
    if repr(found) != repr(expected):
        words = ("fan_in and fan_out from the weight's shape alone", "did not reset")
        assert any(word in message for message in warned for word in words)
