"""The table that `initialize`, `audit` and `propagate` return: rows, and what was found.

Text, HTML and the report show a `View`: what of the table is shown, and in which words.
"""

import html
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import rich
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

__all__ = [
    "Finding",
    "Row",
    "Severity",
    "Table",
    "View",
    "cell",
    "findings_html",
    "is_number",
    "printable",
    "shorten",
]

_SEVERITIES: list["Severity"] = ["error", "warning", "info"]  # the worst first
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# Of a table in text, what fits on a screen with the findings above it; HTML scrolls.
_TEXT_LINES, _HTML_LINES = 24, 200
# A path that is narrower than this can't be read; other columns are left out before.
_PATH_WIDTH = 28


Kind = Literal["initialize", "audit", "propagate", "calibrate"]
Row = dict[str, Any]
Severity = Literal["error", "warning", "info"]


class Finding(NamedTuple):
    """One remark about one row of a table: what is so, and what to do about it.

    Attributes:
        severity: `"error"`, `"warning"` or `"info"`.
        code: What kind of finding it is, such as `"std"`. The README lists all codes.
        path: The `"path"` of the row that it is about.
        message: One sentence that says what is so.
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
    """Findings that ask for the same thing: the first one speaks for all."""

    severity: Severity
    code: str
    path: str
    more: int
    text: str

    @property
    def others(self) -> str:
        return f" (and {self.more} like it)" if self.more else ""


class View(NamedTuple):
    """What is shown of a table.

    Attributes:
        verdict: The first line: how many findings, and the table's note.
        groups: The findings, the worst first.
        columns: Keys of the rows, the path first; without those that hold nothing.
        rows: The rows; a number stands for that many rows that are left out there.
        others: How many rows without a kernel are left out.
        severities: By path, the worst severity that was found.
        is_sound: Whether the rows of the table tell nothing that the verdict does not.
    """

    verdict: str
    groups: list[Group]
    columns: list[str]
    rows: list[Row | int]
    others: int
    severities: dict[str, Severity]
    is_sound: bool

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from _to_text(self, options.max_width, options.encoding)

    def _repr_html_(self) -> str:
        return _to_html(self)

    @property
    def shown(self) -> list[Row]:
        return [row for row in self.rows if not isinstance(row, int)]


class Table:
    """Rows of numbers, with findings; it prints itself as wide as the terminal.

    It prints a verdict, the findings and the rows of kernels. If there are many rows, it
    prints those with findings, the first and the last. A sound `audit` prints one line.
    `show(all=True)` prints all rows. `len(table)` counts the rows, and a loop over the
    table gives them one by one.

    Attributes:
        kind: The name of the function that made it: what the rows hold.
        rows: A list of dictionaries, all with the same keys; `"path"` is one of them.
        findings: A list of `Finding`s.
        columns: The keys that are printed, all by default. On a narrow terminal paths are
            shortened in the middle. The last columns that do not fit are left out, and
            named below the table.
        note: What the verdict says beside the number of findings.

    Example:

    >>> table = propagate(model, x)
    >>> table.kind, len(table), table.findings
    ('propagate', 5, [])
    >>> [row["path"] for row in table][:2]
    ['dense', 'dense_1']
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
        for row in self.rows:
            if "path" not in row:
                raise ValueError(
                    'Argument `rows` must hold dictionaries with the key "path". '
                    f"Received: a row {row}"
                )
        self.findings = list(findings)
        self.note = note
        self.columns = list(columns or (self.rows[0] if self.rows else ()))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self) -> str:
        """Kind, rows and findings as JSON text, with null for nan and inf."""
        found = [finding._asdict() for finding in self.findings]
        content = json.dumps({"kind": self.kind, "rows": self.rows, "findings": found})
        return json.dumps(json.loads(content, parse_constant=lambda _: None), indent=1)

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`; an `ImportError` if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise ImportError("`to_pandas` needs pandas: `pip install pandas`.") from None
        return pandas.DataFrame(self.rows)

    def plot(self, **options: Any) -> Any:
        """Draws a table of `audit`, `propagate` or `calibrate`.

        Of an `audit`, each kernel's std over the expected one; of the others, the stds of
        signal and gradient by depth.

        Args:
            **options: `ax`, the matplotlib `Axes` to draw on. Defaults to a new figure's.

        Returns:
            The `Axes`.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If the table holds no std to draw; that of `initialize` never does.
        """
        from keras_glorot import plots

        return plots.plot_table(self, **options)

    def show(self, all: bool = False) -> None:
        """Prints the table; in a notebook, displays it.

        Args:
            all: Whether to show all rows, and not only those of kernels.
        """
        if rich.get_console().is_jupyter:
            from IPython.display import display

            display(self.view(all, _HTML_LINES))
        else:
            rich.print(self.view(all))

    def view(self, all: bool = False, lines: int = _TEXT_LINES) -> View:
        """What is shown of the table.

        Args:
            all: Whether to show all rows, and not only those of kernels.
            lines: How many lines the rows may take. Ignored if all are to be shown.
        """
        ranks = _ranks(self.findings)
        candidates = [
            row
            for row in self.rows
            if all or _has_kernel(row) or row["path"] in ranks or self._is_total(row)
        ] or self.rows
        limit = len(candidates) if all else lines
        order = [
            (-1 if self._is_total(row) else ranks.get(row["path"], len(_STYLES)))
            for row in candidates
        ]
        kept = _select(order, limit)
        columns = [key for key in self.columns if _holds_something(key, candidates)]
        return View(
            self._verdict,
            _grouped(self.findings),
            columns,
            _with_gaps(candidates, kept),
            len(self.rows) - len(candidates),
            {path: _SEVERITIES[rank] for path, rank in ranks.items()},
            self._is_sound and self.kind == "audit" and not all,
        )

    def _is_total(self, row: Row) -> bool:
        """Whether a row is about the whole model."""
        return self.kind == "propagate" and row is self.rows[-1]

    @property
    def summary(self) -> str:
        """How many findings there are: `"audit: 1 error, 2 warnings"`."""
        counts = Counter(finding.severity for finding in self.findings)
        names = {"error": "error", "warning": "warning", "info": "remark"}
        can_be_sound = self.kind in ("audit", "propagate")
        words = ["sound"] if can_be_sound and self._is_sound else []
        words += [_count(counts[key], name) for key, name in names.items() if counts[key]]
        return f"{self.kind}: {', '.join(words)}" if words and self.rows else ""

    @property
    def _is_sound(self) -> bool:
        return all(finding.severity == "info" for finding in self.findings)

    @property
    def _verdict(self) -> str:
        return f"{self.summary}. {self.note}".strip() if self.summary else self.note

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    __repr__ = __str__  # so that a Python prompt shows the table

    def _repr_html_(self) -> str:
        return _to_html(self.view(lines=_HTML_LINES))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield self.view()


# ---- What is shown ----------------------------------------------------------------------


def _ranks(findings: Iterable[Finding]) -> dict[str, int]:
    """By path, the rank of its worst finding."""
    ranks: dict[str, int] = {}
    for finding in findings:
        rank = _SEVERITIES.index(finding.severity)
        ranks[finding.path] = min(rank, ranks.get(finding.path, rank))
    return ranks


def _has_kernel(row: Row) -> bool:
    keys = ("fan_in", "kernel_gradient_std")
    return any(row.get(key) is not None for key in keys)


def _holds_something(key: str, rows: list[Row]) -> bool:
    return any(row[key] is not None for row in rows)


def _select(order: list[int], lines: int) -> list[int]:
    """Positions to show: by rank, then from both ends, until the lines are full."""
    count = len(order)
    if count <= lines:
        return list(range(count))
    by_precedence = sorted(range(count), key=lambda i: (order[i], min(i, count - 1 - i)))
    kept: list[int] = []
    for position in by_precedence:
        candidate = sorted([*kept, position])
        if len(candidate) + sum(1 for _ in _gaps(candidate, count)) > lines:
            break
        kept = candidate
    return kept


def _gaps(kept: list[int], count: int) -> Iterator[tuple[int, int]]:
    """Start and length of each run of positions that are left out."""
    for before, after in zip([-1, *kept], [*kept, count], strict=True):
        if after - before > 1:
            yield before + 1, after - before - 1


def _with_gaps(rows: list[Row], kept: list[int]) -> list[Row | int]:
    shown: dict[int, Row | int] = {position: rows[position] for position in kept}
    for start, length in _gaps(kept, len(rows)):
        # A mark for one row would take the place of the row.
        shown[start] = length if length > 1 else rows[start]
    return [shown[position] for position in sorted(shown)]


def _grouped(findings: Iterable[Finding]) -> list[Group]:
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in sorted(findings, key=lambda each: _SEVERITIES.index(each.severity)):
        key = (finding.severity, finding.code, finding.advice)
        groups.setdefault(key, []).append(finding)
    return [
        Group(first.severity, first.code, first.path, len(others), text)
        for first, *others in groups.values()
        # Messages of Keras have line breaks.
        for text in [" ".join(f"{first.message} {first.advice}".split())]
    ]


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def cell(value: Any, encoding: str = "utf-8") -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value), encoding)


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escapes what a terminal can't show, or would obey instead of showing it."""
    shown = (
        sign if sign.isprintable() else sign.encode("unicode_escape").decode()
        for sign in text
    )
    return "".join(shown).encode(encoding, "backslashreplace").decode(encoding)


def shorten(paths: Sequence[str], width: int, encoding: str = "utf-8") -> list[str]:
    """Shortens paths in the middle: `encoder/…/depthwise/kernel`.

    What tells a path from the others stays, as far as the width allows.
    """
    paths = [printable(path, encoding) for path in paths]
    mark = _mark(encoding)
    options = {path: list(dict.fromkeys(_shortened(path, width, mark))) for path in paths}
    counts = Counter(option for each in options.values() for option in each)
    chosen = {
        path: next((option for option in each if counts[option] == 1), each[0])
        for path, each in options.items()
    }
    return [chosen[path] for path in paths]


def _mark(encoding: str) -> str:
    """What stands for what is left out."""
    return "…" if "…".encode(encoding, "ignore") else "~"


def _shortened(path: str, width: int, mark: str) -> Iterator[str]:
    """Ways to shorten a path, the best ones first."""
    if _width(path) <= width:
        yield path
        return
    parts = path.split("/")
    ways = list(_leave_out(parts, mark))
    for kept in ways:
        text = "/".join(kept)
        if _width(text) <= width:
            yield text
    for last_is_whole in (True, False):
        for kept in [parts, *ways]:
            yield from _crop_names(kept, width, mark, last_is_whole)
    yield from _crop_middle(path, width, mark)


def _leave_out(parts: list[str], mark: str) -> Iterator[list[str]]:
    """The parts without some that stand between: `encoder/…/depthwise/kernel`."""
    # The layer and its variable say most, then the outermost layer, then as much as fits.
    end = len(parts) - 1
    cuts = [
        (start, stop)
        for start in range(end)
        for stop in range(start + 1, end + 1)
        if start or stop < end
    ]
    cuts.sort(key=lambda cut: (cut[1] == end, cut[0] == 0, cut[1] - cut[0]))
    for start, stop in cuts:
        yield [*parts[:start], mark, *parts[stop:]]
    for i in range(1, end - 2):
        yield [mark, parts[i], mark, *parts[-2:]]


# A name that is cut to less than this says nothing.
_NAME_WIDTH = 7


def _crop_names(
    parts: list[str], width: int, mark: str, last_is_whole: bool
) -> Iterator[str]:
    """Cuts inside each long name: `enco…block_1/proj…convolution/kernel`."""
    space, widths = width - len(parts) + 1, [_width(part) for part in parts]
    order = sorted(range(len(parts)), key=widths.__getitem__)
    if last_is_whole:
        order.remove(len(parts) - 1)
        space -= widths[-1]
        if space < 0:
            return
    # Short names leave room to the long ones, which share it.
    for place, i in enumerate(order):
        share = space // (len(order) - place)
        if widths[i] > share < _NAME_WIDTH:
            return
        widths[i] = min(widths[i], share)
        space -= widths[i]
    # First where a third is left of the mark: numbers stand at the end.
    for sixths in (2, 3, 1, 4, 0, 5):
        yield "/".join(
            part
            if _width(part) <= limit
            else _cut(part, limit, (limit - 1) * sixths // 6, mark)
            for part, limit in zip(parts, widths, strict=True)
        )


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _crop_middle(path: str, width: int, mark: str) -> Iterator[str]:
    """Cuts the path at any place; first where a third is left of the mark."""
    space = max(0, width - 1)
    for head in sorted(range(space + 1), key=lambda head: abs(3 * head - space)):
        yield _cut(path, width, head, mark)


def _cut(text: str, width: int, head: int, mark: str) -> str:
    """A text of this width, of which `head` is left of the mark."""
    tail = max(0, width - 1 - head)
    return _crop(text, head) + mark + _crop(text[::-1], tail)[::-1]


def _crop(text: str, width: int) -> str:
    while _width(text) > width:
        text = text[:width] if len(text) > width else text[:-1]
    return text


# ---- Text -------------------------------------------------------------------------------


def _to_text(view: View, width: int, encoding: str) -> Iterator[Any]:
    if view.verdict:
        yield Text(printable(view.verdict, encoding), "bold" if view.groups else "")
    longest = max(_PATH_WIDTH, width // 2)
    named = [group.path for group in view.groups]
    # Told from the rows too.
    paths = shorten([*named, *(row["path"] for row in view.shown)], longest, encoding)
    for group, path in zip(view.groups, paths, strict=False):
        text = printable(group.text, encoding)
        line = f" [{group.code}] {path}{group.others}: {text}"
        yield Text(group.severity, _STYLES[group.severity]).append(line, "default")
    if view.shown and not view.is_sound:
        if view.verdict or view.groups:
            yield ""
        yield from _grid(view, width, encoding)


def _grid(view: View, width: int, encoding: str) -> Iterator[Any]:
    path, *others = view.columns
    whole = [printable(row[path], encoding) for row in view.shown]
    cells = {key: [cell(row[key], encoding) for row in view.shown] for key in others}
    headers = {key: key.replace("_", "\n") for key in view.columns}
    longest = max(map(cell_len, whole))
    path_width = min(longest, _PATH_WIDTH, max(8, width // 2))
    space = width - path_width - 1
    fitting = []
    for key in others:
        needed = max(map(cell_len, [*headers[key].split("\n"), *cells[key]])) + 2
        if needed <= space:
            fitting.append(key)
            space -= needed
    paths = iter(shorten(whole, path_width + space, encoding))
    lines = zip(*(cells[key] for key in fitting), strict=True)

    grid = Grid(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    grid.add_column(headers[path], no_wrap=True, vertical="bottom")
    for key in fitting:
        side = "right" if is_number(key, view.shown) else "left"
        grid.add_column(headers[key], justify=side, no_wrap=True, vertical="bottom")
    for row in view.rows:
        if isinstance(row, int):
            grid.add_row(Text(f"{_mark(encoding)} {row} rows", "dim"))
            continue
        severity = view.severities.get(row[path])
        name = Text(next(paths), _STYLES[severity] if severity else "")
        grid.add_row(name, *map(Text, next(lines, ())))
    yield grid
    yield from _left_out(view, [key for key in others if key not in fitting])


def _left_out(view: View, columns: list[str]) -> Iterator[Text]:
    """What the grid does not show, in one line."""
    names = [key.replace("_", " ") for key in columns]
    rows = sum(row for row in view.rows if isinstance(row, int))
    parts = [_count(rows, "row")] if rows else []
    parts += [f"{_count(view.others, 'row')} without a kernel"] if view.others else []
    parts += [f"columns {', '.join(names)}"] if names else []
    if parts:
        way = " `.show(all=True)` or `--all` shows all rows." if rows or view.others else ""
        yield Text(f"Not shown: {'; '.join(parts)}.{way}", "dim")


def is_number(key: str, rows: list[Row]) -> bool:
    """Whether all of a column are numbers, or nothing."""
    values = [row.get(key, "") for row in rows]
    return all(isinstance(value, int | float | None) for value in values)


# ---- HTML -------------------------------------------------------------------------------

# Only colors of the page, so that light and dark themes both are right.
STYLE = """\
.keras-glorot { max-width: 100%; }
.keras-glorot ul { list-style: none; margin: 0.5em 0; padding: 0; }
.keras-glorot .scroll { max-height: 32em; overflow: auto; }
.keras-glorot table { border-collapse: collapse; color: inherit; font-size: 90%; }
.keras-glorot th, .keras-glorot td { padding: 0.2em 0.6em; vertical-align: top;
  text-align: left; border-bottom: 1px solid rgba(128, 128, 128, 0.4); }
.keras-glorot td:first-child { min-width: 12em; }
.keras-glorot .number { text-align: right; font-variant-numeric: tabular-nums; }
.keras-glorot th button { all: unset; cursor: pointer; font-weight: bold; }
.keras-glorot th button:focus-visible { outline: 2px solid; }
.keras-glorot th[aria-sort=ascending] button::after { content: " ▲"; }
.keras-glorot th[aria-sort=descending] button::after { content: " ▼"; }
.keras-glorot li, .keras-glorot td:first-child { border-left: 0.25em solid transparent;
  padding-left: 0.5em; overflow-wrap: anywhere; }
.keras-glorot .error { border-left-color: #d13438; }
.keras-glorot .warning { border-left-color: #e8a33d; }
.keras-glorot .info { border-left-color: #2a6fbb; }
"""

# Marks of rows that are left out, which have no number, come last in either order.
_SORT = """\
const head = event.target.closest("th"), body = head.closest("table").tBodies[0];
const falling = head.ariaSort === "ascending", at = head.cellIndex;
for (const other of head.parentNode.cells) other.ariaSort = null;
head.ariaSort = falling ? "descending" : "ascending";
const key = (row) => row.cells[at]?.dataset.value ?? row.cells[at]?.textContent ?? "";
const compare = (a, b) => (a - b) || a.localeCompare(b, undefined, {numeric: true});
const last = (row) => Number(key(row) === "" || row.cells.length === 1);
const rows = [...body.rows].sort((a, b) => last(a) - last(b)
  || (falling ? -1 : 1) * compare(key(a), key(b)));
body.append(...rows);
"""


def _to_html(view: View) -> str:
    parts = [f"<p><strong>{html.escape(printable(view.verdict))}</strong></p>"]
    parts.append(findings_html(view.groups))
    if view.shown:
        rows = "".join(_row_html(row, view) for row in view.rows)
        heads = "".join(_head_html(key, view) for key in view.columns)
        notes = "".join(f"<p>{html.escape(str(line))}</p>" for line in _left_out(view, []))
        parts.append(
            f"<details{'' if view.is_sound else ' open'}>"
            f"<summary>{_count(len(view.shown), 'row')}</summary>"
            f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>{notes}</details>"
        )
    return f'<style>{STYLE}</style><div class="keras-glorot">{"".join(parts)}</div>'


def findings_html(groups: list[Group]) -> str:
    """The findings as a list."""
    items = [
        f'<li class="{group.severity}"><strong>{group.severity}</strong> [{group.code}] '
        f"{_path_html(group.path)}{group.others}: {html.escape(printable(group.text))}</li>"
        for group in groups
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _path_html(path: str) -> str:
    return f"<code>{html.escape(printable(path)).replace('/', '/<wbr>')}</code>"


def _head_html(key: str, view: View) -> str:
    style = ' class="number"' if is_number(key, view.shown) else ""
    name = key.replace("_", " ")
    script = html.escape(_SORT)
    return f'<th{style}><button onclick="{script}">{name}</button></th>'


def _row_html(row: Row | int, view: View) -> str:
    if isinstance(row, int):
        return f'<tr><td colspan="{len(view.columns)}">… {row} rows</td></tr>'
    path, *others = view.columns
    severity = view.severities.get(row[path], "")
    cells = [f'<td class="{severity}">{_path_html(row[path])}</td>']
    for key in others:
        value = html.escape(cell(row[key]))
        is_number = isinstance(row[key], int | float)
        style = f' class="number" data-value="{row[key]}"' if is_number else ""
        cells.append(f"<td{style}>{value}</td>")
    return f"<tr>{''.join(cells)}</tr>"
