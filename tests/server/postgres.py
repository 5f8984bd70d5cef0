"""A real PostgreSQL for the tests, on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BINARIES = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"))]


@contextmanager
def postgres() -> Iterator[str]:
    """The SQLAlchemy URL of a new server. Skips the test if PostgreSQL is not installed, or cannot
    be run: it refuses to run as root."""
    if not BINARIES:
        pytest.skip("PostgreSQL is not installed")
    root = os.getuid() == 0
    if root and shutil.which("runuser") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    user = ["runuser", "-u", "postgres", "--"] if root else []
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        if root:
            shutil.chown(folder, "postgres")
        initdb = [*user, f"{BINARIES[-1]}/initdb", "-D", folder, "-U", "argus", "-A", "trust", "-N"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL)
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        options = ["-D", folder, "-h", "127.0.0.1", "-p", port, "-k", "", "-F"]
        server = subprocess.Popen(
            [*user, f"{BINARIES[-1]}/postgres", *options], stderr=subprocess.DEVNULL
        )
        try:
            asking = [f"{BINARIES[-1]}/pg_isready", "-h", "127.0.0.1", "-p", port, "-q"]
            while subprocess.run(asking).returncode:
                assert server.poll() is None, "PostgreSQL ended"
            yield f"postgresql+psycopg://argus@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait(60)
