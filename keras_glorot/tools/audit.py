"""`audit`: compares the fresh weights of a model with their declared initializers."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_glorot import _backends as backends
from keras_glorot._backends.values import Values
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._keras.state import unmoved_generators
from keras_glorot._models.survey import Survey, Weight
from keras_glorot.gains import known_gain
from keras_glorot.layer_rules import CONVOLUTIONS, kernel_matrices, window_rank
from keras_glorot.recipes import Start
from keras_glorot.recipes.isometric import isometric
from keras_glorot.tables import Finding, Layout, Row, Table
from keras_glorot.tables.plots import RATIOS
from keras_glorot.tools._checks import (
    CHECKS,
    ON_THE_DECLARATION,
    Subject,
    deviates_from_declaration,
    glorot_stds,
    verdicts,
)
from keras_glorot.tools._fitting import Fitting, collision, is_little_larger
from keras_glorot.tools._how import find_starts
from keras_glorot.tools._isometry import find_fault, find_start, is_marked
from keras_glorot.tools._slices import Slices, can_be_chance, find_repeats

__all__ = ["CODES", "audit", "audited"]

# The codes of all findings.
CODES = (*CHECKS, "trained")


def audit(model: keras.Layer, how: Any = None) -> Table:
    """Compares each fresh weight of a built model with what it was declared to be.

    For each variable: the std that its initializer should give, with the fans that its
    layer really has, and the std, mean and range that it has. It needs no data and changes
    nothing. Findings have three severities: "error" (values that no training can start
    from: not finite, constant kernels, all units alike, negative variances), "warning" (not
    the declared distribution or constant, twins, zero or repeated slices, or Glorot where
    it does not belong) and "info" (Glorot with gain 1 before a ReLU-like activation, an
    activation that has no known gain).

    A kernel is also right if it is what `initialize` draws: Glorot, uniform, normal or
    orthogonal, with gain 1 or that of the activation, or as the recipe `"isometric"` has
    it. Std and mean are called wrong if they are off by more than 5 % and by more than six
    standard errors. In a small tensor, six standard errors can be much more than 5 %. An
    orthogonal matrix leaves nothing to chance: from 64 rows and columns on, one wrong row
    is found. Weights from an initializer that is neither Keras's nor ours can't be
    compared.

    With `how`, each weight is compared with what `initialize(model, how)` draws, and with
    nothing else; the choice is yours, and not judged. Weights that `how` leaves
    may be trained, and are checked as such.

    A trained model is not fresh. If an optimizer has made steps, or if most kernels and
    most constants no longer match what was declared, one finding says so. The others then
    report only what is wrong in a trained model too. With `how`, only an optimizer tells.

    Where weights span several processes, each must call it: it reads its own part of them,
    and all get the same result.

    Args:
        model: A built layer or model.
        how: An initializer, a recipe, or a mapping from patterns to these, as `initialize`
            takes them. Defaults to what the layers declare.

    Returns:
        A `Table` with a row per variable. Print it, or use its `.rows` and `.findings`.
        The keys of a row: `path`, `layer`, `shape`, `dtype`, `initializer`, `fan_in`,
        `fan_out`, `expected_std`, `std`, `ratio` (of these two) and `mean`; None where it
        can't be known.

    Raises:
        ValueError: If the model is not built, or `how` does not fit it.
        TypeError: If it is not a Keras layer or model.

    Example:

    >>> layer = keras.layers.DepthwiseConv2D(3, name="depthwise")  # stock Keras
    >>> layer.build((None, 32, 32, 512))
    >>> [(finding.code, finding.path) for finding in audit(layer).findings]
    [('std', 'depthwise/kernel')]
    >>> table = initialize(layer, "he_normal", seed=0)
    >>> audit(layer, "he_normal").findings
    []

    Reference:

    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html), eq. 12 and
      16, for the std of Glorot's kernels
    """
    return audited(Survey(model), how)


def audited(survey: Survey, how: Any = None) -> Table:
    """As `audit`, of a model that has been looked at."""
    if how is None:
        starts = functools.cache(lambda: isometric(survey).by_id)
        subjects = [_measure_declared(weight, starts) for weight in survey.weights]
        trained = _find_trained(survey, subjects)
    else:
        with unmoved_generators():
            chosen = find_starts(survey, how)
        subjects = [_measure(weight, chosen.of(weight)) for weight in survey.weights]
        trained = _find_steps(survey)
    passed_over = set() if how is None else ON_THE_DECLARATION
    findings = [
        each
        for subject in _with_twins(subjects)
        for each in verdicts(subject, passed_over)
        if not (trained or subject.is_left) or _is_wrong_if_trained(subject, each.code)
    ]
    if trained is not None:
        findings.insert(0, trained)
    columns = (
        "path",
        "expected_std",
        "std",
        "ratio",
        "shape",
        "fan_in",
        "fan_out",
        "layer",
        "initializer",
    )
    rows = [_row(subject) for subject in subjects]
    layout = Layout("fan_in", can_be_sound=True, is_brief=True, picture=RATIOS)
    return Table("audit", rows, findings, columns, _note(subjects, findings), layout)


def _note(subjects: list[Subject], findings: list[Finding]) -> str:
    """How many kernels have the std that they should have."""
    judged = [subject for subject in subjects if not subject.is_left]
    kernels = [subject for subject in judged if subject.weight.is_kernel]
    known = [subject for subject in kernels if subject.expected is not None]
    codes = ("std", "constant", "constant-kernel", "not-finite")
    off = {
        finding.path
        for finding in findings
        if finding.code in codes and finding.severity != "info"
    }
    expected = sum(subject.weight.path not in off for subject in known)
    parts = []
    if kernels:
        parts.append(f"{expected} of {len(kernels)} kernels have the expected std")
    if len(known) < len(kernels):
        parts.append(f"of {len(kernels) - len(known)} it is not known")
    if len(judged) < len(subjects):
        parts.append(f"{len(subjects) - len(judged)} variables are left as they are")
    parts.append(f"{len(subjects)} variables in all")
    return f"{'; '.join(parts)}."


def _measure_declared(weight: Weight, starts: Callable[[], dict[int, Start]]) -> Subject:
    """A kernel can be what its layer declares, or what `initialize` draws."""
    severity = "warning" if weight.reason else None
    own = Start("", weight.distribution, initializer=weight.initializer, severity=severity)
    others = [*_glorot_distributions(weight)] if weight.is_kernel else []
    if weight.variable.name == "lora_embeddings_a":
        # Keras does not keep `a_initializer`; this is the one that is advised.
        others.append(Distribution.from_std("normal", 1.0))
    subject = _measure(weight, own, others)
    # That start has pairs or zeros, or is orthogonal: right by itself, perhaps, and with
    # its gain in the next kernel.
    if subject.may_be_orthogonal or subject.repeats or subject.is_constant_kernel:
        return _as_isometric(subject, starts())
    return subject


def _measure(weight: Weight, start: Start, others: Iterable[Distribution] = ()) -> Subject:
    """Compares a weight with its start, or with other distributions too."""
    expected = start.distribution
    fitting = Fitting(weight, 0.0 if expected is None else expected.mean)
    statistics = fitting.statistics
    subject = Subject(weight, statistics, start, expected)
    if expected is None or not subject.is_finite or not statistics.size:
        return subject
    if expected.form in ("mirrored", "tap"):
        fault, detail = find_fault(weight, expected) or (None, "")
        return subject._replace(fault=fault, detail=detail)
    candidates = fitting.candidates([expected, *others])
    expected, fault = fitting.best(candidates)
    is_declared = weight.is_kernel and not start.name
    is_scaled = is_declared and fault in ("std", "bounds") and fitting.is_scaled(expected)
    if is_scaled and fault == "bounds" and is_little_larger(statistics, expected):
        fault = None
    suspects = candidates if fault else [expected]
    may_be_orthogonal = any(each.matrices for each in suspects) or (
        fault is not None and _cuts_patches(weight)
    )
    subject = Subject(
        weight, statistics, start, expected, fault, is_scaled, may_be_orthogonal
    )
    return subject._replace(repeats=_find_repeats(subject, fitting.values))


def _cuts_patches(weight: Weight) -> bool:
    """Whether its convolution takes each value once: all taps are one matrix then."""
    owner: Any = weight.owner
    if not weight.is_kernel or not isinstance(owner, CONVOLUTIONS):
        return False
    sizes = list(zip(owner.kernel_size, owner.strides, strict=True))
    return max(owner.kernel_size) > 1 and all(size <= step for size, step in sizes)


def _find_repeats(subject: Subject, values: Values) -> list[Slices]:
    weight, random = subject.weight, subject.random
    if random is None or not subject.statistics.std:
        return []
    if random.matrices is not None and random.matrices.window:
        values = Values.of(random.matrices.at_tap(values))  # beside it, all are zero
    window = window_rank(weight.owner, weight.shape)
    return list(find_repeats(values, window, collision(weight, random)))


def _as_isometric(subject: Subject, starts: dict[int, Start]) -> Subject:
    """A kernel that the isometric start has made, as far as its values tell, is one."""
    weight, is_sound = subject.weight, subject.fault is None and not subject.repeats
    start = starts.get(id(weight.variable))
    drawn = start and start.distribution and find_start(weight, start.distribution)
    if drawn is None:
        return subject
    found = find_fault(weight, drawn)
    is_plain = is_sound and drawn.form != "tap"
    if found and (is_plain or not is_marked(drawn)):
        return subject  # an orthogonal matrix, which it was judged as
    fault, detail = found or (None, "")
    return Subject(
        weight,
        subject.statistics,
        subject.start,
        expected=drawn,
        fault=fault,
        is_scaled=fault == "std",
        detail=detail,
    )


def _glorot_distributions(weight: Weight) -> Iterator[Distribution]:
    """The distributions that `initialize` may draw a kernel from."""
    gain = known_gain(weight.activation) or 1.0
    matrices = kernel_matrices(weight.shape, weight.owner, weight.variable)
    for std in dict.fromkeys(glorot_stds(weight, gain, "fan_avg")):
        yield Distribution.from_std("uniform", std)
        yield Distribution.from_std("truncated_normal", std)
        yield Distribution.orthogonal(std, matrices)


def _with_twins(subjects: list[Subject]) -> Iterator[Subject]:
    """Compares random weights with those before them."""
    earlier = defaultdict(list)
    for subject in subjects:
        if _can_be_twin(subject, subjects):
            size, _, _, low, high = subject.statistics[:5]
            alike = earlier[size, max(-low, high)]
            twins = [each.weight.path for each in alike if _is_twin(each, subject)]
            alike.append(subject)
            subject = subject._replace(twin=twins[0] if twins else "")
        yield subject


def _is_twin(one: Subject, other: Subject) -> bool:
    """Whether std and kurtosis are the same in so many digits that it is no chance."""
    pairs = zip(one.statistics, other.statistics, strict=True)
    _, _, stds, _, _, kurtoses, _ = pairs
    return math.isclose(*stds, rel_tol=1e-12) and math.isclose(*kurtoses, rel_tol=1e-12)


def _can_be_twin(subject: Subject, subjects: list[Subject]) -> bool:
    """Whether the weight is random, and so large that no other is like it by chance."""
    weight, statistics, expected = subject.weight, subject.statistics, subject.expected
    if not statistics.std or not subject.is_finite:
        return False
    random = subject.random
    if random is None:
        if not weight.is_kernel or (expected is not None and expected.form == "tap"):
            return False
        random = Distribution.from_std("normal", statistics.std)
    matrices = random.matrices_of(weight.shape)
    size = statistics.size if matrices is None else matrices.size
    return not can_be_chance(len(subjects), size, collision(weight, random))


def _find_trained(survey: Survey, subjects: list[Subject]) -> Finding | None:
    """Whether the model is not fresh: then its weights are not what was declared."""
    kernels = [each for each in subjects if each.weight.is_kernel and each.random]
    constants = [
        each
        for each in subjects
        if each.expected is not None and each.expected.form == "constant"
    ]
    # `calibrate` scales kernels: where nothing else can tell, that is no training.
    deviating = [
        each
        for each in kernels
        if deviates_from_declaration(each) and (constants or not each.is_scaled)
    ]
    changed = [each for each in constants if each.fault == "constant"]
    # A fresh model can be wrong in every kernel, but not in its biases as well.
    if (
        2 * len(deviating) > len(kernels)
        and (2 * len(changed) > len(constants) or not constants)
        and len(deviating) + len(changed) > 1
    ):
        message = (
            f"{len(deviating)} of {len(kernels)} kernels and {len(changed)} of "
            f"{len(constants)} constants are not what was declared"
        )
        return _find_steps(survey) or _trained(survey, message)
    return _find_steps(survey)


def _find_steps(survey: Survey) -> Finding | None:
    counts = [int(backends.held_value(each.iterations)) for each in survey.optimizers]
    steps = max(counts, default=0)
    return _trained(survey, f"its optimizer has made {steps} steps") if steps else None


def _trained(survey: Survey, reason: str) -> Finding:
    advice = "Audit it before training, or after `initialize`."
    message = f"Looks trained: {reason}."
    return Finding("info", "trained", survey.root.name, message, advice)


def _is_wrong_if_trained(subject: Subject, code: str) -> bool:
    """Dead and equal units only in a kernel; rows of embeddings may be unused."""
    if code in ("zero-slice", "repeated-slice"):
        return subject.weight.is_kernel
    return code in ("not-finite", "negative-variance", "constant-kernel")


def _row(subject: Subject) -> Row:
    weight, statistics, expected = subject.weight, subject.statistics, subject.expected
    fan_in, fan_out = weight.fans or (None, None)
    std = statistics.std if statistics.size > 1 else None
    row: Row = {
        "path": weight.path,
        "layer": None if weight.owner is None else type(weight.owner).__name__,
        "shape": weight.shape,
        "dtype": weight.variable.dtype,
        "initializer": None if subject.start.is_left else subject.initializer_name,
        "fan_in": fan_in,
        "fan_out": fan_out,
        "expected_std": None,
        "std": std,
        "ratio": None,
        "mean": statistics.mean,
    }
    if expected is not None:
        row["expected_std"] = expected.std
        if expected.std and std is not None:
            row["ratio"] = std / expected.std
    return row
