"""Findings: problems of rows, and the order and the words in which they are told."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = [
    "SEVERITIES",
    "Finding",
    "Group",
    "Severity",
    "are_remarks",
    "by_path",
    "count",
    "count_severities",
    "grouped",
]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # the worst first


class Finding(NamedTuple):
    """One problem in one row, and how to fix it.

    Attributes:
        severity: `"error"`, `"warning"` or `"info"`.
        code: The kind of finding, such as `"std"`. The documentation lists all.
        path: The `"path"` of the row that it is about.
        message: The problem, in one sentence.
        advice: One sentence that says what to do.

    Example:

    >>> layer = keras.layers.Dense(8, kernel_initializer="ones", name="dense")
    >>> layer.build((None, 4))
    >>> [finding] = audit(layer).findings
    >>> finding.severity, finding.code, finding.path
    ('info', 'constant-kernel', 'dense/kernel')
    """

    severity: Severity
    code: str
    path: str
    message: str
    advice: str


class Group(NamedTuple):
    """Findings that say and ask for the same thing: the first one speaks for all."""

    first: Finding
    others: int

    @property
    def more(self) -> str:
        return f" (and {self.others} like it)" if self.others else ""

    @property
    def text(self) -> str:
        # Messages of Keras have line breaks.
        return " ".join(f"{self.first.message} {self.first.advice}".split())


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """The worst first."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in _sorted(findings):
        words = _FIGURE.sub("", finding.message)
        key = (finding.severity, finding.code, words, finding.advice)
        groups.setdefault(key, []).append(finding)
    return [Group(first, len(others)) for first, *others in groups.values()]


# A number, or a name with one in it: findings that are alike differ in these.
_FIGURE = re.compile(r"\S*[\d/]\S*")


def by_path(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Those of each row, the worst first."""
    found: dict[str, list[Finding]] = {}
    for finding in _sorted(findings):
        found.setdefault(finding.path, []).append(finding)
    return found


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def are_remarks(findings: Iterable[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.severity == "info" for finding in findings)


def count_severities(findings: Iterable[Finding]) -> list[str]:
    """`["1 error", "2 warnings"]`"""
    counts = Counter(finding.severity for finding in findings)
    names = zip(SEVERITIES, ("error", "warning", "remark"), strict=True)
    return [count(counts[key], name) for key, name in names if counts[key]]


def count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
