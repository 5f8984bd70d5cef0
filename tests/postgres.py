"""A real PostgreSQL for the tests, on a loopback port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest

from tests.server.running import wait_until


@dataclass
class Postgres:
    """A running PostgreSQL; its user `argus` needs no password."""

    process: subprocess.Popen[bytes]
    command: list[str]
    user: str | None
    port: int
    schemas: int = 0

    @property
    def url(self) -> str:
        return f"postgresql://argus@127.0.0.1:{self.port}/postgres"

    def new_database(self) -> str:
        """The URL of a new, empty database: a schema of its own, which is made much faster."""
        self.schemas += 1
        name = f"s{self.schemas}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{self.url}?options=-csearch_path%3D{name}"

    def start(self) -> None:
        """Start it again after `stop`, on the same port and data."""
        self.process = _started(self.command, self.user)
        wait_until(self._answers)

    def stop(self) -> None:
        """End it at once, as its machine going down does."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all of its processes for a while: connections stay open and nothing answers."""
        main = psutil.Process(self.process.pid)
        everything = [main, *main.children(recursive=True)]
        for one in everything:
            one.suspend()
        try:
            yield
        finally:
            for one in everything:
                one.resume()

    def _answers(self) -> bool:
        assert self.process.poll() is None, "PostgreSQL ended"
        with suppress(psycopg.OperationalError), psycopg.connect(self.url):
            return True
        return False


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """PostgreSQL with an empty folder, for as long as the block; skips the test where it is not
    installed."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="argus-postgres-"))
    if user is not None:
        shutil.chown(folder, user)
    data = str(folder / "data")
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "argus", "-A", "trust", "-E", "UTF8", "-N",
         "--locale", "C"],
        user=user, check=True, stdout=subprocess.DEVNULL, cwd=folder,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(programs / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1",
        "-k", str(folder), "-F",
    ]  # fmt: skip
    server = Postgres(_started(command, user), command, user, port)
    try:
        wait_until(server._answers)
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _started(command: list[str], user: str | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, user=user, stderr=subprocess.DEVNULL, cwd="/")


def _programs() -> Path | None:
    """The folder of initdb and postgres: Debian keeps them out of the PATH."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((one for one in folders if (one / "initdb").is_file()), None)
