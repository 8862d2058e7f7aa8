"""The argument `how`: an initializer, a recipe, or a mapping from patterns to these."""

import inspect
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Set
from typing import Any

import keras

from keras_glorot import _backends as backends
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.arguments import suggestion
from keras_glorot.initializers import find_initializer
from keras_glorot.recipes import RECIPES, Recipe, Start, Starts
from keras_glorot.tools._fitting import measure

__all__ = ["find_starts"]


def find_starts(survey: Survey, how: Any) -> Starts:
    """How each weight is drawn. All that can be said against `how` is said here."""
    # Keras's own dictionary for an initializer has this key.
    if isinstance(how, Mapping) and "class_name" not in how:
        return _by_patterns(survey, how)
    if recipe := _find_recipe(how):
        return _call(recipe, survey)
    kernels = [weight for weight in survey.weights if weight.is_kernel]
    return _starts_of(kernels, how, "how")


def _by_patterns(survey: Survey, how: Mapping[Any, Any]) -> Starts:
    """Each variable by the first pattern that is found in its path."""
    if not how:
        raise ValueError("Argument `how` must have a pattern. Received: how={}")
    by_id, recipes, parts = {}, defaultdict(set), []
    paths = _paths(survey)
    remaining = set(paths)
    for pattern, value in how.items():
        matched = _matched(pattern, paths)
        mine = matched & remaining
        remaining -= mine
        if not mine:
            raise ValueError(_explain_unmatched(pattern, matched, paths.values()))
        if value is None:
            by_id |= dict.fromkeys(mine, Start.left("its pattern has None"))
        elif recipe := _find_recipe(value):
            recipes[recipe] |= mine
        else:
            drawn = _drawn(survey, matched)
            parts.append(_starts_of(drawn, value, f"how[{pattern!r}]"))
            by_id |= _chosen(parts[-1], mine)
    by_id |= dict.fromkeys(remaining, Start.left("no pattern matches it"))
    for recipe, mine in recipes.items():
        parts.append(_call(recipe, survey.for_recipe(_elsewhere(survey, by_id, mine))))
        by_id |= _chosen(parts[-1], mine)
    columns = dict.fromkeys(key for part in parts for key in part.columns)
    seeds = [part.seed for part in parts if part.seed is not None]
    return Starts(by_id, tuple(columns), seed=seeds[0] if seeds else None)


def _chosen(part: Starts, keys: Set[int]) -> dict[int, Start]:
    return {key: part.by_id[key] for key in keys & part.by_id.keys()}


def _elsewhere(
    survey: Survey, by_id: dict[int, Start], drawn: set[int]
) -> dict[int, Distribution | None]:
    """Of each weight that a recipe does not draw, by `id`, from what it is drawn."""
    found = {}
    for weight in survey.weights:
        key = id(weight.variable)
        if key not in drawn:
            start = by_id.get(key) or Start.own(weight)
            found[key] = _kept(weight) if start.is_left else start.distribution
    return found


def _kept(weight: Weight) -> Distribution | None:
    """As if a bias were drawn once more."""
    if len(weight.shape) != 1:
        return None
    return Distribution.from_std(
        "normal", measure(backends.values(weight.variable), 0.0).std
    )


def _paths(survey: Survey) -> dict[int, str]:
    """Of everything that `initialize` has a row for, by `id`."""
    others = [(layer, generator.state) for layer, generator in survey.seed_generators]
    others += survey.untracked_variables
    paths = {id(weight.variable): weight.path for weight in survey.weights}
    return paths | {id(each): survey.path(layer, each) for layer, each in others}


def _matched(pattern: Any, paths: dict[int, str]) -> set[int]:
    try:
        return {key for key, path in paths.items() if re.search(pattern, path)}
    except (re.error, TypeError) as error:
        raise ValueError(
            "Argument `how` must have regular expressions as its keys. "
            f"Received: {pattern!r} ({error})"
        ) from None


def _explain_unmatched(
    pattern: str | re.Pattern[str], matched: Set[int], paths: Collection[str]
) -> str:
    text = f"Argument `how` must match something with each of its patterns, but {pattern!r}"
    if matched:
        return f"{text} matches only what patterns before it do: put it before them."
    source = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    names = {name: None for path in paths for name in path.split("/")}
    unknown = [
        word
        for word in re.findall(r"\w+", source)
        if not any(word in name for name in names)
    ]
    hints = "".join(suggestion(word, names) for word in unknown)
    first = next(iter(paths), "")
    return f"{text} is found in no path, such as {first!r}.{hints}"


def _drawn(survey: Survey, matched: Set[int]) -> list[Weight]:
    """The kernels among them; all of them, if there is no kernel."""
    weights = [weight for weight in survey.weights if id(weight.variable) in matched]
    kernels = [weight for weight in weights if weight.is_kernel]
    return kernels or [weight for weight in weights if _can_be_drawn(weight)]


def _can_be_drawn(weight: Weight) -> bool:
    """Any floats but those of a quantized layer, which belong to its integers."""
    is_quantized = weight.owner is not None and weight.owner.quantization_mode is not None
    return keras.backend.is_float_dtype(weight.variable.dtype) and not is_quantized


def _starts_of(weights: list[Weight], value: Any, place: str) -> Starts:
    initializer = _find_initializer(value, place)
    by_id = {id(each.variable): Start.of(each, initializer) for each in weights}
    return Starts(by_id, seed=_own_seed(initializer))


def _call(recipe: Recipe, survey: Survey) -> Starts:
    starts = recipe(survey)
    if not isinstance(starts, Starts):
        raise TypeError(
            "A recipe must return `keras_glorot.recipes.Starts`, and an initializer must "
            "take the arguments `shape` and `dtype`. "
            f"Received: {starts!r} of {recipe}"
        )
    return starts


def _find_recipe(value: Any) -> Any:
    """That of a name, or a function of the user; None if it is not one."""
    if isinstance(value, str):
        return RECIPES.get(value)
    is_object = isinstance(value, keras.initializers.Initializer | type)
    if is_object or not callable(value):
        return None
    try:
        inspect.signature(value).bind((), dtype=None)
    except TypeError:
        return value  # an initializer could be called like this
    except ValueError:
        return None  # built in: it has no signature
    return None


def _find_initializer(value: Any, place: str) -> Any:
    try:
        found = find_initializer(value)
    except (ValueError, TypeError) as error:
        raise ValueError(_explain_unknown(value, place)) from error
    if not callable(found):
        raise TypeError(_explain_unknown(value, place))
    return found


def _explain_unknown(value: Any, place: str) -> str:
    names = ", ".join(map(repr, RECIPES))
    known = [*RECIPES, *dir(keras.initializers)]
    hint = suggestion(value, known) if isinstance(value, str) else ""
    return (
        "Argument `how` must be an initializer or the name of one, such as "
        f"'xavier_uniform', a recipe: {names}, or a mapping from patterns to these. "
        f"Received: {place}={value!r}.{hint}"
    )


def _own_seed(initializer: Any) -> Any:
    # The config has what the user gave; a generator stands in it serialized.
    config = getattr(initializer, "get_config", dict)()
    return None if config.get("seed") is None else initializer.seed
