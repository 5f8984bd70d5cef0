"""Writes files and folders so that they are whole or absent, even after a crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLD = ".old"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields the path to write a file to, which is renamed to `path` once it is whole.

    If anything fails, such as on a full disk, the file is removed.
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
    """Flush a file to the disk: otherwise a power cut may leave it empty."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def try_writing(path: Path, size_bytes: int) -> None:
    """Write a file of `size_bytes` and remove it. Raises OSError if there is no room."""
    try:
        path.write_bytes(bytes(size_bytes))
    finally:
        path.unlink(missing_ok=True)


def replace_folder(folder: Path, by: Path) -> None:
    """Rename the folder `by` to `folder`, and remove the old `folder` if there is one.

    If it raises OSError, the old folder is still there. A crash may leave the old folder under
    another name until `restore_folder` is called.
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
    """Rename back a folder that a crash in `replace_folder` left under another name."""
    old = folder.with_name(folder.name + OLD)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
