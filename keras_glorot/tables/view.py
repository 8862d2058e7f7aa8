"""The part of a table that is shown: which rows and columns, in which words."""

import re
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from rich.cells import cell_len, chop_cells

from keras_glorot.tables.findings import SEVERITIES, are_remarks, by_path, grouped

__all__ = ["Layout", "Picture", "Row", "View", "cell", "fold", "printable"]

Row = dict[str, Any]

_RANKS = [*SEVERITIES, ""]


def _nothing(*_: Any) -> Any:
    return []


class Picture(NamedTuple):
    """How rows are drawn; without arguments, none is.

    Attributes:
        label: One sentence for those who can't see it.
        select: Of a table, the rows that can be drawn.
        draw: Draws these rows of the table on `Axes`, or on new ones, and returns them:
            `draw(table, rows, ax=None, scaled=())`. The scale has room for the values of
            the rows `scaled`, too.
    """

    label: str = ""
    select: Callable[[Any], list[Row]] = _nothing
    draw: Callable[..., Any] = _nothing


class Layout(NamedTuple):
    """How to show the rows of a table, as the function that made it knows.

    Attributes:
        kernel_key: A key that only rows of kernels have; others are shown on request.
            Without it, all are shown.
        has_total: Whether the last row is about the whole model.
        is_sequence: Whether the rows tell something by their order, as calls do.
        can_be_sound: Whether the verdict says "sound" where nothing is wrong.
        is_brief: Whether the verdict of a sound table is enough.
        picture: How the rows are drawn.
    """

    kernel_key: str = ""
    has_total: bool = False
    is_sequence: bool = False
    can_be_sound: bool = False
    is_brief: bool = False
    picture: Picture = Picture()


class View:
    """The part of a table that is shown: rows of kernels or with a finding, or all rows.

    Attributes:
        verdict: The first line: how many findings, and the table's note.
        groups: The findings, the worst first.
        found: By path, the findings there, the worst first.
        rows: The rows, in the order of the table, with the "number" of each in the picture
            and the codes of its "finding".
        columns: Keys of the table, the path first; without those that hold nothing.
        others: How many rows without a kernel are left out.
        is_brief: Whether the rows tell nothing that the verdict does not.
    """

    def __init__(self, table: Any, all: bool = False, encoding: str = "utf-8"):
        self.kind, self.layout, self.is_whole = table.kind, table.layout, all
        self.encoding = encoding
        summary = f"{table.summary}. " if table.summary else ""
        self.verdict = f"{summary}{table.note}".strip()
        self.groups, self.found = grouped(table.findings), by_path(table.findings)
        drawn = enumerate(self.layout.picture.select(table), 1)
        numbers = {id(row): number for number, row in drawn}
        rows = [
            {**row, "number": numbers.get(id(row)), "finding": self._codes(row)}
            for row in table.rows
        ]
        self.total = rows[-1] if self.layout.has_total and rows else None
        key = self.layout.kernel_key
        kept = [
            row
            for row in rows
            if row.get(key) is not None or row is self.total or row["finding"]
        ]
        self.rows = kept if kept and key and not all else rows
        self.others = len(rows) - len(self.rows)
        self.columns = [
            key for key in table.columns if any(row[key] is not None for row in self.rows)
        ]
        self.is_brief = self.layout.is_brief and are_remarks(table.findings) and not all

    def _codes(self, row: Row) -> str | None:
        found = self.found.get(row["path"], ())
        return ", ".join(finding.code for finding in found) or None

    def severity(self, row: Row) -> str:
        """The worst that was found in a row, if anything was."""
        found = self.found.get(row["path"])
        return found[0].severity if found else ""

    def text(self, value: Any) -> str:
        """A value as it is shown, where some signs may not be in the encoding."""
        shown = cell(value).encode(self.encoding, "backslashreplace")
        return shown.decode(self.encoding)

    def rank(self, row: Row) -> int:
        """Its place where there is no room for all rows: the lowest first."""
        return -1 if row is self.total else _RANKS.index(self.severity(row))

    def is_number(self, key: str) -> bool:
        """Whether all of a column are numbers, or nothing."""
        return all(isinstance(row[key], int | float | None) for row in self.rows)

    def select(self, lines: int) -> list[Row | int]:
        """Rows that fill so many lines; a number stands for the rows left out there.

        By rank, then from both ends.
        """
        count = len(self.rows)
        ranks = [(self.rank(row), min(i, count - 1 - i)) for i, row in enumerate(self.rows)]
        order = sorted(range(count), key=ranks.__getitem__)
        lines = count if self.is_whole else lines
        shown: list[Row | int] = []
        for most in range(lines, 0, -1):
            shown = []
            for is_kept, run in groupby(range(count), set(order[:most]).__contains__):
                places = list(run)
                # A mark for one row would take the place of the row.
                is_kept |= len(places) == 1
                shown += [self.rows[i] for i in places] if is_kept else [len(places)]
            if len(shown) <= lines:
                break
        return shown


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def printable(text: str) -> str:
    """Escapes the signs that a terminal would obey instead of showing them."""
    shown = (
        sign if sign.isprintable() else sign.encode("unicode_escape").decode()
        for sign in text
    )
    return "".join(shown)


def fold(name: str, width: int, marks: str = "/_") -> list[str]:
    """A whole name in lines, which end at `/` or, in a long part, at `_`."""
    if cell_len(name) <= width:
        return [name]
    if not marks:
        return chop_cells(name, max(width, 2))  # room for one sign
    lines: list[str] = []
    for part in re.split(f"(?<={marks[0]})", name):
        if lines and cell_len(lines[-1] + part) <= width:
            lines[-1] += part
        else:
            lines += fold(part, width, marks[1:])
    return lines
