"""The findings of `audit` about one weight: a function and an entry in `CHECKS` each."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import keras

from keras_glorot._drawing.distributions import Distribution, keras_distribution
from keras_glorot._models.survey import Weight
from keras_glorot.fans import Fans, compute_fans, fan_of
from keras_glorot.gains import known_gain
from keras_glorot.initializers import GLOROT, GlorotOrthogonal
from keras_glorot.layer_rules import activation_name, is_relu_like, unit_axis
from keras_glorot.recipes import Start
from keras_glorot.tables import Finding, Severity
from keras_glorot.tools._fitting import Statistics, collision, is_off
from keras_glorot.tools._slices import Slices, can_be_chance

__all__ = [
    "CHECKS",
    "ON_THE_DECLARATION",
    "Subject",
    "deviates_from_declaration",
    "glorot_stds",
    "verdicts",
]

_GLOROT = (
    keras.initializers.GlorotNormal,
    keras.initializers.GlorotUniform,
    *GLOROT,
)
_SCALED_BY_FANS = (keras.initializers.VarianceScaling, *GLOROT)
_REINITIALIZE = "Reinitialize it, or ignore this if the model has been trained."
_UNEXPLAINED = f"The values do not match the initializer. {_REINITIALIZE}"


class Subject(NamedTuple):
    """A weight, the statistics of its values, and the distributions they may come from.

    Attributes:
        start: How it should be drawn.
        expected: The plausible distribution nearest to the values: small tensors fit
            several. None where nothing is known.
        fault: The code of what speaks against it; None if nothing does.
        is_scaled: Whether that is no more than the scale of a declared kernel.
        repeats: Slices of it that are zero or repeated; looked for in random weights.
        detail: The fault of a kernel of the isometric start, in a sentence.
    """

    weight: Weight
    statistics: Statistics
    start: Start
    expected: Distribution | None
    fault: str | None = None
    is_scaled: bool = False
    repeats: Sequence[Slices] = ()
    detail: str = ""

    @property
    def is_finite(self) -> bool:
        return self.statistics.is_finite

    @property
    def gain(self) -> float | None:
        """That of its activation; None where it can't be computed."""
        return known_gain(self.weight.activation) if self.weight.is_kernel else 1.0

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

    @property
    def random(self) -> Distribution | None:
        """The expected distribution, if it has more than one value."""
        is_float = keras.backend.is_float_dtype(self.weight.variable.dtype)
        is_random = self.expected is not None and self.expected.is_random
        return self.expected if is_float and is_random else None

    @property
    def is_constant_kernel(self) -> bool:
        """Whether all values of a kernel are equal, and not by chance."""
        size, low, high = self.statistics.size, self.statistics.low, self.statistics.high
        if not self.weight.is_kernel or size < 2 or not self.is_finite or low != high:
            return False
        if self.expected is not None and self.expected.form == "tap":
            return False
        # A few random values of half precision can be equal by chance.
        return self.random is None or not can_be_chance(
            1, size - 1, collision(self.weight, self.random)
        )


class _Verdict(NamedTuple):
    """The result of a check: a `Finding` without its code and path."""

    severity: Severity
    message: str
    advice: str


def verdicts(subject: Subject, passed_over: Collection[str]) -> Iterator[Finding]:
    for code, check in CHECKS.items():
        verdict = None if code in passed_over else check(subject)
        if verdict is not None:
            yield Finding(verdict.severity, code, subject.weight.path, *verdict[1:])


def _check_finite(subject: Subject) -> _Verdict | None:
    if subject.is_finite:
        return None
    return _Verdict("error", "Some values are not finite.", "Reinitialize it.")


def _check_variance(subject: Subject) -> _Verdict | None:
    """Variances are told by their names: `moving_variance`, of Normalization `variance`."""
    low = subject.statistics.low
    if not subject.weight.variable.name.endswith("variance") or not low < 0:
        return None
    message = f"A variance is {low:.4g}: its square root is not a number."
    return _Verdict("error", message, "Reinitialize it.")


def _check_constant_kernel(subject: Subject) -> _Verdict | None:
    statistics, expected = subject.statistics, subject.expected
    if not subject.is_constant_kernel:
        return None
    is_declared = expected is not None and not expected.std
    is_intended = is_declared and subject.fault is None
    message = (
        f"All kernel values are {statistics.low:.4g}, so every unit learns the same thing."
    )
    advice = "Use a random initializer, unless this is intended."
    return _Verdict("info" if is_intended else "error", message, advice)


def _check_fault(code: str, tell: "_Tell", subject: Subject) -> _Verdict | None:
    """A fault, unless the kernel is constant, which is told as such."""
    if subject.expected is None or subject.fault != code or subject.is_constant_kernel:
        return None
    return tell(subject, subject.expected)


_Tell = Callable[[Subject, Distribution], _Verdict]


def _tell_constant(subject: Subject, expected: Distribution) -> _Verdict:
    statistics = subject.statistics
    values = f"Values range from {statistics.low:.4g} to {statistics.high:.4g}"
    if statistics.low == statistics.high:
        values = f"All values are {statistics.low:.4g}"
    return _Verdict("warning", f"{values}, expected {expected.mean:.4g}.", _REINITIALIZE)


def _tell_std(subject: Subject, expected: Distribution) -> _Verdict:
    ratio = subject.statistics.std / expected.std
    message = f"The std is {ratio:.3g} times the expected value."
    advice = _explain_std(subject)
    if advice == _UNEXPLAINED and subject.is_scaled:
        advice = "The values are as declared, times a factor, as `calibrate` leaves them."
        return _Verdict("info", message, advice)
    return _Verdict("warning", message, advice)


def _explain_std(subject: Subject) -> str:
    """Why a std is off, if the fans of the shape alone explain it, and what to do."""
    weight, initializer = subject.weight, subject.start.initializer
    fans_by_shape = compute_fans(weight.shape)
    fans = weight.fans or fans_by_shape
    stock = keras_distribution(initializer, weight.shape, fans_by_shape)
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


def _tell_mean(subject: Subject, expected: Distribution) -> _Verdict:
    message = f"The mean is {subject.statistics.mean:.4g}, expected {expected.mean:.4g}."
    return _Verdict("warning", message, _REINITIALIZE)


def _tell_bounds(subject: Subject, expected: Distribution) -> _Verdict:
    statistics = subject.statistics
    message = (
        f"Values range from {statistics.low:.4g} to {statistics.high:.4g}, outside the "
        f"bounds of {subject.initializer_name}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


def _tell_form(subject: Subject, expected: Distribution) -> _Verdict:
    message = subject.detail or (
        f"Mean and std are right, but the values are not {expected.standard.words}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


# How a fault that `best_fit` or `find_fault` names is told.
_FAULTS: dict[str, _Tell] = {
    "constant": _tell_constant,
    "std": _tell_std,
    "mean": _tell_mean,
    "bounds": _tell_bounds,
    "form": _tell_form,
}


def deviates_from_declaration(subject: Subject) -> bool:
    """Whether a kernel is not as declared, for another reason than Keras's fans."""
    return subject.fault is not None and _explain_std(subject) == _UNEXPLAINED


def _check_zero_slices(subject: Subject) -> _Verdict | None:
    for slices in subject.repeats:
        if slices.dead:
            where = f"{len(slices.dead)} of {slices.total} slices are all zeros"
            message = f"{where}, the first is {_slice_text(slices.dead[0])}."
            return _Verdict("warning", message, "Reinitialize it, unless this is intended.")
    return None


def _check_repeated_slices(subject: Subject) -> _Verdict | None:
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


def _check_activation(subject: Subject) -> _Verdict | None:
    activation = subject.weight.activation
    if activation is None or subject.gain is not None:
        return None
    name = activation_name(activation)
    message = f"The activation {name!r} has no known gain: 1 is taken."
    advice = "Give the initializer `gain` as a number, if 1 is not right."
    return _Verdict("info", message, advice)


def glorot_stds(weight: Weight, gain: float, mode: str) -> tuple[float, float]:
    """The stds that `initialize` gives: with gain 1, and with the activation's gain."""
    std = math.sqrt(1 / max(1, fan_of(weight.fans or Fans(0, 0), mode)))
    return std, std * gain


def _check_relu_gain(subject: Subject) -> _Verdict | None:
    weight, statistics, expected = subject.weight, subject.statistics, subject.expected
    if not (weight.is_kernel and statistics.std and is_relu_like(weight.activation)):
        return None
    if not isinstance(weight.initializer, _GLOROT) or expected is None:
        return None
    if expected.form in ("mirrored", "tap"):
        return None
    mode = weight.initializer.mode
    plain, with_gain = glorot_stds(weight, subject.gain or 1.0, mode)
    if subject.fault == "std" or 2 * statistics.std >= plain + with_gain:
        return None
    if not is_off(statistics, Distribution.from_std("truncated_normal", with_gain)):
        return None  # too small to tell
    message = f"{subject.initializer_name} with gain 1 before a ReLU-like activation."
    if getattr(weight.activation, "__name__", "") == "relu":
        return _Verdict("info", message, "Use `GlorotUniform(gain='relu')` or `HeNormal`.")
    return _Verdict("info", message, f"Use `GlorotUniform(gain={subject.gain:.4g})`.")


def _check_embedding(subject: Subject) -> _Verdict | None:
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


def _check_recurrent(subject: Subject) -> _Verdict | None:
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
CHECKS: dict[str, Callable[[Subject], _Verdict | None]] = {
    "not-finite": _check_finite,
    "negative-variance": _check_variance,
    "constant-kernel": _check_constant_kernel,
    **{code: partial(_check_fault, code, tell) for code, tell in _FAULTS.items()},
    "zero-slice": _check_zero_slices,
    "repeated-slice": _check_repeated_slices,
    "relu-gain": _check_relu_gain,
    "activation": _check_activation,
    "embedding": _check_embedding,
    "recurrent": _check_recurrent,
}

# About what the layers declare.
ON_THE_DECLARATION = {"relu-gain", "activation", "embedding", "recurrent"}
