"""Files and folders that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD = ".old"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is whole.

    What was written is removed again if anything fails, as on a full disk.
    """
    aside = path.with_name(f"{path.name}.new")
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def _sync(path: Path) -> None:
    """Have a file on the disk, else a power cut may leave its name and nothing in it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def try_writing(path: Path, size_bytes: int) -> None:
    """Write a file of so many bytes and remove it again. Raises OSError where there is no room."""
    try:
        path.write_bytes(bytes(size_bytes))
    finally:
        path.unlink(missing_ok=True)


def replace_folder(folder: Path, by: Path) -> None:
    """Put a folder in the place of another, if there is one.

    Raises OSError, and the old one is still there. A crash may leave it under another name until
    `restore_folder` is called.
    """
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        by.rename(folder)
    except OSError:
        restore_folder(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Bring back what a crash in `replace_folder` left under another name."""
    old = folder.with_name(folder.name + OLD)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
