"""The lock that lets at most one server use a data folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from argus.core.errors import BadRequest, InUse

log = logging.getLogger(__name__)

NAME = "server.lock"


class DataLock:
    """Locks a data folder until `release`, or until the process ends in any way.

    The lock is the kernel's, on a file in the folder; the file's text names the last holder. On
    Windows nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InUse if another process holds the lock, BadRequest if the folder cannot be
        used."""
        file = folder.absolute() / NAME
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BadRequest(f"The data folder {file.parent} cannot be used: {error}") from error
        try:
            _lock(self._file)
        except BlockingIOError:
            holder = _said(self._file)
            self.release()
            raise InUse(
                f"{file.parent} is in use by another server{holder}. Stop it, or start this one "
                "with another data folder (--data)."
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no other server on it", file, error)
        with suppress(OSError):  # a full disk
            os.ftruncate(self._file, 0)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            os.write(self._file, json.dumps(facts).encode())

    def release(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def holder(folder: Path) -> str | None:
    """The process that holds a folder's lock, as in " (pid 7 on host, since ...)"; None if none
    does."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        _lock(file)
        return None
    except BlockingIOError:
        return _said(file)
    except OSError:  # of a file system without locks
        return None
    finally:
        os.close(file)


def _lock(file: int) -> None:
    """Raises BlockingIOError if another process holds it."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _said(file: int) -> str:
    """The holder that the file names; empty if its disk was full."""
    try:
        facts = json.loads(os.pread(file, 4096, 0))
        return f" (pid {facts['pid']} on {facts['host']}, since {facts['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
