"""Checks of arguments that several modules share, with errors in Keras's wording."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["check_choice", "suggestion"]


def check_choice(name: str, value: Any, choices: Sequence[str | bool | None]) -> None:
    """Raises a ValueError if an argument is none of its choices."""
    # A NumPy array can't be compared like this.
    if isinstance(value, str | int | None) and value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise ValueError(
        f"Argument `{name}` must be one of {listed}. Received: {name}={value!r}"
    )


def suggestion(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known word that is meant by a misspelled one, or ""."""
    by_folded = {word.casefold(): word for word in known}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean {by_folded[matches[0]]!r}?" if matches else ""
