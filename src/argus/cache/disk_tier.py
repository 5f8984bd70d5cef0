"""A bounded folder of latents objects, in front of a store that is further away."""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from argus.core.errors import named

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
UNFINISHED = ".new"
MOST_WAITING = 32  # objects in memory that are not written yet
ROOM = 0.1  # share of the tier that is given back when its disk is full


class DiskTier:
    """Objects by name, `limit_bytes` in all; the least recently used go first, also after a
    restart. For one process; threads may share it.

    Objects are written by a thread of the tier's own; while it is behind, more are not taken. The
    caller checks the hash of what it gets, so that nothing is flushed. The disk's errors are
    logged, once, and never raised after the start: the store has every object.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Raises OSError if the folder cannot be used."""
        self._folder, self._limit = folder, limit_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._bytes = 0
        self._lock = threading.Lock()
        self._failing = False
        self._waiting: queue.Queue[tuple[str, bytes]] = queue.Queue(MOST_WAITING)
        folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        threading.Thread(target=self._write_all, name="cache-disk", daemon=True).start()

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def get(self, name: str) -> bytes | None:
        """An object, or None if it is not here."""
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        path = self._folder / name
        try:
            data = path.read_bytes()
            os.utime(path)  # the order after a restart
        except OSError:
            self.delete(name)
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Take an object, without waiting for the disk."""
        with suppress(queue.Full):
            self._waiting.put_nowait((name, data))

    def delete(self, name: str) -> None:
        with self._lock:
            self._bytes -= self._sizes.pop(name, 0)
        with suppress(OSError):
            (self._folder / name).unlink()

    def keep_only(self, names: Collection[str]) -> None:
        """Delete all other objects."""
        with self._lock:
            others = [name for name in self._sizes if name not in names]
        for name in others:
            self.delete(name)

    def settle(self) -> None:
        """Wait until what was put is written."""
        self._waiting.join()

    def _restore(self) -> None:
        found = []
        for one in os.scandir(self._folder):
            if one.name.endswith(UNFINISHED):
                Path(one).unlink(missing_ok=True)
            elif one.is_file():
                about = one.stat()
                found.append((about.st_mtime, one.name, about.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self._bytes += size
        self._trim(self._limit)

    def _write_all(self) -> None:
        while True:
            name, data = self._waiting.get()
            try:
                self._write(name, data)
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("%s takes no latents for now: %s", self._folder, named(error))
                self._failing = True
                if error.errno in FULL:
                    self._trim(self._bytes * (1 - ROOM))
            finally:
                self._waiting.task_done()

    def _write(self, name: str, data: bytes) -> None:
        if len(data) > self._limit or name in self._sizes:
            return
        self._trim(self._limit - len(data))
        path = self._folder / name
        aside = self._folder / f"{name}{UNFINISHED}"
        try:
            aside.write_bytes(data)
            aside.replace(path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        with self._lock:
            self._sizes[name] = len(data)
            self._bytes += len(data)

    def _trim(self, limit_bytes: float) -> None:
        """Delete objects until at most so many bytes are left."""
        while self._bytes > limit_bytes:
            with self._lock:
                name = next(iter(self._sizes), None)
            if name is None:
                return
            self.delete(name)
