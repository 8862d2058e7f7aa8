"""A progress bar that can't disturb the work it shows."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from keras_glorot.arguments import check_choice

__all__ = ["Advance", "progress"]

Advance = Callable[..., None]


@contextlib.contextmanager
def progress(title: str, verbose: Literal["auto"] | bool = "auto") -> Iterator[Advance]:
    """Yields `advance(fraction, text)`, which sets what is done (0 to 1) and says what.

    `verbose="auto"`: on a terminal, after a second. Trouble while drawing, such as
    another live display that is open, ends the display and nothing else.
    """
    check_choice("verbose", verbose, ["auto", True, False])
    shown = Console().is_terminal if verbose == "auto" else bool(verbose)
    begin = time.monotonic() + (1.0 if verbose == "auto" else 0.0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
    )
    # Without a thread that redraws it, nothing can fail elsewhere.
    bar = Progress(*columns, TimeElapsedColumn(), transient=True, auto_refresh=False)

    def advance(fraction: float, text: str = "") -> None:
        if shown and time.monotonic() >= begin:
            with contextlib.suppress(Exception):  # drawing is never worth an error
                if not bar.tasks:
                    bar.start()
                    bar.add_task(title, total=1.0, text="")
                bar.update(bar.task_ids[0], completed=fraction, text=text, refresh=True)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            with contextlib.suppress(Exception):
                bar.stop()
