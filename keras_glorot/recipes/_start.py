"""How each weight of a model is drawn: `Start` and `Starts`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from keras_glorot._drawing.distributions import Distribution
from keras_glorot._keras.rebuild import BuildValue
from keras_glorot._models.survey import Weight
from keras_glorot.gains import activation_gain
from keras_glorot.initializers import with_config
from keras_glorot.tables import Severity

__all__ = ["Start", "Starts"]


class Start(NamedTuple):
    """How a weight is drawn, or why it is left as it is.

    Attributes:
        name: For the table: the initializer, or the reason.
        distribution: That of its values; None if only the initializer knows.
        columns: More that its row says, by key.
        initializer: The object that makes it, if one does. Without it and without a
            distribution the weight is left.
        severity: How bad it is that it is left; None if that was chosen.
    """

    name: str
    distribution: Distribution | None = None
    columns: Mapping[str, Any] = MappingProxyType({})
    initializer: Any = None
    severity: Severity | None = None

    @classmethod
    def of(cls, weight: Weight, initializer: Any) -> "Start":
        """As an initializer draws it: one of ours with the fans of its layer, and with
        `gain="auto"` also with the gain of an activation that is the next layer."""
        if getattr(initializer, "gain", None) == "auto":
            gain = activation_gain(weight.activation)
            initializer = with_config(initializer, gain=gain)
        distribution = weight.distribution_of(initializer)
        return cls(_describe(initializer), distribution, initializer=initializer)

    @classmethod
    def own(cls, weight: Weight) -> "Start":
        """As its layer makes it."""
        if weight.reason:
            severity = "info" if weight.is_data else "warning"
            return cls.left(weight.reason)._replace(severity=severity)
        if isinstance(weight.initializer, BuildValue):
            return cls("assigned in build", initializer=weight.initializer)
        return cls.of(weight, weight.initializer)

    @classmethod
    def left(cls, reason: str) -> "Start":
        """As it is."""
        return cls(f"not changed: {reason}")

    @property
    def is_left(self) -> bool:
        return self.distribution is None and self.initializer is None


class Starts(NamedTuple):
    """How the weights of a model are drawn.

    Attributes:
        by_id: A start for each weight that is not made by its own initializer, by the `id`
            of the variable.
        columns: The keys that these starts add to rows.
        note: A sentence about what was done.
        seed: An integer or a `keras.random.SeedGenerator` that came with the initializers.
    """

    by_id: dict[int, Start]
    columns: tuple[str, ...] = ()
    note: str = ""
    seed: Any = None

    def of(self, weight: Weight) -> Start:
        return self.by_id.get(id(weight.variable)) or Start.own(weight)


def _describe(initializer: Any) -> str:
    name = getattr(initializer, "__name__", type(initializer).__name__)
    gain = getattr(initializer, "gain", 1.0)
    return f"{name}(gain={gain:.4g})" if isinstance(gain, float) and gain != 1 else name
