"""What a recipe says of each weight."""

from typing import Any, NamedTuple

from keras_glorot._drawing.distributions import Distribution

__all__ = ["Start", "Starts"]


class Start(NamedTuple):
    """How a recipe draws a weight.

    Attributes:
        name: The recipe's name for it, for the table.
        distribution: What it is drawn from.
        columns: What else its row says, by key.
    """

    name: str
    distribution: Distribution
    columns: dict[str, Any]


class Starts(NamedTuple):
    """What a recipe makes of a model.

    Attributes:
        by_id: A start for each weight that it draws, by the `id` of the variable. All other
            weights get what their own initializer gives.
        columns: The keys that it adds to rows.
        note: What it did, in a sentence.
    """

    by_id: dict[int, Start]
    columns: tuple[str, ...]
    note: str
