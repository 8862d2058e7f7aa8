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
from keras_glorot.declared import activation_after, initializer_of, law_of, sample
from keras_glorot.fans import variable_fans
from keras_glorot.gains import activation_gain
from keras_glorot.initializers import WEIGHT_DTYPES
from keras_glorot.keras_bridge import Target
from keras_glorot.tables import Finding, Table

__all__ = ["initialize"]


class _Step(NamedTuple):
    """A variable with what makes its value (None: it stays as it is), and its row."""

    variable: keras.Variable
    make: Callable[[], Any] | None
    row: dict[str, Any]


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
        A `Table` with a row per variable: what was done.

    Raises:
        ValueError: If the model is not built, or an initializer does not fit a weight.
        TypeError: If an argument is of a wrong type.

    Example:

    >>> table = keras_glorot.initialize(model, seed=0)
    """
    weights = variable_fans(model, "model")
    chosen = keras.initializers.get(initializer)
    if not callable(chosen):
        raise TypeError(
            "Argument `initializer` must be an initializer or the name of one, such as "
            f"'xavier_uniform'. Received: initializer={initializer}"
        )
    root = _root_seed(seed, chosen)
    members = keras_bridge.sublayers(model)
    part = members if layers is None else _part(members, layers)
    ids, wanted = {id(layer) for layer in members}, {id(layer) for layer in part}
    canonical, seen, steps = _canonical_paths(model, members), Counter(), []

    def derive(path: str) -> int:
        path = canonical(path)
        seen[path] += 1  # nested models can give one path to several variables
        digest = hashlib.sha256(f"{root}:{path} {seen[path]}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    for owner, variable, fans in weights:
        derived = derive(variable.path)
        if layers is None or id(owner) in wanted:
            steps.append(_step(owner, variable, fans, chosen, derived, ids))
    for layer in members:
        for generator in keras_bridge.seed_generators(layer):
            # A layer without weights has no path.
            derived = derive(layer.path or layer.name)
            if id(layer) in wanted:
                steps.append(_generator_step(layer, generator, derived))
    resets, findings = _optimizer_steps(model)
    for step in _with_progress([*steps, *resets], verbose):
        if step.make is not None:
            backends.assign(step.variable, step.make())
    if isinstance(model, keras.Model):
        model.reset_metrics()
    left = [step.row for step in steps if step.make is None]
    advice = "Reset it yourself if it should be fresh."
    findings += [Finding("info", row["path"], f"{row['done']}.", advice) for row in left]
    columns = ("path", "done", "std", "shape", "fan_in", "fan_out", "layer", "dtype")
    note = f"{len(steps) - len(left)} of {len(steps)} variables are fresh (seed {root})."
    return Table("initialize", [step.row for step in steps], findings, columns, note)


def _root_seed(seed: int | None, initializer: Any) -> int:
    if seed is None:
        seed = getattr(initializer, "_init_seed", None)  # Keras's name too
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


def _part(members: list[keras.Layer], layers: Any) -> list[keras.Layer]:
    """The layers that `layers` stands for, with all that is in them."""
    part = []
    for layer in [layers] if isinstance(layers, str | keras.Layer) else layers:
        found = [one for one in members if one is layer or one.name == layer]
        if not found:
            raise ValueError(
                "Argument `layers` must list layers of the model, or their names. "
                f"Received: layers={layers}, of which {layer} is not in the model."
            )
        part += [inner for one in found for inner in keras_bridge.sublayers(one)]
    return part


def _canonical_paths(model: keras.Layer, members) -> Callable[[str], str]:
    """Replaces `dense_7` by `dense#1`, if it is the first Dense that its parent shows."""
    kinds = {}
    for layer in members:
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


def _step(owner, variable, fans, chosen, seed: int, members: set[int]) -> _Step:
    """What is to be done with a weight; raises whatever there is to raise."""
    row = {
        "path": variable.path,
        "layer": None if owner is None else type(owner).__name__,
        "shape": tuple(variable.shape),
        "dtype": variable.dtype,
        **dict.fromkeys(("fan_in", "fan_out", "std")),
    }
    initializer: Any
    try:
        initializer, kernel = initializer_of(owner, variable, fans)
    except LookupError as error:
        return _Step(variable, None, {**row, "done": f"left as it is: {error}"})
    if kernel:
        initializer = chosen
        row["fan_in"], row["fan_out"] = fans
    if getattr(initializer, "gain", None) == "auto":
        gain = activation_gain(activation_after(owner, variable, members))
        initializer = type(initializer).from_config(
            {**initializer.get_config(), "gain": gain}
        )
    make, row["std"] = _maker(initializer, variable, fans, seed, Target(owner, variable))
    gain = getattr(initializer, "gain", 1.0)
    row["done"] = getattr(initializer, "__name__", type(initializer).__name__)
    row["done"] += f"(gain={gain:.4g})" if isinstance(gain, float) and gain != 1 else ""
    return _Step(variable, make, row)


def _maker(
    initializer, variable, fans, seed: int, target: Target
) -> tuple[Callable[[], Any], float | None]:
    """What makes the variable's value, and the std of its distribution if it has one."""
    shape, dtype = tuple(variable.shape), variable.dtype
    law = law_of(initializer, shape, fans, target)
    if law is not None and (law.form == "constant" or dtype in WEIGHT_DTYPES):
        if law.std and WEIGHT_DTYPES[dtype] < law.bound < math.inf:
            raise ValueError(
                "Argument `initializer` must have a smaller gain for weights of "
                f"{dtype}. Received: initializer={initializer} for {variable.path}"
            )
        return functools.partial(sample, law, shape, dtype, seed), law.std or None
    if "seed" in (config := getattr(initializer, "get_config", dict)()):
        initializer = type(initializer).from_config({**config, "seed": seed & 0x7FFFFFFF})
    # It can fail, so it is called now, before any variable is touched.
    value = initializer(shape, dtype=dtype)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"The initializer of {variable.path} must return a tensor of shape {shape}. "
            f"Received: {initializer} returned one of shape {tuple(value.shape)}"
        )
    return lambda: value, None


def _generator_step(layer, generator, derived: int) -> _Step:
    """A generator that was made with a seed starts from it again, others from `derived`."""
    state, seed = generator.state, generator.get_config()["seed"]
    seed = derived & 0x7FFFFFFF if seed is None else seed
    start = np.array([seed, 0]).astype(state.dtype)
    row = {
        "path": f"{layer.path or layer.name}/{state.name}",
        "layer": type(layer).__name__,
        "shape": (2,),
        "dtype": state.dtype,
        **dict.fromkeys(("fan_in", "fan_out", "std")),
        "done": f"seed {seed}",
    }
    return _Step(state, lambda: start, row)


def _optimizer_steps(model: keras.Layer) -> tuple[list[_Step], list[Finding]]:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return [], []
    try:
        pairs = keras_bridge.blueprint(optimizer)
    except Exception as error:  # from an optimizer of the user: anything
        message = f"Its state was left as it is: {error}."
        return [], [Finding("warning", optimizer.name, message, "Compile the model anew.")]
    steps = []
    for variable, made in pairs:
        if variable.name != "learning_rate":
            make = functools.partial(lambda value: value, made)
            if callable(made):
                make, _ = _maker(made, variable, None, 0, Target())
            steps.append(_Step(variable, make, {}))
    return steps, []


def _with_progress(steps: list[_Step], verbose: Any) -> Iterator[_Step]:
    """The steps one by one, with a bar once they have taken a second."""
    sizes = [math.prod(step.variable.shape) for step in steps]
    bar = Progress(transient=True)
    task = bar.add_task("initialize", total=sum(sizes))
    wait = 1.0 if verbose == "auto" else 0.0
    shown = Console().is_terminal if verbose == "auto" else verbose
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        for step, size in zip(steps, sizes, strict=True):
            if shown and time.monotonic() - begin >= wait and not bar.live.is_started:
                stack.enter_context(bar)
            yield step
            bar.advance(task, size)
