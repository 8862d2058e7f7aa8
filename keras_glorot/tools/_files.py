"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["drafted"]

Put = Callable[[Callable[[Path], Any]], None]


@contextlib.contextmanager
def drafted(target: Path, argument: str) -> Iterator[Put]:
    """Gives a function that lets another one write a file, which then replaces the target.

    It is written into a new folder on the target's disk, which is removed in any case.

    Args:
        target: The file. Where it is a symbolic link, that stays one.
        argument: Where the user named the file, for errors.

    Raises:
        ValueError: If the folder or the file can't be written.
    """
    real = Path(os.path.realpath(target))
    # Its name is known before it is there: a signal at any moment finds what to remove.
    folder = real.parent / f".keras-glorot-{secrets.token_hex(8)}"
    draft = folder / f"draft{target.suffix}"

    def put(write: Callable[[Path], Any]) -> None:
        with _explained(target, argument):
            write(draft)
            if real.exists():
                shutil.copymode(real, draft)
            os.replace(draft, real)

    try:
        with _explained(target, argument):
            folder.mkdir(0o700)
        yield put
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _explained(target: Path, argument: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Without the path that the error has: it is that of our own folder.
        reason = error.strerror or str(error)
        raise ValueError(
            f"{argument} must be a file that can be written. Received: {target} ({reason})"
        ) from None
