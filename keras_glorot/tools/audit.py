"""`audit`: compares the fresh weights of a model with their declared initializers."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras

from keras_glorot import _backends as backends
from keras_glorot._backends.values import Values
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._keras.call_site import CallSite
from keras_glorot._keras.state import unmoved_generators
from keras_glorot._models.survey import Survey, Weight, distribution_of
from keras_glorot.fans import Fans, compute_fans, fan_of
from keras_glorot.gains import known_gain
from keras_glorot.initializers import GLOROT, GlorotOrthogonal
from keras_glorot.layer_rules import (
    is_relu_like,
    kernel_matrices,
    unit_axis,
    window_rank,
)
from keras_glorot.recipes import Start
from keras_glorot.recipes.isometric import isometric
from keras_glorot.tables import Finding, Layout, Row, Severity, Table
from keras_glorot.tables.plots import RATIOS
from keras_glorot.tools._fitting import (
    Statistics,
    best_fit,
    collision,
    has_form,
    is_little_larger,
    is_off,
    measure,
)
from keras_glorot.tools._how import find_starts
from keras_glorot.tools._isometry import find_fault, has_pairs, is_part, is_start
from keras_glorot.tools._slices import (
    Slices,
    can_be_chance,
    find_repeats,
    relation,
)

__all__ = ["CODES", "audit", "audited"]

_GLOROT = (
    keras.initializers.GlorotNormal,
    keras.initializers.GlorotUniform,
    *GLOROT,
)
_SCALED_BY_FANS = (keras.initializers.VarianceScaling, *GLOROT)
_REINITIALIZE = "Reinitialize it, or ignore this if the model has been trained."
_UNEXPLAINED = f"The values do not match the initializer. {_REINITIALIZE}"


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
    nothing else; the choice is yours, and not judged. What `how` leaves as it is may be
    trained, and is checked as that is.

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
        `fan_out`, `expected_std`, `std`, `ratio` (of these two) and `mean`; what can't be
        known is None.

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
        starts = _IsometricStarts(survey)
        measured = [_measure_declared(weight, starts) for weight in survey.weights]
        trained = _find_trained(survey, measured)
    else:
        with unmoved_generators():
            chosen = find_starts(survey, how)
        measured = [_measure(weight, chosen.of(weight)) for weight in survey.weights]
        trained = _find_steps(survey)
    passed_over = set() if how is None else _ON_THE_CHOICE
    findings = [each for subject in measured for each in _check(subject, passed_over)]
    findings += _find_twins(measured)
    may_be_trained = {each.weight.path for each in measured if trained or each.is_left}
    kernels = {each.weight.path for each in measured if each.weight.is_kernel}
    findings = [
        each
        for each in findings
        if each.path not in may_be_trained or _is_wrong_if_trained(each, kernels)
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
    rows = [_row(subject) for subject in measured]
    layout = Layout("fan_in", can_be_sound=True, is_brief=True, picture=RATIOS)
    return Table("audit", rows, findings, columns, _note(measured, findings), layout)


def _note(measured: list["_Measured"], findings: list[Finding]) -> str:
    """How many kernels have the std that they should have."""
    judged = [subject for subject in measured if not subject.is_left]
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
    if len(judged) < len(measured):
        parts.append(f"{len(measured) - len(judged)} variables are left as they are")
    parts.append(f"{len(measured)} variables in all")
    return f"{'; '.join(parts)}."


class _Measured(NamedTuple):
    """A weight, what its values are like, and what they may be drawn from.

    Attributes:
        start: How it should be drawn.
        expected: The plausible distribution nearest to the values: small tensors fit
            several. None where nothing is known.
        fault: The code of what speaks against it; None if nothing does.
        repeats: Slices of it that are zero or repeated; looked for in random weights.
        gain: That of its activation; None where it can't be computed.
        detail: What is at fault in a kernel of the isometric start.
    """

    weight: Weight
    statistics: Statistics
    expected: Distribution | None
    start: Start
    fault: str | None
    repeats: list[Slices]
    gain: float | None
    detail: str = ""

    @property
    def is_finite(self) -> bool:
        return self.statistics.is_finite

    @property
    def is_constant(self) -> bool:
        return self.is_finite and self.statistics.low == self.statistics.high

    @property
    def is_declared(self) -> bool:
        """Whether its layer says how it is drawn, and not `how`: then it has no name."""
        return not self.start.name

    @property
    def is_left(self) -> bool:
        """Whether that was chosen."""
        return self.start.is_left and self.start.severity is None

    @property
    def initializer_name(self) -> str:
        initializer = self.start.initializer
        if initializer is None:
            return self.start.name
        return getattr(initializer, "__name__", type(initializer).__name__)


class _IsometricStarts:
    """How the isometric start draws a model, or the part that it seems to have drawn."""

    def __init__(self, survey: Survey):
        self._survey = survey

    @functools.cached_property
    def of_all(self) -> dict[int, Start]:
        return isometric(self._survey).by_id

    @functools.cached_property
    def of_a_part(self) -> dict[int, Start]:
        others = {
            id(weight.variable): None
            for weight in self._survey.weights
            if (start := self.of_all.get(id(weight.variable)))
            and not (start.distribution and is_part(weight, start.distribution))
        }
        return isometric(self._survey.for_recipe(others)).by_id


def _measure_declared(weight: Weight, starts: _IsometricStarts) -> _Measured:
    """A kernel can be what its layer declares, or what `initialize` draws."""
    severity = "warning" if weight.reason else None
    own = Start("", weight.distribution, initializer=weight.initializer, severity=severity)
    others = [*_glorot_distributions(weight)] if weight.is_kernel else []
    if weight.variable.name == "lora_embeddings_a":
        # Keras does not keep `a_initializer`; this is the one that is advised.
        others.append(Distribution.from_std("normal", 1.0))
    subject = _measure(weight, own, others)
    # An orthogonal kernel can be right by itself, and have its gain in the next one.
    is_orthogonal = subject.expected is not None and subject.expected.form == "orthogonal"
    is_suspect = subject.fault or subject.repeats or _is_constant_kernel(subject)
    if is_suspect or is_orthogonal:
        return _as_isometric(subject, starts)
    return subject


def _measure(
    weight: Weight, start: Start, others: Iterable[Distribution] = ()
) -> _Measured:
    """Compares a weight with its start, or with other distributions too."""
    expected = start.distribution
    statistics = measure(weight.variable, 0.0 if expected is None else expected.mean)
    gain = known_gain(weight.activation) if weight.is_kernel else 1.0
    subject = _Measured(weight, statistics, expected, start, None, [], gain)
    if expected is None:
        return subject
    if expected.form in ("mirrored", "tap"):
        found = find_fault(weight, expected) if subject.is_finite else None
        fault, detail = found or (None, "")
        return subject._replace(fault=fault, detail=detail)
    expected, fault = best_fit(weight, statistics, [expected, *others])
    repeats = []
    random = _random_distribution(weight, expected)
    if random is not None and statistics.std and statistics.is_finite:
        values = _values_drawn(weight, random)
        window = window_rank(weight.owner, weight.shape)
        repeats = list(find_repeats(values, window, collision(weight, random)))
    return subject._replace(expected=expected, fault=fault, repeats=repeats)


def _as_isometric(subject: "_Measured", starts: _IsometricStarts) -> "_Measured":
    """A kernel that the isometric start has made, as far as its values tell, is one."""
    weight = subject.weight
    start = starts.of_all.get(id(weight.variable)) if subject.is_finite else None
    drawn = start and start.distribution
    is_sound = subject.fault is None and not subject.repeats
    if drawn and not is_sound and not is_start(weight, drawn) and is_part(weight, drawn):
        start = starts.of_a_part.get(id(weight.variable))
        drawn = start and start.distribution
    if drawn is None or not is_start(weight, drawn):
        return subject
    found = find_fault(weight, drawn)
    is_plain = is_sound or not has_pairs(drawn)
    if found and is_plain and drawn.form != "tap":
        return subject  # an orthogonal matrix, which it was judged as
    code, detail = found or (None, "")
    return subject._replace(expected=drawn, fault=code, repeats=[], detail=detail)


def _values_drawn(weight: Weight, random: Distribution) -> Values:
    """The values of a weight, without those beside a tap, which are always zero."""
    values = backends.values(weight.variable)
    if random.matrices is None or not random.matrices.window:
        return values
    return Values.of(random.matrices.at_tap(values))


def _random_distribution(
    weight: Weight, expected: Distribution | None
) -> Distribution | None:
    """The expected distribution, if it has more than one value."""
    is_float = keras.backend.is_float_dtype(weight.variable.dtype)
    return expected if is_float and expected is not None and expected.is_random else None


def _glorot_distributions(weight: Weight) -> Iterator[Distribution]:
    """The distributions that `initialize` may draw a kernel from."""
    gain = known_gain(weight.activation) or 1.0
    for std in dict.fromkeys(_glorot_stds(weight, gain, "fan_avg")):
        yield Distribution.from_std("uniform", std)
        yield Distribution.from_std("truncated_normal", std)
        yield Distribution.orthogonal(std, kernel_matrices(weight.shape, *weight.site))


def _glorot_stds(weight: Weight, gain: float, mode: str) -> tuple[float, float]:
    """The stds that `initialize` gives: with gain 1, and with the activation's gain."""
    std = math.sqrt(1 / max(1, fan_of(weight.fans or Fans(0, 0), mode)))
    return std, std * gain


class _Verdict(NamedTuple):
    """The result of a check: a `Finding` without its code and path."""

    severity: Severity
    message: str
    advice: str


def _check(subject: _Measured, passed_over: set[str]) -> Iterator[Finding]:
    for code, check in _CHECKS.items():
        verdict = None if code in passed_over else check(subject)
        if verdict is not None:
            severity, message, advice = verdict
            yield Finding(severity, code, subject.weight.path, message, advice)


def _check_finite(subject: _Measured) -> _Verdict | None:
    if subject.is_finite:
        return None
    return _Verdict("error", "Some values are not finite.", "Reinitialize it.")


def _check_variance(subject: _Measured) -> _Verdict | None:
    """Variances are told by their names: `moving_variance`, of Normalization `variance`."""
    low = subject.statistics.low
    if not subject.weight.variable.name.endswith("variance") or not low < 0:
        return None
    message = f"A variance is {low:.4g}: its square root is not a number."
    return _Verdict("error", message, "Reinitialize it.")


def _check_constant_kernel(subject: _Measured) -> _Verdict | None:
    statistics, expected = subject.statistics, subject.expected
    if not _is_constant_kernel(subject):
        return None
    is_declared = expected is not None and not expected.std
    is_intended = is_declared and subject.fault is None
    message = (
        f"All kernel values are {statistics.low:.4g}, so every unit learns the same thing."
    )
    advice = "Use a random initializer, unless this is intended."
    return _Verdict("info" if is_intended else "error", message, advice)


def _is_constant_kernel(subject: _Measured) -> bool:
    size, expected = subject.statistics.size, subject.expected
    if not (subject.weight.is_kernel and subject.is_constant and size > 1):
        return False
    if expected is not None and expected.form == "tap":
        return False
    random = _random_distribution(subject.weight, expected)
    # A few random values of half precision can be equal by chance.
    return random is None or not can_be_chance(
        1, size - 1, collision(subject.weight, random)
    )


def _check_constant(subject: _Measured) -> _Verdict | None:
    statistics, expected = subject.statistics, subject.expected
    if expected is None or subject.fault != "constant" or _is_constant_kernel(subject):
        return None
    values = f"Values range from {statistics.low:.4g} to {statistics.high:.4g}"
    if statistics.low == statistics.high:
        values = f"All values are {statistics.low:.4g}"
    return _Verdict("warning", f"{values}, expected {expected.mean:.4g}.", _REINITIALIZE)


def _check_std(subject: _Measured) -> _Verdict | None:
    expected, statistics = subject.expected, subject.statistics
    if expected is None or subject.fault != "std" or _is_constant_kernel(subject):
        return None
    ratio = statistics.std / expected.std
    message = f"The std is {ratio:.3g} times the expected value."
    advice = _explain_std(subject)
    if advice == _UNEXPLAINED and _is_scaled(subject):
        advice = "The values are as declared, times a factor, as `calibrate` leaves them."
        return _Verdict("info", message, advice)
    return _Verdict("warning", message, advice)


def _is_scaled(subject: _Measured) -> bool:
    """Whether the values of a kernel are of the expected form, at another scale."""
    expected = subject.expected
    if expected is None or not subject.weight.is_kernel or not subject.is_declared:
        return False
    return has_form(subject.weight, subject.statistics, expected)


def _check_mean(subject: _Measured) -> _Verdict | None:
    expected, mean = subject.expected, subject.statistics.mean
    if expected is None or subject.fault != "mean" or _is_constant_kernel(subject):
        return None
    message = f"The mean is {mean:.4g}, expected {expected.mean:.4g}."
    return _Verdict("warning", message, _REINITIALIZE)


def _check_bounds(subject: _Measured) -> _Verdict | None:
    statistics, expected = subject.statistics, subject.expected
    if expected is None or subject.fault != "bounds" or _is_constant_kernel(subject):
        return None
    if _is_scaled(subject) and is_little_larger(subject.weight, statistics, expected):
        return None
    message = (
        f"Values range from {statistics.low:.4g} to {statistics.high:.4g}, outside the "
        f"bounds of {subject.initializer_name}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


def _check_form(subject: _Measured) -> _Verdict | None:
    expected = subject.expected
    if expected is None or subject.fault != "form" or _is_constant_kernel(subject):
        return None
    message = subject.detail or (
        f"Mean and std are right, but the values are not {_FORM_NAMES[expected.form]}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


_FORM_NAMES = {
    "uniform": "uniform",
    "triangular": "the sum of two uniform draws",
    "truncated_normal": "truncated normal",
    "orthogonal": "an orthogonal matrix",
}


def _check_zero_slices(subject: _Measured) -> _Verdict | None:
    for slices in subject.repeats:
        if slices.dead:
            where = f"{len(slices.dead)} of {slices.total} slices are all zeros"
            message = f"{where}, the first is {_slice_text(slices.dead[0])}."
            return _Verdict("warning", message, "Reinitialize it, unless this is intended.")
    return None


def _check_repeated_slices(subject: _Measured) -> _Verdict | None:
    weight = subject.weight
    for slices in subject.repeats:
        if slices.copies:
            one, other = (_slice_text(index) for index in slices.copies[0])
            count = len(slices.copies)
            message = (
                f"{count} of {slices.total} slices repeat another one or its negative: "
                f"{one} repeats {other}."
            )
            units = len(weight.shape) + unit_axis(weight.owner)
            all_alike = count == slices.total - 1 and units in slices.axes
            severity = "error" if weight.is_kernel and all_alike else "warning"
            return _Verdict(severity, message, "Reinitialize it, unless this is intended.")
    return None


def _slice_text(index: tuple[object, ...]) -> str:
    """An index as it is written: `[:, 3]`."""
    return f"[{', '.join(':' if isinstance(at, slice) else str(at) for at in index)}]"


def _check_activation(subject: _Measured) -> _Verdict | None:
    activation = subject.weight.activation
    if subject.gain is not None:
        return None
    name = getattr(activation, "__name__", activation)
    message = f"The activation {name!r} has no known gain: 1 is taken."
    advice = "Give the initializer `gain` as a number, if 1 is not right."
    return _Verdict("info", message, advice)


def _check_relu_gain(subject: _Measured) -> _Verdict | None:
    weight, statistics, expected = subject.weight, subject.statistics, subject.expected
    if not (weight.is_kernel and statistics.std and is_relu_like(weight.activation)):
        return None
    if not isinstance(weight.initializer, _GLOROT) or expected is None:
        return None
    if expected.form in ("mirrored", "tap"):
        return None
    mode = weight.initializer.mode
    plain, with_gain = _glorot_stds(weight, subject.gain or 1.0, mode)
    if subject.fault == "std" or 2 * statistics.std >= plain + with_gain:
        return None
    if not is_off(statistics, Distribution.from_std("truncated_normal", with_gain)):
        return None  # too small to tell
    message = f"{subject.initializer_name} with gain 1 before a ReLU-like activation."
    if getattr(weight.activation, "__name__", "") == "relu":
        return _Verdict("info", message, "Use `GlorotUniform(gain='relu')` or `HeNormal`.")
    return _Verdict("info", message, f"Use `GlorotUniform(gain={subject.gain:.4g})`.")


def _check_embedding(subject: _Measured) -> _Verdict | None:
    weight, name = subject.weight, subject.initializer_name
    if not isinstance(weight.initializer, _SCALED_BY_FANS):
        return None
    if "embedding" not in weight.variable.name or subject.expected != weight.distribution:
        return None
    message = f"{name} on an embedding: its rows are looked up, not summed."
    advice = "Use `embeddings_initializer='uniform'`, Keras's default."
    if weight.variable.name.startswith("lora_"):
        advice = "Use `enable_lora(rank, a_initializer=RandomNormal(stddev=1.0))`."
    return _Verdict("warning", message, advice)


def _check_recurrent(subject: _Measured) -> _Verdict | None:
    if not isinstance(subject.weight.initializer, _GLOROT):
        return None
    if "recurrent" not in subject.weight.variable.name:
        return None
    if isinstance(subject.weight.initializer, GlorotOrthogonal):
        return None  # its singular values are equal: it is made for that
    message = (
        f"{subject.initializer_name} on a recurrent kernel: repeated multiplication makes "
        "the state vanish or explode."
    )
    advice = "Use `recurrent_initializer='orthogonal'`, Keras's default."
    return _Verdict("warning", message, advice)


# A new finding is one function and one entry here; `docs/findings.md` lists the codes.
_CHECKS: dict[str, Callable[[_Measured], _Verdict | None]] = {
    "not-finite": _check_finite,
    "negative-variance": _check_variance,
    "constant-kernel": _check_constant_kernel,
    "constant": _check_constant,
    "std": _check_std,
    "mean": _check_mean,
    "bounds": _check_bounds,
    "form": _check_form,
    "zero-slice": _check_zero_slices,
    "repeated-slice": _check_repeated_slices,
    "relu-gain": _check_relu_gain,
    "activation": _check_activation,
    "embedding": _check_embedding,
    "recurrent": _check_recurrent,
}


# About what the layers declare.
_ON_THE_CHOICE = {"relu-gain", "activation", "embedding", "recurrent"}

# The codes of all findings of `audit`.
CODES = (*_CHECKS, "twin", "trained")


def _find_twins(measured: list[_Measured]) -> Iterator[Finding]:
    """Random weights with the same values, perhaps negated or transposed."""
    candidates = [each for each in measured if _can_be_twin(each, measured)]
    twin_of: dict[int, tuple[int, str]] = {}
    for first, later in _same_statistics(candidates):
        if later not in twin_of:
            pair = (candidates[later].weight, candidates[first].weight)
            kind = relation(*(backends.values(weight.variable) for weight in pair))
            if kind is not None:
                twin_of[later] = (first, kind)
    for later, (first, kind) in sorted(twin_of.items()):
        message = f"{kind} {candidates[first].weight.path}."
        advice = "Give each layer its own seed, or no seed."
        path = candidates[later].weight.path
        yield Finding("warning", "twin", path, message, advice)


def _same_statistics(subjects: list[_Measured]) -> Iterator[tuple[int, int]]:
    """Pairs with the same size, extreme and std: only in those all values are compared.

    A transposed tensor is summed in another order, so the last digits may differ. All
    orthogonal ones of a shape have the same std, but not the same extreme.
    """
    keys = [
        (each.size, max(-each.low, each.high), each.std)
        for each in (subject.statistics for subject in subjects)
    ]
    order = sorted(range(len(subjects)), key=keys.__getitem__)
    for position, later in enumerate(order):
        size, extreme, std = keys[later]
        for before in reversed(order[:position]):
            if keys[before] < (size, extreme, std * (1 - 1e-9)):
                break
            yield min(before, later), max(before, later)


def _can_be_twin(subject: _Measured, measured: list[_Measured]) -> bool:
    """Whether the weight is random, and so large that no other is like it by chance."""
    weight, statistics, expected = subject[:3]
    if not statistics.std or not subject.is_finite:
        return False
    random = _random_distribution(weight, expected)
    if random is None:
        if not weight.is_kernel or (expected is not None and expected.form == "tap"):
            return False
        random = Distribution.from_std("normal", statistics.std)
    matrices = random.matrices_of(weight.shape)
    size = statistics.size if matrices is None else matrices.size
    return not can_be_chance(len(measured), size, collision(weight, random))


def _find_trained(survey: Survey, measured: list[_Measured]) -> Finding | None:
    """Whether the model is not fresh: then its weights are not what was declared."""
    kernels = [
        each
        for each in measured
        if each.weight.is_kernel and _random_distribution(each.weight, each.expected)
    ]
    constants = [
        each
        for each in measured
        if each.expected is not None and each.expected.form == "constant"
    ]
    deviating = [each for each in kernels if _deviates_from_declaration(each)]
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
    steps = max(map(_count_steps, survey.optimizers), default=0)
    return _trained(survey, f"its optimizer has made {steps} steps") if steps else None


def _trained(survey: Survey, reason: str) -> Finding:
    advice = "Audit it before training, or after `initialize`."
    message = f"Looks trained: {reason}."
    return Finding("info", "trained", survey.root.name, message, advice)


def _count_steps(optimizer: keras.optimizers.Optimizer) -> int:
    steps: Any = keras.ops.convert_to_numpy(optimizer.iterations)
    return int(steps)


def _deviates_from_declaration(subject: _Measured) -> bool:
    """Whether a kernel is not as declared, for another reason than Keras's fans."""
    is_off = subject.fault in ("std", "mean", "bounds", "form")
    return is_off and _explain_std(subject) == _UNEXPLAINED


# Wrong in a trained model too.
_WRONG_IF_TRAINED = {"not-finite", "negative-variance", "constant-kernel"}


def _is_wrong_if_trained(finding: Finding, kernels: set[str]) -> bool:
    """In a kernel also dead and equal units; rows of embeddings may be unused."""
    if finding.code in ("zero-slice", "repeated-slice"):
        return finding.path in kernels
    return finding.code in _WRONG_IF_TRAINED


def _explain_std(subject: _Measured) -> str:
    """Why a std is off, if the fans of the shape alone explain it, and what to do."""
    weight, initializer = subject.weight, subject.start.initializer
    fans_by_shape = compute_fans(weight.shape)
    fans = weight.fans or fans_by_shape
    stock = distribution_of(initializer, weight.shape, fans_by_shape, CallSite())
    if fans == fans_by_shape or stock is None or is_off(subject.statistics, stock):
        return _UNEXPLAINED
    if weight.variable.name.startswith("lora_"):
        return (
            "Keras took the fans of a LoRA factor from its shape alone: use "
            "`enable_lora(rank, a_initializer='xavier_uniform')`, or after that of a "
            f"backbone `initialize(model, {{'{weight.variable.name}': 'xavier_uniform'}})`."
        )
    if getattr(weight.owner, "depth_multiplier", None) is not None:
        cause = "Keras counted all channels of a depthwise kernel as inputs"
    elif getattr(weight.owner, "groups", 1) > 1:
        cause = "Keras did not divide fan_out by the groups"
    elif math.prod(fans) < math.prod(weight.shape):
        cause = "Keras counted the experts as inputs or outputs"
    else:
        cause = "Keras took the fans of attention heads from the shape alone"
    return f"{cause}: use `keras_glorot.initialize`, or 'xavier_uniform' in the layer."


def _row(subject: _Measured) -> Row:
    weight, statistics, expected = subject[:3]
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
