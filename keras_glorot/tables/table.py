"""The table that `initialize`, `audit`, `propagate` and `calibrate` return."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import rich
from rich.console import Console, Group

from keras_glorot.tables.findings import Finding, are_remarks, count_severities
from keras_glorot.tables.html import to_html
from keras_glorot.tables.text import to_text
from keras_glorot.tables.view import Layout, Row, View

__all__ = ["Table"]


class Table:
    """Rows of numbers, with findings; it prints itself as wide as the terminal.

    It prints a verdict, the findings and the rows of kernels. If there are many rows, it
    prints those with findings, the first and the last. A sound `audit` prints one line.
    `show(all=True)` prints all rows. `len(table)` counts the rows, and a loop over the
    table gives them one by one.

    Attributes:
        kind: The name of the function that made it.
        rows: A list of dictionaries, all with the same keys; `"path"` is one of them.
        findings: A list of `Finding`s.
        columns: The keys that are printed, all by default. On a narrow terminal paths are
            folded at `/`. The last columns that do not fit are left out, and named below
            the table.
        note: The verdict's words beside the number of findings.
        layout: How to show the rows, which the function that made them knows.

    Example:

    >>> table = propagate(model, x)
    >>> table.kind, len(table), table.findings
    ('propagate', 5, [])
    >>> [row["path"] for row in table][:2]
    ['dense', 'dense_1']
    """

    def __init__(
        self,
        kind: str,
        rows: Sequence[Row],
        findings: Sequence[Finding] = (),
        columns: Sequence[str] = (),
        note: str = "",
        layout: Layout | None = None,
    ):
        self.kind = kind
        self.rows = list(rows)
        self.findings = list(findings)
        self.note = note
        self.layout = layout or Layout()
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
        picture = self.layout.picture
        rows = picture.select(self)
        if not rows:
            raise ValueError(
                "Argument `table` must come from `audit`, `propagate` or `calibrate`, with "
                "a std to draw. "
                f"Received: a table of kind {self.kind!r} with {len(self)} rows"
            )
        return picture.draw(self, rows, **options)

    def show(self, all: bool = False) -> None:
        """Prints the table; in a notebook, displays it.

        Args:
            all: Whether to show all rows, and not only those of kernels.
        """
        console = rich.get_console()
        view = View(self, all, console.encoding)
        if console.is_jupyter:
            from IPython.display import HTML, display

            display(HTML(to_html(view)))
        else:
            console.print(Group(*to_text(view, console.width)))

    @property
    def summary(self) -> str:
        """How many findings there are: `"audit: 1 error, 2 warnings"`."""
        is_sound = self.layout.can_be_sound and are_remarks(self.findings)
        words = [*(["sound"] if is_sound else []), *count_severities(self.findings)]
        return f"{self.kind}: {', '.join(words)}" if words and self.rows else ""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    __repr__ = __str__  # so that a Python prompt shows the table

    def _repr_html_(self) -> str:
        return to_html(View(self))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from to_text(View(self, encoding=options.encoding), options.max_width)
