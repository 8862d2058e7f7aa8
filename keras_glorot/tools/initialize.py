"""`initialize`: every weight of a model back to a fresh start, in place."""

import contextlib
import functools
import hashlib
import itertools
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.stream import WEIGHT_DTYPES
from keras_glorot._keras.call_site import seed_words
from keras_glorot._keras.optimizers import optimizer_values, used_learning_rates
from keras_glorot._keras.rebuild import BuildValue, build_values
from keras_glorot._keras.state import unmoved_generators
from keras_glorot._keras.tree import initial_state
from keras_glorot._models.progress import progress
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.initializers import (
    check_alone,
    is_unshared,
    standardize_seed,
    with_config,
)
from keras_glorot.recipes import Start, Starts
from keras_glorot.tables import Finding, Layout, Row, Table
from keras_glorot.tools._how import find_starts

__all__ = ["initialize"]


class _Assignment(NamedTuple):
    """A variable with what makes its new value (None: it is not changed), and its row.

    `built` is what its layer then assigns to it in `build`, if it does; `finding` says that
    it is not changed, unless that was chosen.
    """

    variable: keras.Variable
    new_value: Callable[[], Any] | None
    row: Row
    built: BuildValue | None = None
    finding: Finding | None = None


def initialize(
    model: keras.Layer,
    how: Any = "xavier_uniform",
    seed: int | None = None,
    verbose: Literal["auto"] | bool = "auto",
) -> Table:
    """Gives every weight of a built model or layer a fresh start, in place.

    Kernels, trainable or not, are drawn as `how` says, from our initializers with the fans
    of their layer. All other variables get what their own initializer gives: biases,
    normalization and its statistics, recurrent kernels, embeddings, ... A value
    that a layer assigns in `build` is assigned again, from the new weights. Seed
    generators, metrics, the states of recurrent layers and the state of every optimizer
    among the attributes of the model and of its layers are reset too. The rest stays
    as it is: a finding in the result says why, and a warning points to it. Dtype,
    sharding and device stay.

    A mapping says which weight gets what. Its keys are regular expressions; each weight
    goes by the first that is found in its path. An entry draws the kernels that it matches,
    and all else that it matches gets its own initializer. An entry that matches no kernel,
    such as `"bias$"`, draws all that it matches. `None` leaves weights as they are, and so
    does no entry at all. Optimizers and metrics are reset in any case. A weight gets the
    same values as in a run that draws the whole model like this; but `"isometric"` makes
    pairs only of kernels that it draws both, so beside others its kernels are plain.

    A learning rate goes back to the one that the optimizer had when `initialize` saw it
    before its first step. If it never did, the learning rate stays: a finding says so, and
    a warning if a callback of the last `fit` logs learning rates.

    Each variable has its own seed, made from `seed`, the names of the layers from the model
    down, and its own name. A name of the form that Keras gives a Dense, `dense` or
    `dense_7`, counts as the first, second, ... of its class in its parent; a parent's name
    at the start of a layer's does not count. So no two variables are alike, and two models
    get the same weights on every backend if their layers have the same classes, order and
    chosen names. (Initializers that are neither Keras's nor ours may differ, and so may
    values that a layer draws in `build`.) A layer added or removed changes no weight but
    those of layers of its class that come later in its parent and that you did not name.

    If `fit` must repeat itself bit by bit, also shuffle the data yourself: Keras's
    shuffling, and on PyTorch its dropout without a seed, follow global generators, which
    the first `fit` of a model advances further than later ones.

    Errors are raised before the first variable changes: all arguments are checked and all
    foreign initializers are called first. After that, only an interrupt, a lack of memory,
    or a layer's own `build` that fails the second time can leave a model half done: a copy
    of the old weights would double the memory. An error in an optimizer is a finding.

    Args:
        model: A built layer or model.
        how: For the kernels: whatever `keras.initializers.get` takes.
            `GlorotUniform(gain="auto")` also sees an activation that is the next layer.
            Or a recipe: its name, or a function of your own, as `keras_glorot.recipes`
            describes it. `"isometric"` gives kernels with which a plain network of any
            depth keeps what goes in: orthogonal ones, with units in pairs of opposite
            weights that the next kernel takes with opposite signs. `"pytorch"` draws each
            weight as the module of `torch.nn` that its layer stands for. Or a mapping from
            patterns to these, or to None.
        seed: An integer. Defaults to the first initializer's own seed that there is, else
            to one from Python's `random`, which `keras.utils.set_random_seed` governs. One
            of the three is needed in a program of several processes: each must have the
            same.
        verbose: Whether to show progress. `"auto"`: on a terminal, after a second.

    Returns:
        A `Table` with a row per variable. Its keys: `path`, `layer`, `shape`, `dtype`,
        `fan_in` and `fan_out` (of kernels), `std` (None for constants), and `done`: the
        initializer, or why the variable is not changed. `"isometric"` adds `pairs`: "yes",
        or why a kernel makes none. The codes of its findings: `not-reset` (a variable) and
        `optimizer`.

    Warns:
        UserWarning: If something can't be reset. (Data statistics of a `Normalization`
            layer, and frozen vectors that an `Embedding` may have got as `weights`, are
            left on purpose: a finding, and no warning.)

    Raises:
        ValueError: If the model is not built, an initializer does not fit a weight, a
            pattern matches nothing, or only what patterns before it match, or each of
            several processes would draw other weights.
        TypeError: If an argument is of a wrong type.

    Example:

    >>> table = keras_glorot.initialize(model, seed=0)
    >>> table.rows[0]["done"]
    'GlorotUniform'
    >>> head = {f"{model.layers[-1].name}/": "xavier_normal"}
    >>> initialize(model, head, seed=0).note
    'Reinitialized 2 of 8 variables (seed 0).'

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), eq. 16
    - [Balduzzi et al., 2017](https://arxiv.org/abs/1702.08591), pairs of units;
      [Xiao et al., 2018](https://arxiv.org/abs/1806.05393), orthogonal convolutions
    """
    survey = Survey(model)
    # An initializer without a seed makes one up.
    with contextlib.nullcontext() if seed is None else unmoved_generators():
        starts = find_starts(survey, how)
    root = _root_seed(seed, starts)
    assignments = list(_plan(survey, starts, root))
    _assign_all(assignments, verbose)
    findings = _reset_around(survey)

    findings += [each.finding for each in assignments if each.finding]
    _warn(findings)
    columns = ("std", "shape", "fan_in", "fan_out", "layer", "dtype")
    columns = ("path", "done", *starts.columns, *columns)
    changed = [each for each in assignments if each.new_value]
    count = f"{len(changed)} of {len(assignments)}"
    note = f"Reinitialized {count} variables (seed {root}). {starts.note}".strip()
    rows = [dict.fromkeys(starts.columns) | each.row for each in assignments]
    return Table("initialize", rows, findings, columns, note, Layout("fan_in"))


def _plan(survey: Survey, starts: Starts, root: int) -> Iterator[_Assignment]:
    """Each variable is counted, left or not: the seeds of others depend on it."""
    derive = _seed_deriver(root, survey)
    for weight in survey.weights:
        seed = derive(weight.owner, weight.variable)
        yield _plan_weight(weight, starts.of(weight), seed)
    for layer, generator in survey.seed_generators:
        derived = derive(layer, generator.state) & 0x7FFFFFFF
        # One that was made with a seed starts from it again.
        given = generator.get_config()["seed"]
        seed = derived if given is None else given
        state: Any = generator.state
        value = np.array([seed, 0]).astype(state.dtype)
        yield _plan_state(survey, starts, layer, state, value, f"seed {seed}")
    for layer, variable in survey.untracked_variables:
        value = initial_state(layer, variable)
        yield _plan_state(survey, starts, layer, variable, value, "initial state")


def _reset_around(survey: Survey) -> list[Finding]:
    """Resets optimizers and metrics."""
    unknown_rates = _reset_learning_rates(survey)  # while the optimizers know their steps
    findings = _reset_optimizers(survey) + unknown_rates
    for metric in survey.metrics:
        with backends.writable(metric.variables):
            metric.reset_state()
    return findings


def _warn(findings: list[Finding]) -> None:
    """A Python warning too: a table need not be looked at."""
    serious = [finding for finding in findings if finding.severity == "warning"]
    if serious:
        first = serious[0]
        others = f" ({len(serious) - 1} more in the findings)" if serious[1:] else ""
        message = f"`initialize` did not reset {first.path}: {first.message}{others}"
        warnings.warn(message, stacklevel=3)


def _root_seed(seed: int | None, starts: Starts) -> int:
    chosen = standardize_seed(starts.seed if seed is None else seed)
    if is_unshared(chosen):
        check_alone()
    if isinstance(chosen, keras.random.SeedGenerator):
        return int.from_bytes(np.array(seed_words(chosen), ">u4").tobytes())
    return random.getrandbits(63) if chosen is None else chosen


def _seed_deriver(
    root: int, survey: Survey
) -> Callable[[keras.Layer | None, keras.Variable], int]:
    """Makes one seed for each path; a path that comes again gets another one."""
    counts = Counter()

    def derive(owner: keras.Layer | None, variable: keras.Variable) -> int:
        path = survey.seed_path(owner, variable)
        counts[path] += 1  # several variables of a layer can have one name
        digest = hashlib.sha256(f"{root}:{path} {counts[path]}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    return derive


def _plan_weight(weight: Weight, start: Start, seed: int) -> _Assignment:
    """The assignment of a weight; raises whatever there is to raise."""
    row = _empty_row(weight.path, weight.owner, weight.variable)
    row |= {"done": start.name, **start.columns}
    if weight.is_kernel and weight.fans is not None:
        row["fan_in"], row["fan_out"] = weight.fans
    if start.is_left:
        return _left(weight.variable, start, row)
    built = None
    if isinstance(start.initializer, BuildValue):
        # First as declared: the layer can assign a value that depends on it, or on others.
        built = start.initializer
        start = Start.of(weight, built.declared)
    elif start.distribution is not None:
        row["std"] = start.distribution.std or None
    new_value = _value_factory(start, weight.variable, seed)
    return _Assignment(weight.variable, new_value, row, built)


def _left(variable: keras.Variable, start: Start, row: Row) -> _Assignment:
    row |= {"done": start.name}
    finding = start.severity and Finding(
        start.severity,
        "not-reset",
        row["path"],
        f"{start.name}.",
        "Reset it manually if needed.",
    )
    return _Assignment(variable, None, row, finding=finding)


def _empty_row(path: str, owner: keras.Layer | None, variable: keras.Variable) -> Row:
    return {
        "path": path,
        "layer": None if owner is None else type(owner).__name__,
        "shape": tuple(variable.shape),
        "dtype": variable.dtype,
        **dict.fromkeys(("fan_in", "fan_out", "std")),
    }


def _value_factory(start: Start, variable: keras.Variable, seed: int) -> Callable[[], Any]:
    """A function that makes the variable's new value, later."""
    shape, dtype = tuple(variable.shape), variable.dtype
    distribution, initializer = start.distribution, start.initializer
    if distribution is not None and (
        initializer is None or distribution.form == "constant" or dtype in WEIGHT_DTYPES
    ):
        _check_range(distribution, initializer or start.name, variable)
        return functools.partial(_draw, distribution, variable, seed)
    if "seed" in getattr(initializer, "get_config", dict)():
        initializer = with_config(initializer, seed=seed & 0x7FFFFFFF)
    # It can fail, so it is called now, before any variable is touched.
    value: Any = keras.ops.convert_to_tensor(initializer(shape, dtype=dtype), dtype)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"The initializer of {variable.path} must return a tensor of shape {shape}. "
            f"Received: {initializer} returned one of shape {tuple(value.shape)}"
        )
    if keras.backend.is_float_dtype(dtype) and keras.ops.any(keras.ops.isnan(value)):
        raise ValueError(
            f"The initializer of {variable.path} must return numbers. "
            f"Received: {initializer} returned nan"
        )
    backends.check_same(variable, value)
    return lambda: value


def _draw(distribution: Distribution, variable: keras.Variable, seed: int) -> Any:
    draw_region = distribution.region_drawer(tuple(variable.shape), variable.dtype, (seed,))
    return backends.new_value(variable, draw_region)


def _check_range(
    distribution: Distribution, initializer: Any, variable: keras.Variable
) -> None:
    if fault := distribution.range_fault(variable.dtype):
        raise ValueError(
            f"Argument `how` must give values that are {fault}. "
            f"Received: how={initializer} for {variable.path}"
        )


def _plan_state(
    survey: Survey,
    starts: Starts,
    layer: keras.Layer,
    variable: keras.Variable,
    value: Any,
    name: str,
) -> _Assignment:
    """The assignment of what is no weight; without a value nothing is known of it."""
    row = _empty_row(survey.path(layer, variable), layer, variable)
    start = starts.by_id.get(id(variable))
    if start is None and value is None:
        start = Start.left("Keras does not list it among the layer's variables")
        start = start._replace(severity="warning")
    if start is not None:
        return _left(variable, start, row)
    return _Assignment(variable, lambda: value, row | {"done": name})


def _assign_all(assignments: list[_Assignment], verbose: Literal["auto"] | bool) -> None:
    sizes = [math.prod(assignment.variable.shape) for assignment in assignments]
    done = itertools.accumulate(sizes)
    with progress("initialize", verbose) as advance:
        for assignment, size in zip(assignments, done, strict=True):
            advance(size / max(1, sum(sizes)), assignment.row["path"])
            if assignment.new_value is not None:
                backends.assign(assignment.variable, assignment.new_value())
    # All of them are computed before one is assigned: they can depend on each other.
    built = [assignment.built for assignment in assignments if assignment.built]
    values = build_values(built)
    for source, value in zip(built, values, strict=True):
        backends.assign(source.variable, value)


def _reset_learning_rates(survey: Survey) -> list[Finding]:
    """To those before the first step. Keras's callbacks that set one log it."""
    log = getattr(getattr(survey.root, "history", None), "history", {})
    severity = "warning" if any("learning_rate" in name for name in log) else "info"
    findings = []
    for optimizer, rate, first in used_learning_rates(survey.optimizers):
        if first is not None:
            backends.assign(rate, first)
            continue
        present = float(backends.held_value(rate))
        message = f"Its learning rate stays {present:.3g}: the first one is not known."
        advice = "Set it if training has changed it."
        findings.append(Finding(severity, "optimizer", optimizer.name, message, advice))
    return findings


def _reset_optimizers(survey: Survey) -> list[Finding]:
    findings = []
    for optimizer in survey.optimizers:
        try:
            values = optimizer_values(optimizer)
            for variable, new_value in values:
                backends.assign(variable, new_value())
        except Exception as error:  # from an optimizer of the user: anything
            message = f"Its state is not changed: {error}."
            advice = "Compile the model again."
            findings.append(
                Finding("warning", "optimizer", optimizer.name, message, advice)
            )
    return findings
