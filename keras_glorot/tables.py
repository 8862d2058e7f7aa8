"""The table that `initialize`, `audit` and `propagate` return: rows, and what was found."""

import functools
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

__all__ = ["Finding", "Row", "Severity", "Table", "printable"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_ROWS_PRINTED = 50
# A path that is narrower than this can't be read; other columns are left out before.
_PATH_WIDTH = 32


Kind = Literal["initialize", "audit", "propagate", "calibrate"]
Row = dict[str, Any]
Severity = Literal["error", "warning", "info"]


class Finding(NamedTuple):
    """One thing worth knowing about one row: what it is, and what to do about it.

    Attributes:
        severity: `"error"`, `"warning"` or `"info"`.
        code: What kind of finding it is, such as `"std"`. The README lists all codes.
        path: The row that it is about.
        message: One sentence that says what is so.
        advice: One sentence that says what to do.
    """

    severity: Severity
    code: str
    path: str
    message: str
    advice: str


class Table:
    """Rows of figures with findings; prints itself to the width of the terminal.

    Attributes:
        kind: The name of the function that made it: what the rows hold.
        rows: A list of dictionaries, all with the same keys; `"path"` is one of them.
        findings: A list of `Finding`s.
        columns: The keys that are printed, all by default. The first is folded and the
            last ones are left out where the terminal is narrow.
        note: A line to print below the rows.
    """

    def __init__(
        self,
        kind: Kind,
        rows: Sequence[Row],
        findings: Sequence[Finding] = (),
        columns: Sequence[str] = (),
        note: str = "",
    ):
        self.kind = kind
        self.rows = list(rows)
        self.findings = list(findings)
        self.note = note
        self.columns = list(columns or (self.rows[0] if self.rows else ()))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self) -> str:
        """The table as JSON text; nan and inf, for which JSON has no number, are null."""
        found = [finding._asdict() for finding in self.findings]
        content = json.dumps({"kind": self.kind, "rows": self.rows, "findings": found})
        return json.dumps(json.loads(content, parse_constant=lambda _: None), indent=1)

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`; pandas must be installed."""
        import pandas

        return pandas.DataFrame(self.rows)

    def plot(self, **options: Any) -> Any:
        """Draws the table and returns the Axes; matplotlib must be installed."""
        from keras_glorot import plots

        return plots.plot_table(self, **options)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    __repr__ = __str__  # so that a Python prompt shows the table

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), record=True, force_jupyter=False, width=120)
        console.print(self)
        code = '<pre style="white-space: pre; overflow-x: auto">{code}</pre>'
        return console.export_html(inline_styles=True, code_format=code)

    def __rich_console__(self, console, options) -> Iterator[Any]:
        # Names come from files of others.
        show = functools.partial(printable, encoding=options.encoding)
        found = {finding.path for finding in self.findings}  # these rows must be seen
        first = sorted(range(len(self)), key=lambda i: self.rows[i]["path"] not in found)
        rows = [self.rows[i] for i in sorted(first[:_ROWS_PRINTED])]
        grid, cells = Grid(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)), []
        space = options.max_width
        for i, key in enumerate(self.columns if rows else ()):
            column = [show(_cell(row[key])) for row in rows]
            space -= min(max(map(len, [key, *column])), 1000 if i else _PATH_WIDTH) + 2
            if i > 1 and space < 0:
                break
            text = any(isinstance(row[key], str | tuple) for row in rows)
            grid.add_column(key.replace("_", " "), no_wrap=i > 0, overflow="fold",
                            justify="left" if text else "right")  # fmt: skip
            cells.append(map(Text, column))
        for line in zip(*cells, strict=True):
            grid.add_row(*line)
        yield from [grid, ""] if rows else []
        if len(self) > len(rows):
            yield f"Showing {len(rows)} of {len(self)} rows; see `.rows` for all."
        yield from [Text(show(self.note))] if self.note else []
        # One line for all findings that ask for the same thing.
        groups: dict[tuple[str, ...], list[Finding]] = {}
        for finding in sorted(self.findings, key=lambda f: list(_STYLES).index(f.severity)):
            key = (finding.severity, finding.code, finding.advice)
            groups.setdefault(key, []).append(finding)
        for finding, *others in groups.values():
            where = finding.path + (f" and {len(others)} more" if others else "")
            text = f"[{finding.code}] {where}: {finding.message} {finding.advice}"
            line = " " + show(" ".join(text.split()))  # messages of Keras have line breaks
            yield Text(finding.severity, _STYLES[finding.severity]).append(line, "default")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escapes what a terminal can't show, or would obey instead of showing it."""
    shown = (
        sign if sign.isprintable() else sign.encode("unicode_escape").decode()
        for sign in text
    )
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)
