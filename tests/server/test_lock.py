"""One server a data folder; commands may look into it all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from argus.core.errors import BadRequest, InUse
from argus.server.lock import DataLock
from tests.cli.running import run
from tests.server.running import COMMAND, Running, wait_until

HOLD = """
import sys, time
from pathlib import Path
from argus.server.lock import DataLock

lock = DataLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_server_on_a_data_folder_says_which_process_has_it_and_exits(
    tiny_family: Path, tmp_path: Path
) -> None:
    lock = DataLock(tmp_path)
    done = subprocess.run(
        [*COMMAND, "serve", "--data", str(tmp_path), "--family", str(tiny_family), "--port", "0"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 5
    assert f"is in use by another server (pid {os.getpid()} on " in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "catalogue.db").exists()
    lock.release()
    DataLock(tmp_path).release()


def test_a_server_that_was_killed_leaves_its_folder_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InUse, match=f"pid {holder.pid} on .*, since 20"):
        DataLock(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    DataLock(tmp_path).release()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="cannot be used"):
        DataLock(tmp_path / "file")


def test_the_cache_of_a_running_server_can_be_looked_at_and_emptied(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*arguments: str) -> str:
        data = str(server.service.settings.data)
        assert run(monkeypatch, "cache", *arguments, "--data", data) == 0
        return " ".join(capsys.readouterr().out.split())

    before = len(server.service.cache.entries())
    assert server.generate("a clock in a tower").status_code == 200
    wait_until(lambda: len(server.service.cache.entries()) == before + 1)
    assert server.generate("a clock in a tower").json()["argus"][0]["steps_skipped"] == 3
    assert f"prompts {before + 1}" in says("stats")
    assert "a clock in a tower" in says("list")
    assert "Removed" in says("clear", "--yes")
    made = server.generate("a clock in a tower").json()["argus"][0]
    assert made["steps_skipped"] == 0
    wait_until(lambda: len(server.service.cache.entries()) == 1)
