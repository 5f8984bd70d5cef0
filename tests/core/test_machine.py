from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from argus.core import machine


def test_a_process_may_use_no_more_cores_than_it_is_allowed() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert machine.cores() == len(allowed)


def test_a_container_s_memory_is_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUPS", [(str(tmp_path), "max", "current", "inactive_file")])
    total = psutil.virtual_memory().total
    assert machine.memory()[1] == total  # no such files
    (tmp_path / "current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    (tmp_path / "max").write_text("max\n")
    assert machine.memory()[1] == total
    (tmp_path / "max").write_text("1000000\n")
    assert machine.memory() == (400_000, 1_000_000)
    (tmp_path / "max").write_text(f"{10 * total}\n")
    assert machine.memory()[1] == total
