"""A table as text, as wide as the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Group as Lines
from rich.table import Table as Grid
from rich.text import Text

from keras_glorot.tables.findings import count
from keras_glorot.tables.view import View, cell, fold, printable

__all__ = ["not_shown", "to_text"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# As many lines of rows as fit on a screen with the findings above, but some rows at least.
_LINES, _ROWS = 24, 8
_INDENT = "  "  # of a name's lines after the first


def to_text(view: View, width: int, encoding: str) -> Lines:
    """The verdict, the findings and, as far as there is room, the rows."""
    return Lines(*_to_text(view, width, encoding))


def _to_text(view: View, width: int, encoding: str) -> Iterator[Any]:
    if view.verdict:
        yield Text(printable(view.verdict, encoding), "bold" if view.groups else "")
    for group in view.groups:
        severity, code, path = group.first[:3]
        name = "\n".join(fold(printable(path, encoding), width))
        line = f" [{code}] {name}{group.more}: {printable(group.text, encoding)}"
        yield Text(severity, _STYLES[severity]).append(line, "default")
    if view.rows and not view.is_brief:
        if view.verdict or view.groups:
            yield ""
        yield from _grid(view, width, encoding)


def _grid(view: View, width: int, encoding: str) -> Iterator[Any]:
    path, *others = view.columns
    headers = {key: key.replace("_", "\n") for key in view.columns}
    room = max(8, width // 2)
    names = {row[path]: printable(row[path], encoding) for row in view.rows}
    lines = sum(_folded(name, room).count("\n") + 1 for name in names.values())
    selected = view.select(max(_ROWS, _LINES * len(names) // lines))
    shown = [row for row in selected if not isinstance(row, int)]
    cells = {key: [cell(row[key], encoding) for row in shown] for key in others}
    room = min(room, max(cell_len(names[row[path]]) for row in shown))
    space = width - room - 1
    fitting = []
    for key in others:
        needed = max(map(cell_len, [*headers[key].split("\n"), *cells[key]])) + 2
        if needed <= space:
            fitting.append(key)
            space -= needed

    grid = Grid(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    height = max(headers[key].count("\n") for key in (path, *fitting))
    for key in (path, *fitting):
        header = "\n" * (height - headers[key].count("\n")) + headers[key]
        side = "right" if view.is_number(key) else "left"
        grid.add_column(header, justify=side, no_wrap=True)
    mark = "…" if "…".encode(encoding, "ignore") else "~"
    for row in selected:
        if isinstance(row, int):
            grid.add_row(Text(f"{mark} {row} rows", "dim"))
            continue
        style = _STYLES.get(view.severity(row), "")
        name = Text(_folded(names[row[path]], room + space), style)
        grid.add_row(name, *(Text(cell(row[key], encoding)) for key in fitting))
    yield grid
    absent = [key for key in others if key not in fitting]
    if line := not_shown(view, len(view.rows) - len(shown), absent):
        yield Text(line, "dim")


def _folded(name: str, width: int) -> str:
    if cell_len(name) <= width:
        return name
    return f"\n{_INDENT}".join(fold(name, width - len(_INDENT)))


def not_shown(view: View, rows: int = 0, columns: list[str] | None = None) -> str:
    """The rows and columns left out, in one line."""
    names = [key.replace("_", " ") for key in columns or ()]
    parts = [count(rows, "row")] if rows else []
    parts += [f"{count(view.others, 'row')} without a kernel"] if view.others else []
    parts += [f"columns {', '.join(names)}"] if names else []
    if not parts:
        return ""
    way = " `.show(all=True)` or `--all` shows all rows." if rows or view.others else ""
    return f"Not shown: {'; '.join(parts)}.{way}"
