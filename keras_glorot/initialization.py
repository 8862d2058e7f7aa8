"""`initialize`: every weight of a model back to a fresh start, in place."""

import contextlib
import functools
import hashlib
import math
import numbers
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress

from keras_glorot import backends, keras_bridge
from keras_glorot.distributions import Distribution, keras_distribution
from keras_glorot.gains import activation_gain
from keras_glorot.initializers import WEIGHT_DTYPES
from keras_glorot.tables import Finding, Row, Table
from keras_glorot.variables import Weight, describe, distribution_of

__all__ = ["initialize", "select_layers"]


class _Assignment(NamedTuple):
    """A variable with what makes its new value (None: it is not changed), and its row."""

    variable: keras.Variable
    new_value: Callable[[], Any] | None
    row: Row


def initialize(
    model: keras.Layer,
    initializer: Any = "xavier_uniform",
    seed: int | None = None,
    verbose: Literal["auto"] | bool = "auto",
    *,
    layers: Sequence[keras.Layer | str] | None = None,
) -> Table:
    """Puts every weight of a built model or layer back to a fresh start, in place.

    Kernels, trainable or not, are drawn from `initializer` with the fans of their layer.
    All other variables get what their own initializer gives: biases, normalization and its
    statistics, recurrent kernels, embeddings, ... Seed generators, metrics and the state of
    the optimizer are reset too; its learning rate is not. What can't be reset is left as
    it is, and a finding in the result says why. Dtype, sharding and device stay.

    Each variable has its own seed, made from `seed` and its path, in which a name that
    Keras made up (`dense_7`) counts as the first, second, ... of its kind in its parent. So
    no two variables are alike, and the same model gets the same weights however often it
    was built, in another process, and on another backend, except where an initializer is
    neither Keras's nor ours. A layer added or removed changes no weight of a layer that you
    named, nor of one with an automatic name unless it comes later in the same parent and is
    of the same class.

    For `fit` to repeat itself bit by bit, also shuffle the data yourself:
    Keras's shuffling, and on PyTorch its dropout without a seed, follow global generators,
    which the first `fit` of a model advances further than later ones.

    Errors are raised before the first variable is touched: by then all settings are checked
    and all foreign initializers called; what remains is NumPy drawing into memory. A copy
    of the old weights would double the memory instead. So only an interrupt, or running out
    of memory, can leave a model half done.

    Args:
        model: A built layer or model.
        initializer: For the kernels: whatever `keras.initializers.get` takes.
            `GlorotUniform(gain="auto")` also sees an activation that is the next layer.
        seed: An integer. Defaults to the initializer's own seed if it has one, else to one
            from Python's `random`, which `keras.utils.set_random_seed` governs.
        verbose: Whether to show progress. `"auto"`: on a terminal, after a second.
        layers: Layers of the model, or their names, to which to limit the work. They get
            the same weights as in a whole run; optimizer and metrics are reset whole.

    Returns:
        A `Table` with a row per variable. Its keys: `path`, `layer`, `shape`, `dtype`,
        `fan_in` and `fan_out` (of kernels), `std` (None for constants), and `done`: the
        initializer, or why the variable is not changed.

    Raises:
        ValueError: If the model is not built, or an initializer does not fit a weight.
        TypeError: If an argument is of a wrong type.

    Example:

    >>> table = keras_glorot.initialize(model, seed=0)
    >>> table.rows[0]["done"]
    'GlorotUniform'
    """
    weights = describe(model)
    kernel_initializer = keras.initializers.get(initializer)
    if not callable(kernel_initializer):
        raise TypeError(
            "Argument `initializer` must be an initializer or the name of one, such as "
            f"'xavier_uniform'. Received: initializer={initializer}"
        )
    root = _root_seed(seed, kernel_initializer)
    all_layers = keras_bridge.sublayers(model)
    selected = all_layers if layers is None else select_layers(all_layers, layers)
    selected_ids = {id(layer) for layer in selected}
    derive = _seed_deriver(root, _canonical_paths(model, all_layers))

    assignments = []
    for weight in weights:
        derived = derive(weight.variable.path)
        if layers is None or id(weight.owner) in selected_ids:
            assignments.append(_plan_weight(weight, kernel_initializer, derived))
    layer_paths = keras_bridge.sublayer_paths(model)
    for layer in all_layers:
        for generator in keras_bridge.seed_generators(layer):
            # A layer without weights has no path.
            derived = derive(layer.path or layer.name)
            if id(layer) in selected_ids:
                path = f"{layer_paths[id(layer)]}/{generator.state.name}"
                assignments.append(_plan_generator(layer, generator, path, derived))
    resets, findings = _plan_optimizer(model)

    for assignment in _with_progress([*assignments, *resets], verbose):
        if assignment.new_value is not None:
            backends.assign(assignment.variable, assignment.new_value())
    if isinstance(model, keras.Model):
        model.reset_metrics()

    skipped = [assignment.row for assignment in assignments if not assignment.new_value]
    advice = "Reset it manually if needed."
    findings += [
        Finding("info", "not-reset", row["path"], f"{row['done']}.", advice)
        for row in skipped
    ]
    columns = ("path", "done", "std", "shape", "fan_in", "fan_out", "layer", "dtype")
    count = f"{len(assignments) - len(skipped)} of {len(assignments)}"
    note = f"Reinitialized {count} variables (seed {root})."
    rows = [assignment.row for assignment in assignments]
    return Table("initialize", rows, findings, columns, note)


def _root_seed(seed: int | None, initializer: Any) -> int:
    if seed is None:
        config = getattr(initializer, "get_config", dict)()
        # The config has what the user gave; a generator stands in it serialized.
        if config.get("seed") is not None:
            seed = initializer.seed
    if isinstance(seed, keras.random.SeedGenerator):
        seed = int.from_bytes(np.array(keras_bridge.seed_words(seed), ">u4").tobytes())
    if seed is None:
        seed = random.getrandbits(63)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(
            f"Argument `seed` must be an integer or None. Received: seed={seed} "
            f"(of type {type(seed)})"
        )
    return int(seed)


def select_layers(all_layers: list[keras.Layer], layers: Any) -> list[keras.Layer]:
    """The layers that `layers` stands for, with all that is in them."""
    selected = []
    for layer in [layers] if isinstance(layers, str | keras.Layer) else layers:
        matches = [
            member for member in all_layers if member is layer or member.name == layer
        ]
        if not matches:
            raise ValueError(
                "Argument `layers` must list layers of the model, or their names. "
                f"Received: layers={layers}, of which {layer} is not in the model."
            )
        for match in matches:
            selected += keras_bridge.sublayers(match)
    return selected


def _seed_deriver(root: int, canonical: Callable[[str], str]) -> Callable[[str], int]:
    """Makes one seed for each path; a path that comes again gets another one."""
    counts = Counter()

    def derive(path: str) -> int:
        path = canonical(path)
        counts[path] += 1  # nested models can give one path to several variables
        digest = hashlib.sha256(f"{root}:{path} {counts[path]}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    return derive


def _canonical_paths(
    model: keras.Layer, all_layers: list[keras.Layer]
) -> Callable[[str], str]:
    """Replaces `dense_7` by `dense#1`, if it is the first Dense that its parent shows."""
    kinds = {}
    for layer in all_layers:
        kind = re.sub(r"_\d+$", "", layer.name)
        # `Bidirectional` puts its own word in front of the automatic name.
        plain = re.sub("^(forward|backward)_", "", kind).replace("_", "")
        if plain == type(layer).__name__.lower():
            kinds[layer.path or layer.name] = kind
    # The model's own name is in the paths or not, depending on how it was built.
    known, seen = {"": "", model.path: ""}, Counter()

    def canonical(path: str) -> str:
        if path not in known:
            parent, _, name = path.rpartition("/")
            head = canonical(parent)
            if path in kinds:
                seen[head, kinds[path]] += 1
                name = f"{kinds[path]}#{seen[head, kinds[path]]}"
            known[path] = f"{head}/{name}"
        return known[path]

    return canonical


def _plan_weight(weight: Weight, kernel_initializer: Any, seed: int) -> _Assignment:
    """What is to be done with a weight; raises whatever there is to raise."""
    row: Row = {
        "path": weight.path,
        "layer": None if weight.owner is None else type(weight.owner).__name__,
        "shape": weight.shape,
        "dtype": weight.variable.dtype,
        **dict.fromkeys(("fan_in", "fan_out", "std")),
    }
    if weight.reason:
        row["done"] = f"not changed: {weight.reason}"
        return _Assignment(weight.variable, None, row)
    initializer = weight.initializer
    if weight.is_kernel and weight.fans is not None:
        initializer = kernel_initializer
        row["fan_in"], row["fan_out"] = weight.fans
    if getattr(initializer, "gain", None) == "auto":
        gain = activation_gain(weight.activation)
        initializer = _with_config(initializer, gain=gain)
    distribution = distribution_of(initializer, weight.shape, weight.fans, weight.site)
    if distribution is not None:
        row["std"] = distribution.std or None
    row["done"] = _describe_initializer(initializer)
    new_value = _value_factory(initializer, distribution, weight.variable, seed)
    return _Assignment(weight.variable, new_value, row)


def _describe_initializer(initializer: Any) -> str:
    name = getattr(initializer, "__name__", type(initializer).__name__)
    gain = getattr(initializer, "gain", 1.0)
    return f"{name}(gain={gain:.4g})" if isinstance(gain, float) and gain != 1 else name


def _with_config(initializer: Any, **changes: Any) -> Any:
    return type(initializer).from_config({**initializer.get_config(), **changes})


def _value_factory(
    initializer: Any,
    distribution: Distribution | None,
    variable: keras.Variable,
    seed: int,
) -> Callable[[], Any]:
    """What makes the variable's new value, later."""
    shape, dtype = tuple(variable.shape), variable.dtype
    if distribution is not None and (
        distribution.form == "constant" or dtype in WEIGHT_DTYPES
    ):
        if distribution.std and WEIGHT_DTYPES[dtype] < distribution.bound < math.inf:
            raise ValueError(
                "Argument `initializer` must have a smaller gain for weights of "
                f"{dtype}. Received: initializer={initializer} for {variable.path}"
            )
        return functools.partial(distribution.draw, shape, dtype, (seed,))
    if "seed" in getattr(initializer, "get_config", dict)():
        initializer = _with_config(initializer, seed=seed & 0x7FFFFFFF)
    # It can fail, so it is called now, before any variable is touched.
    value = initializer(shape, dtype=dtype)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"The initializer of {variable.path} must return a tensor of shape {shape}. "
            f"Received: {initializer} returned one of shape {tuple(value.shape)}"
        )
    return lambda: value


def _plan_generator(
    layer: keras.Layer, generator: keras.random.SeedGenerator, path: str, derived: int
) -> _Assignment:
    """A generator that was made with a seed starts from it again, others from `derived`."""
    state: Any = generator.state
    seed = generator.get_config()["seed"]
    if seed is None:
        seed = derived & 0x7FFFFFFF
    start = np.array([seed, 0]).astype(state.dtype)
    row: Row = {
        "path": path,
        "layer": type(layer).__name__,
        "shape": (2,),
        "dtype": state.dtype,
        **dict.fromkeys(("fan_in", "fan_out", "std")),
        "done": f"seed {seed}",
    }
    return _Assignment(state, lambda: start, row)


def _plan_optimizer(model: keras.Layer) -> tuple[list[_Assignment], list[Finding]]:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return [], []
    try:
        sources = keras_bridge.rebuild_sources(optimizer)
    except Exception as error:  # from an optimizer of the user: anything
        message = f"Its state is not changed: {error}."
        advice = "Compile the model again."
        return [], [Finding("warning", "optimizer", optimizer.name, message, advice)]
    assignments = []
    for variable, source in sources:
        if variable.name == "learning_rate":
            continue
        new_value = functools.partial(lambda value: value, source)
        if callable(source):
            distribution = keras_distribution(source, tuple(variable.shape), None)
            new_value = _value_factory(source, distribution, variable, 0)
        assignments.append(_Assignment(variable, new_value, {}))
    return assignments, []


def _with_progress(
    assignments: list[_Assignment], verbose: Literal["auto"] | bool
) -> Iterator[_Assignment]:
    """The assignments one by one, with a bar once they have taken a second."""
    sizes = [math.prod(assignment.variable.shape) for assignment in assignments]
    bar = Progress(transient=True)
    task = bar.add_task("initialize", total=sum(sizes))
    wait = 1.0 if verbose == "auto" else 0.0
    shown = Console().is_terminal if verbose == "auto" else verbose
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        for assignment, size in zip(assignments, sizes, strict=True):
            if shown and time.monotonic() - begin >= wait and not bar.live.is_started:
                stack.enter_context(bar)
            yield assignment
            bar.advance(task, size)
