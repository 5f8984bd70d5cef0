from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path

import pytest

from argus.cache.disk_tier import MOST_WAITING, DiskTier


def filled(folder: Path, limit_bytes: int, names: str) -> DiskTier:
    tier = DiskTier(folder, limit_bytes)
    for name in names:
        tier.put(name, name.encode() * 10)
        tier.settle()
    return tier


def held(folder: Path) -> str:
    return "".join(sorted(path.name for path in folder.iterdir()))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    tier = filled(tmp_path, 35, "abc")
    assert tier.get("a") == b"a" * 10
    tier.put("d", b"d" * 10)
    tier.settle()
    assert tier.get("b") is None
    assert held(tmp_path) == "acd"
    assert tier.size_bytes == 30


def test_a_restart_keeps_objects_and_order(tmp_path: Path) -> None:
    first = filled(tmp_path, 100, "abc")
    assert first.get("a") is not None
    (tmp_path / "d.new").write_bytes(b"half")
    again = DiskTier(tmp_path, 25)
    assert held(tmp_path) == "ac"
    assert again.size_bytes == 20
    assert again.get("a") == b"a" * 10


def test_an_object_larger_than_the_tier_displaces_nothing(tmp_path: Path) -> None:
    tier = filled(tmp_path, 25, "ab")
    tier.put("large", bytes(26))
    tier.settle()
    assert held(tmp_path) == "ab"


def test_what_was_deleted_is_gone(tmp_path: Path) -> None:
    tier = filled(tmp_path, 100, "ab")
    tier.delete("a")
    tier.delete("z")
    (tmp_path / "b").unlink()
    assert tier.get("a") is None
    assert tier.get("b") is None
    assert tier.size_bytes == 0


def test_a_full_disk_gets_room_back_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = filled(tmp_path, 1000, "abc")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:3])
        raise OSError(errno.ENOSPC, "no space left")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for name in "de":
            tier.put(name, bytes(10))
            tier.settle()
    assert len(caplog.records) == 1
    assert held(tmp_path) == "c"
    assert tier.get("c") is not None
    tier.put("f", bytes(10))
    tier.settle()
    assert held(tmp_path) == "cf"


def test_a_disk_that_hangs_in_writing_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = filled(tmp_path, 1000, "a")
    released, write = threading.Event(), Path.write_bytes

    def hanging(path: Path, data: bytes) -> int:
        released.wait(60)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", hanging)
    for number in range(3 * MOST_WAITING):
        tier.put(f"{number}", bytes(10))
    assert tier.get("a") is not None
    released.set()
    tier.settle()
    assert 0 < len(held(tmp_path)) < 3 * 2 * MOST_WAITING
