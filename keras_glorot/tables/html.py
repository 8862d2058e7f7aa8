"""A table as HTML, in a notebook and in the report: to sort, to filter and to copy from."""

import re
from html import escape

from keras_glorot.tables.findings import Group, count
from keras_glorot.tables.text import not_shown
from keras_glorot.tables.view import Row, View, printable

__all__ = ["STYLE", "findings_html", "rows_html", "to_html"]

# So many rows are shown at first; among fewer than these nobody needs a filter.
_FIRST_ROWS, _FILTERED_ROWS = 200, 10

# Only colors of the page, so that light and dark themes both are right.
STYLE = """\
.keras-glorot { max-width: 100%; }
.keras-glorot ul { list-style: none; margin: 0.5em 0; padding: 0; }
.keras-glorot .scroll { max-height: 32em; overflow: auto; }
.keras-glorot table { border-collapse: collapse; color: inherit; font-size: 90%; }
.keras-glorot th, .keras-glorot td { padding: 0.2em 0.6em; vertical-align: top;
  text-align: left; border-bottom: 1px solid rgba(128, 128, 128, 0.4); }
.keras-glorot td + td { white-space: nowrap; }
.keras-glorot .more { display: none; }
.keras-glorot .number { text-align: right; font-variant-numeric: tabular-nums; }
.keras-glorot input, .keras-glorot .all { font: inherit; color: inherit; max-width: 12em;
  background: none; border: 1px solid rgba(128, 128, 128, 0.8); margin: 0.25em 0; }
.keras-glorot th button { all: unset; cursor: pointer; font-weight: bold; }
.keras-glorot th button:focus-visible { outline: 2px solid; }
.keras-glorot th[aria-sort=ascending] button::after { content: " ▲"; }
.keras-glorot th[aria-sort=descending] button::after { content: " ▼"; }
.keras-glorot :where(li, td:first-child) { border-left: 0.25em solid transparent;
  min-width: 12em; padding-left: 0.5em; overflow-wrap: anywhere; }
.keras-glorot .error { border-left-color: #d13438; }
.keras-glorot .warning { border-left-color: #e8a33d; }
.keras-glorot .info { border-left-color: #2a6fbb; }
"""

# Runs on a click, and on each letter of the filter. Empty cells, and words in a column of
# numbers, come last in either order.
_SCRIPT = """\
const body = this.querySelector("tbody"), rows = [...body.rows];
const head = event.target.closest("th"), input = this.querySelector("input");
if (head) {
  const falling = head.ariaSort === "ascending", at = head.cellIndex;
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = falling ? "descending" : "ascending";
  const last = (text) => text === "" || (head.className === "number" && isNaN(text));
  const words = new Intl.Collator(undefined, {numeric: true});
  const compare = (a, b) => last(a) - last(b)
    || (falling ? -1 : 1) * ((a - b) || words.compare(a, b));
  const keys = new Map(rows.map((row) => [row, row.cells[at].textContent]));
  body.append(...rows.sort((one, other) => compare(keys.get(one), keys.get(other))));
} else if (event.target.className === "all") event.target.remove();
else if (event.target !== input) return;
const wanted = (input?.value ?? "").toLowerCase().split(" ");
const limit = this.querySelector(".all")?.value ?? Infinity;
let shown = 0;
for (const row of [...body.rows]) {
  const text = row.textContent.toLowerCase();
  row.hidden = shown >= limit || !wanted.every((word) => text.includes(word));
  row.removeAttribute("class");
  shown += !row.hidden;
}
const part = shown < rows.length ? `${shown} of ` : "";
if (input) this.querySelector("output").value = `${part}${rows.length} rows`;
"""


def to_html(view: View) -> str:
    """The verdict, the findings and the rows, with their style."""
    verdict = f"<p><strong>{escape(printable(view.verdict))}</strong></p>"
    parts = [verdict, findings_html(view.groups), rows_html(view)]
    return f'<style>{STYLE}</style><div class="keras-glorot">{"".join(parts)}</div>'


def findings_html(groups: list[Group]) -> str:
    """The findings as a list."""
    items = [
        f'<li class="{severity}"><strong>{severity}</strong> [{code}] '
        f"{_name_html(path)}{group.more}: {escape(printable(group.text))}</li>"
        for group in groups
        for severity, code, path, *_ in [group.first]
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def rows_html(view: View) -> str:
    """The rows as a table. Where no script may run, all of them are shown."""
    rows, total = view.rows, len(view.rows)
    if not rows:
        return ""
    shown = min(total, _FIRST_ROWS)
    if shown < total or not view.layout.is_sequence:
        rows = sorted(rows, key=view.rank)
    path, *others = view.columns
    ours = [key for key in ("number", "finding") if any(row[key] for row in rows)]
    styles = {
        key: ' class="number"' if view.is_number(key) else ""
        for key in (path, *ours, *others)
    }
    heads = "".join(
        f"<th{style}><button>{key.replace('_', ' ')}</button></th>"
        for key, style in styles.items()
    )
    more = ' class="more"'
    body = "".join(
        f"<tr{'' if i < shown else more}>{_cells_html(row, styles, view)}</tr>"
        for i, row in enumerate(rows)
    )
    part, search, button = "", "", ""
    if total > _FILTERED_ROWS:
        act = "this.closest('details').onclick(event)"
        search = f'<label>Filter rows: <input type="search" oninput="{act}"></label>'
    if shown < total:
        part = f"{shown} of "
        button = f'<button class="all" value="{shown}">Show all rows</button>'
    return (
        f'<details{"" if view.is_brief else " open"} onclick="{escape(_SCRIPT)}">'
        f"<summary><output>{part}{count(total, 'row')}</output></summary>{search}"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{view.kind}: rows">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{button}<p>{not_shown(view)}</p></details>"
    )


def _cells_html(row: Row, styles: dict[str, str], view: View) -> str:
    path, *others = styles
    name = f'<td class="{view.severity(row)}">{_name_html(row[path])}</td>'
    cells = (f"<td{styles[key]}>{escape(view.text(row[key]))}</td>" for key in others)
    return name + "".join(cells)


def _name_html(name: str) -> str:
    """A whole name, which is folded after `/` or `_` where it is too long for its line."""
    folded = re.sub("([/_])", r"\1<wbr>", escape(printable(name)))
    return f"<code>{folded}</code>"
