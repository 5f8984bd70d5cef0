from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from argus.config import Settings
from tests.server.running import Running, running

Serve = Callable[..., Running]


@pytest.fixture
def serve(measured_family: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts a server of two workers whose promise is generous, so that only faults break it."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Running:
            given: dict[str, Any] = {
                "family": str(measured_family),
                "data": tmp_path,
                "slo": {"default": {"latency": "120s"}},
                "workers": 2,
                "truth_share": 0.0,
            }
            return stack.enter_context(running(Settings(**(given | settings))))

        yield start


class Disk:
    """A small disk that can be full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "filling").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self.folder / "filling").unlink()


class ToldFull(Disk):
    """A disk that says it is full once it is told to, for pictures and latents, after it has
    written half of what it was to write."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self._full = False
        write_bytes, pipe_file = Path.write_bytes, LocalFileSystem.pipe_file

        def write(path: Path, data: bytes) -> int:
            return int(self._some(path, data, lambda given: write_bytes(path, given)))

        def pipe(files: LocalFileSystem, path: str, data: bytes) -> None:
            self._some(Path(path), data, lambda given: pipe_file(files, path, given))

        monkeypatch.setattr(Path, "write_bytes", write)
        monkeypatch.setattr(LocalFileSystem, "pipe_file", pipe)

    def _some(self, path: Path, data: bytes, write: Callable[[bytes], Any]) -> Any:
        if not self._full or not path.is_relative_to(self.folder):
            return write(data)
        write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fill(self) -> None:
        self._full = True

    def free(self) -> None:
        self._full = False


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk of 8 MB where one may be mounted, else one that is told when it is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield ToldFull(folder, monkeypatch)
        return
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
