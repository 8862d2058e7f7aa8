"""A table as text, as wide as the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table as Grid
from rich.text import Text

from keras_glorot.tables.findings import count
from keras_glorot.tables.view import View, fold

__all__ = ["not_shown", "to_text"]

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# As many lines of rows as fit on a screen with the findings above, but some rows at least.
_LINES, _ROWS = 24, 8
_INDENT = "  "  # of a name's lines after the first


def to_text(view: View, width: int) -> Iterator[Any]:
    """The verdict, the findings and, as far as there is room, the rows."""
    if view.verdict:
        yield Text(view.text(view.verdict), "bold" if view.groups else "")
    for group in view.groups:
        severity, code, path = group.first[:3]
        name = "\n".join(fold(view.text(path), width))
        line = f" [{code}] {name}{group.more}: {view.text(group.text)}"
        yield Text(severity, _STYLES[severity]).append(line, "default")
    if view.rows and not view.is_brief:
        if view.verdict or view.groups:
            yield ""
        yield from _rows_text(view, width)


def _rows_text(view: View, width: int) -> Iterator[Any]:
    path, *others = view.columns
    names = {row[path]: view.text(row[path]) for row in view.rows}
    room = max(8, width // 2)
    lines = sum(1 + _folded(name, room).count("\n") for name in names.values())
    rows = view.select(max(_ROWS, _LINES * len(names) // lines))
    shown = [row for row in rows if not isinstance(row, int)]
    room = min(room, max(cell_len(names[row[path]]) for row in shown))
    space = width - 1
    fitting = []
    for key in others:
        lines = [*key.split("_"), *(view.text(row[key]) for row in shown)]
        needed = max(map(cell_len, lines)) + 2
        if needed <= space - room:
            fitting.append(key)
            space -= needed

    grid = Grid(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for key in (path, *fitting):
        side = "right" if view.is_number(key) else "left"
        grid.add_column(key.replace("_", "\n"), justify=side, no_wrap=True)
    mark = "…" if view.text("…") == "…" else "~"
    for row in rows:
        if isinstance(row, int):
            grid.add_row(Text(f"{mark} {row} rows", "dim"))
            continue
        name = Text(_folded(names[row[path]], space), _STYLES.get(view.severity(row), ""))
        grid.add_row(name, *(Text(view.text(row[key])) for key in fitting))
    yield grid
    absent = [key for key in others if key not in fitting]
    if line := not_shown(view, len(view.rows) - len(shown), absent):
        yield Text(line, "dim")


def _folded(name: str, width: int) -> str:
    if cell_len(name) <= width:
        return name
    return f"\n{_INDENT}".join(fold(name, width - len(_INDENT)))


def not_shown(view: View, rows: int = 0, columns: Sequence[str] = ()) -> str:
    """The rows and columns left out, in one line."""
    parts = [count(rows, "row")] if rows else []
    parts += [f"{count(view.others, 'row')} without a kernel"] if view.others else []
    parts += [f"columns {', '.join(columns).replace('_', ' ')}"] if columns else []
    if not parts:
        return ""
    way = " `.show(all=True)` or `--all` shows all rows." if rows or view.others else ""
    return f"Not shown: {'; '.join(parts)}.{way}"
