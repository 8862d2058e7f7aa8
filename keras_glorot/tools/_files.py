"""Files that appear whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["drafted"]

Put = Callable[[Callable[[Path], Any]], None]


@contextlib.contextmanager
def drafted(target: Path, argument: str) -> Iterator[Put]:
    """Gives a function that lets another one write a file, which then replaces the target.

    It is written into a new folder on the target's disk, which is removed in any case. One
    that a killed process left there is removed, too.

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

    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with _explained(target, argument), _lock(real.parent) as is_locked:
            if is_locked:  # so that no folder is taken for a dead one before it is locked
                _remove_abandoned(real.parent)
            folder.mkdir(0o700)
            stack.enter_context(_lock(folder))
        yield put


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


@contextlib.contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the lock of a folder could be had, which goes with the process."""
    with contextlib.ExitStack() as stack:
        is_mine = False
        with contextlib.suppress(OSError):  # another one has it, or the disk has no locks
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                is_mine = True
        yield is_mine


def _remove_abandoned(parent: Path) -> None:
    for name in os.listdir(parent):
        if re.fullmatch(r"\.keras-glorot-[0-9a-f]{16}", name):
            with _lock(parent / name, wait=False) as is_abandoned:
                if is_abandoned:
                    shutil.rmtree(parent / name, ignore_errors=True)
