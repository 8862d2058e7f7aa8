"""Files that appear whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(target: Path, argument: str, write: Callable[[Path], Any]) -> None:
    """Lets a function write a file, which then replaces the target.

    It is written into a new folder on the target's disk, which is removed in any case.

    Args:
        target: The file. Where it is a symbolic link, that stays one.
        argument: Where the user named the file, for errors.
        write: Writes the file of the path that it is given.

    Raises:
        ValueError: If the folder or the file can't be written.
    """
    real = Path(os.path.realpath(target))
    folder = real.parent / f".keras-glorot-{secrets.token_hex(8)}"
    draft = folder / f"draft{target.suffix}"
    try:
        folder.mkdir(0o700)
        write(draft)
        if real.exists():
            shutil.copymode(real, draft)
        os.replace(draft, real)
    except OSError as error:
        # Without the path that the error has: it is that of our own folder.
        reason = error.strerror or str(error)
        raise ValueError(
            f"{argument} must be a file that can be written. Received: {target} ({reason})"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
