"""A progress bar that can't disturb the work it shows."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["progress"]

Advance = Callable[[float, str], None]


@contextlib.contextmanager
def progress(title: str, verbose: Literal["auto"] | bool = "auto") -> Iterator[Advance]:
    """Yields `advance(fraction, text)`, which sets what is done (0 to 1) and says what.

    `verbose="auto"`: on a terminal, after a second. What goes wrong while drawing, such as
    another live display that is open, ends the display and nothing else.
    """
    wait = 1.0 if verbose == "auto" else 0.0
    shown = Console().is_terminal if verbose == "auto" else bool(verbose)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
    )
    bar = Progress(*columns, TimeElapsedColumn(), transient=True)
    task = bar.add_task(title, total=1.0, text="")
    begin = time.monotonic()

    def advance(fraction: float, text: str = "") -> None:
        nonlocal shown
        if not shown or time.monotonic() - begin < wait:
            return
        try:
            if not bar.live.is_started:
                bar.start()
            bar.update(task, completed=fraction, text=text)
        except Exception:  # drawing is never worth an error
            shown = False

    try:
        yield advance
    finally:
        # A bar that was not started would still print an empty line.
        with contextlib.suppress(Exception):
            if bar.live.is_started:
                bar.stop()
