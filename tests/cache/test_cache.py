from __future__ import annotations

import errno
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from argus.cache import cache as cache_module
from argus.cache.cache import AT_ONCE, ApproximateCache, Neighbour
from argus.cache.catalogue import PAGE, Catalogue, Changes, Entry, Removed, Uses
from argus.cache.index import Vector
from argus.cache.latents import LatentStore, StoredLatents
from argus.cache.scope import Scope

if TYPE_CHECKING:
    from tests.postgres import Postgres

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        self.now += 1
        return self.now


def open_cache(
    folder: Path,
    url: str | None = None,
    limit_bytes: int = 10**9,
    catalogue: type[Catalogue] = Catalogue,
    store: type[LatentStore] = LatentStore,
) -> ApproximateCache:
    opened = catalogue(url or f"sqlite:///{folder}/catalogue.db")
    return ApproximateCache(opened, store(str(folder / "latents"), opened.id), limit_bytes, Clock())


def vector(*values: float) -> Vector:
    return np.array([*values, 0.0, 0.0, 0.0][:4], np.float32)


def latents(*skips: int, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(1, 4, 8, 8, generator=generator) for k in skips}


def nearest(cache: ApproximateCache, scope: Scope, query: Vector) -> Neighbour | None:
    return next(iter(cache.find(scope, query)), None)


def test_the_nearest_prompt_is_found_with_its_similarity(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1, 0), latents(5, 10))
    cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    found = nearest(cache, SCOPE, vector(2, 1))
    assert found is not None
    assert found.prompt == "a red fish"
    assert found.skips == (5, 10)
    assert found.similarity == pytest.approx(2 / 5**0.5, abs=2e-3)


def test_several_neighbours_come_nearest_first(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    for x in (3, 1, 2):
        cache.keep(SCOPE, f"{x} fish", vector(x, 1), latents(5))
    found = cache.find(SCOPE, vector(1, 0), count=2)
    assert [one.prompt for one in found] == ["3 fish", "2 fish"]
    assert len(cache.find(SCOPE, vector(1, 0), count=9)) == 3


def test_latents_come_back_as_they_went_in_after_a_restart(tmp_path: Path, database: str) -> None:
    kept = latents(5, 10)
    open_cache(tmp_path, database).keep(SCOPE, "a red fish", vector(1), kept)
    cache = open_cache(tmp_path, database)
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    for k, expected in kept.items():
        fetched = cache.fetch(found, k)
        assert fetched is not None
        assert torch.equal(fetched, expected)
    assert cache.fetch(found, 7) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(SCOPE, namespace="bob"),
        replace(SCOPE, model="huge"),
        replace(SCOPE, sampler="euler"),
        replace(SCOPE, width=32),
        replace(SCOPE, height=32),
        replace(SCOPE, steps=20),
        replace(SCOPE, guidance=4.0),
        replace(SCOPE, negative_prompt="blur"),
    ],
)
def test_entries_match_within_their_scope_only(tmp_path: Path, database: str, other: Scope) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    assert nearest(cache, other, vector(1)) is None


def test_a_scope_is_known_to_be_empty_once_the_index_is_built(
    tmp_path: Path, database: str
) -> None:
    open_cache(tmp_path, database).keep(SCOPE, "a red fish", vector(1), latents(5))
    cache, other = open_cache(tmp_path, database), replace(SCOPE, namespace="bob")
    assert not cache.is_empty(other)
    cache.load()
    assert cache.is_empty(other)
    assert not cache.is_empty(SCOPE)
    cache.remove()
    assert cache.is_empty(SCOPE)


def test_a_prompt_is_stored_once_a_scope(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5)) is not None
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5)) is None
    assert len(cache) == 1


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_broken_latents_are_dropped_and_logged_once(
    tmp_path: Path, database: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    for path in (tmp_path / "latents").glob("*-5.safetensors"):
        damage(path, how)
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(found, 5) is None
        assert cache.fetch(found, 5) is None
    assert len(caplog.records) == 1
    again = nearest(cache, SCOPE, vector(1))
    assert again is not None
    assert again.skips == (10,)
    assert cache.fetch(again, 10) is not None


def test_an_entry_without_latents_is_gone(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    for path in (tmp_path / "latents").iterdir():
        path.unlink()
    assert cache.fetch(found, 5) is None
    assert nearest(cache, SCOPE, vector(1)) is None
    assert cache.size_bytes == 0


def test_the_least_used_times_steps_saved_goes_first(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1, 0), latents(5, 20))
    one = cache.size_bytes // 2
    found = nearest(cache, SCOPE, vector(1, 0))
    assert found is not None
    for _ in range(5):
        cache.fetch(found, 5)  # 5 uses × 5 steps are worth more than none × 20
    cache.close()
    small = open_cache(tmp_path, database, limit_bytes=int(3.2 * one))
    small.keep(SCOPE, "a blue boat", vector(0, 1), latents(25, 30))
    red, blue = nearest(small, SCOPE, vector(1, 0)), nearest(small, SCOPE, vector(0, 1))
    assert red is not None and red.skips == (5,)
    assert blue is not None and blue.skips == (25, 30)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(1, 29), min_size=1, max_size=4))))
def test_the_limit_holds_and_index_catalogue_and_objects_agree(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, set[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = open_cache(folder, limit_bytes=6000)
    for i, (prompt, skips) in enumerate(writes):
        cache.keep(SCOPE, f"prompt {prompt}", vector(1, prompt / 30), latents(*skips, seed=i))
        assert cache.size_bytes <= 6000
    entries = cache.entries()
    assert len(cache) == len(entries)
    objects = list((folder / "latents").iterdir())
    assert len(objects) == sum(len(entry.skips) for entry in entries)
    assert sum(path.stat().st_size for path in objects) == cache.size_bytes


def test_entries_are_removed_by_id_prompt_and_namespace(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    bob = replace(SCOPE, namespace="bob")
    first = cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    cache.keep(bob, "a blue boat", vector(0, 1), latents(5))
    cache.keep(bob, "a green cup", vector(0, 0, 1), latents(5))
    assert cache.remove(entry=first) == 1
    assert nearest(cache, SCOPE, vector(1)) is not None  # the boat, far away
    assert cache.remove(prompt="a blue boat") == 2
    assert nearest(cache, SCOPE, vector(1)) is None
    assert cache.remove(namespace="bob") == 1
    assert cache.remove() == 0
    assert not list((tmp_path / "latents").iterdir())


def test_what_another_process_removed_is_not_found(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    cache.load()
    open_cache(tmp_path, database).remove()
    assert nearest(cache, SCOPE, vector(1)) is None


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_cache import SCOPE, latents, open_cache, vector
cache = open_cache(Path(sys.argv[1]))
number = len(cache)
while True:
    number += 1
    cache.keep(SCOPE, f"prompt {number}", vector(1, number / 1e4), latents(5, 10, seed=number))
    print(number, flush=True)
"""


def test_killing_in_the_middle_of_writes_tears_nothing(tmp_path: Path) -> None:
    told = 0
    for rounds in (3, 8, 5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        for _ in range(rounds):
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    cache = open_cache(tmp_path)
    assert len(cache) >= told
    for entry in cache.entries():
        number = int(entry.prompt.split()[1])
        found = nearest(cache, SCOPE, vector(1, number / 1e4))
        assert found is not None
        assert entry.skips == (5, 10)
    for number in range(1, told + 1):
        stored = cache.stored(SCOPE, f"prompt {number}")
        assert stored is not None
        expected = latents(5, 10, seed=number)
        found = nearest(cache, SCOPE, vector(1, number / 1e4))
        assert found is not None
        own = replace(found, entry=stored.id)
        for k in (5, 10):
            fetched = cache.fetch(own, k)
            assert fetched is not None
            assert torch.equal(fetched, expected[k])


def test_a_sweep_removes_what_a_crash_left_and_nothing_else(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    catalogue = Catalogue(database)
    store = LatentStore(str(tmp_path / "latents"), catalogue.id)
    orphan = store.put(5, latents(5)[5])
    folder = tmp_path / "latents"
    unfinished = f"{orphan.name.replace('-5.', '-6.')}.new"
    (folder / unfinished).write_bytes(b"half")
    LatentStore(str(folder), "another").put(5, latents(5)[5])
    (folder / "notes.safetensors").write_bytes(b"somebody's own")
    (folder / "more").mkdir()
    before = {path.name for path in folder.iterdir()}
    ApproximateCache(catalogue, store, 10**9).sweep()
    assert {path.name for path in folder.iterdir()} == before  # all too young
    ApproximateCache(catalogue, store, 10**9, clock=lambda: 4e9).sweep()
    assert {path.name for path in folder.iterdir()} == before - {orphan.name, unfinished}


def test_a_sweep_asks_only_of_unknown_objects_how_old_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    orphan = LatentStore(str(tmp_path / "latents"), catalogue.id).put(5, latents(5)[5])
    asked: list[str] = []
    modified = LocalFileSystem.modified

    def noted(files: LocalFileSystem, path: str) -> object:
        asked.append(Path(path).name)
        return modified(files, path)

    monkeypatch.setattr(LocalFileSystem, "modified", noted)
    cache.sweep()
    assert asked == [orphan.name]


def test_latents_that_cannot_be_written_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, which takes the first K and half of the second."""
    pipe = LocalFileSystem.pipe_file
    written: list[str] = []

    def full(files: LocalFileSystem, path: str, data: bytes) -> None:
        pipe(files, path, data[: len(data) // (1 + len(written))])
        if written:
            raise OSError(errno.ENOSPC, "no space left")
        written.append(path)

    cache = open_cache(tmp_path)
    monkeypatch.setattr(LocalFileSystem, "pipe_file", full)
    with pytest.raises(OSError, match="no space left"):
        cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10))
    assert written
    assert not list((tmp_path / "latents").iterdir())
    assert cache.entries() == []


def test_a_disk_smaller_than_the_limit_keeps_what_is_worth_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = LocalFileSystem.pipe_file

    def small(files: LocalFileSystem, path: str, data: bytes) -> None:
        used = sum(one.stat().st_size for one in (tmp_path / "latents").iterdir())
        if used + len(data) > 20_000:
            raise OSError(errno.ENOSPC, "no space left")
        pipe(files, path, data)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", small)
    cache = open_cache(tmp_path)
    for n in range(100):
        assert cache.keep(SCOPE, f"{n} red fish", vector(1, n), latents(5)) is not None
    held = [one.prompt for one in cache.entries()]
    assert held[:3] == ["99 red fish", "98 red fish", "97 red fish"]
    assert cache.size_bytes <= 20_000


def test_a_catalogue_without_room_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SQLite on the same disk as the objects: it is full while there are more than ten."""
    add, full = Catalogue.add, sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def added(catalogue: Catalogue, *entry: Any) -> int | None:
        if len(list((tmp_path / "latents").iterdir())) > 10:
            raise OperationalError("INSERT", {}, full)
        return add(catalogue, *entry)

    monkeypatch.setattr(Catalogue, "add", added)
    cache = open_cache(tmp_path)
    for n in range(30):
        assert cache.keep(SCOPE, f"{n} red fish", vector(1, n), latents(5)) is not None
    assert cache.entries(limit=1)[0].prompt == "29 red fish"


def test_latents_whose_commit_is_not_answered_stay_and_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue may name them, as it does here; else a sweep deletes them."""
    add = Catalogue.add

    def unanswered(catalogue: Catalogue, *entry: Any) -> int | None:
        add(catalogue, *entry)
        raise OperationalError("COMMIT", {}, Exception("the connection is closed"))

    cache = open_cache(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "add", unanswered)
        with pytest.raises(OperationalError):
            cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    assert cache.fetch(found, 5) is not None


def test_an_error_is_told_even_if_what_was_written_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("the vector is broken")

    def stuck(*_: object) -> None:
        raise OSError("the store does not answer")

    cache = open_cache(tmp_path)
    monkeypatch.setattr(Catalogue, "add", broken)
    monkeypatch.setattr(LatentStore, "delete", stuck)
    with pytest.raises(RuntimeError, match="vector"):
        cache.keep(SCOPE, "a red fish", vector(1), latents(5))


def test_a_prompt_gets_the_latents_it_lacks(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    first = cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5)) is None
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10)) == first
    (entry,) = cache.entries()
    assert entry.skips == (5, 10)
    assert len(cache) == 1


def test_much_that_another_process_removed_is_forgotten_at_once(
    tmp_path: Path, database: str
) -> None:
    cache, other = open_cache(tmp_path, database), open_cache(tmp_path, database)
    kept = cache.keep(SCOPE, "a red fish", vector(0, 1), latents(5))
    for i in range(30):
        cache.keep(SCOPE, f"blue boat {i}", vector(1, i / 1e4), latents(5))
    cache.load()
    for i in range(30):
        other.remove(prompt=f"blue boat {i}")
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    assert found.entry == kept
    assert len(cache) == 1


class FailingStore(LatentStore):
    """A store that is out of reach for reading, and full after one write."""

    writes_left = 1

    def get(self, stored: StoredLatents) -> torch.Tensor:
        raise TimeoutError("the store does not answer")

    def put(self, k: int, latents: torch.Tensor) -> StoredLatents:
        if not self.writes_left:
            raise OSError("no space left")
        self.writes_left -= 1
        return super().put(k, latents)


def test_a_store_out_of_reach_loses_nothing(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    catalogue = Catalogue(database)
    failing = FailingStore(str(tmp_path / "latents"), catalogue.id)
    unlucky = ApproximateCache(catalogue, failing, 10**9)
    found = nearest(unlucky, SCOPE, vector(1))
    assert found is not None
    with pytest.raises(TimeoutError):
        unlucky.fetch(found, 5)
    with pytest.raises(TimeoutError):
        unlucky.probe()
    with pytest.raises(OSError, match="no space"):
        unlucky.keep(SCOPE, "a blue boat", vector(0, 1), latents(5, 10))
    assert len(list((tmp_path / "latents").iterdir())) == 1  # what was written is gone again
    assert cache.fetch(found, 5) is not None


def test_a_probe_reads_what_is_there_and_changes_nothing(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.probe()  # an empty cache is no reason to doubt the store
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    before = cache.stats()
    cache.probe()
    (written,) = (tmp_path / "latents").iterdir()
    written.unlink()
    cache.probe()  # a store that says what it does not have answers
    assert cache.stats() == before


def test_a_fetch_does_not_wait_for_who_writes_and_its_use_is_counted_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    with closing(sqlite3.connect(tmp_path / "catalogue.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            assert cache.fetch(found, 5) is not None
    assert not caplog.records
    cache.count_uses()
    assert cache.stats().uses == 3


def test_uses_of_several_processes_add_up(tmp_path: Path, database: str) -> None:
    caches = [open_cache(tmp_path, database) for _ in range(3)]
    caches[0].keep(SCOPE, "a red fish", vector(1), latents(5, 10))
    for cache in caches:
        found = nearest(open_cache(tmp_path, database), SCOPE, vector(1))
        assert found is not None
        cache.fetch(found, 5)
        cache.fetch(found, 5)
        cache.fetch(found, 10)
    for cache in caches:
        cache.close()
    assert open_cache(tmp_path, database).stats().uses == 9


class LockedCatalogue(Catalogue):
    """Cannot be written to at first."""

    locked = True

    def used(self, uses: Mapping[tuple[int, int], Uses]) -> None:
        if self.locked:
            raise SQLAlchemyError("database is locked")
        super().used(uses)


def test_uses_that_cannot_be_written_are_counted_later(tmp_path: Path, database: str) -> None:
    catalogue = LockedCatalogue(database)
    store = LatentStore(str(tmp_path / "latents"), catalogue.id)
    cache = ApproximateCache(catalogue, store, 10**9)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    cache.fetch(found, 5)
    with pytest.raises(SQLAlchemyError):
        cache.count_uses()
    cache.fetch(found, 5)
    catalogue.locked = False
    cache.count_uses()
    assert cache.stats().uses == 2


def test_much_is_evicted_in_many_short_transactions(tmp_path: Path) -> None:
    """Objects are deleted after each: between two, others can write."""
    deleted = []

    class Watched(LatentStore):
        def delete(self, names: list[str]) -> None:
            with closing(sqlite3.connect(tmp_path / "catalogue.db", timeout=0)) as other:
                other.execute("BEGIN IMMEDIATE")
            deleted.append(len(names))
            super().delete(names)

    cache = open_cache(tmp_path)
    for i in range(10):
        cache.keep(SCOPE, f"{i} fish", vector(1, i), latents(*range(1, 21)))
    small = open_cache(tmp_path, limit_bytes=cache.size_bytes // 2, store=Watched)
    small.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    assert sum(deleted) > 100
    assert max(deleted) <= AT_ONCE
    assert small.size_bytes <= cache.size_bytes // 2


def test_a_limit_that_was_lowered_is_reached_in_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that storing one run ends in time, however much there is to evict."""
    monkeypatch.setattr(cache_module, "MOST_EVICTED", 10)
    cache = open_cache(tmp_path)
    for i in range(5):
        cache.keep(SCOPE, f"{i} fish", vector(1, i), latents(*range(1, 11)))
    size = cache.size_bytes // 50
    small = open_cache(tmp_path, limit_bytes=20 * size)
    counts = []
    for i in range(5):
        small.keep(SCOPE, f"{i} boats", vector(0, 1, i), latents(5))
        counts.append(small.stats().latents)
    assert counts[:3] == [41, 32, 23]
    assert small.size_bytes <= 20 * size


def test_a_round_evicts_more_than_was_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MOST_EVICTED", 1)
    cache = open_cache(tmp_path, limit_bytes=20_000)
    for i in range(20):
        cache.keep(SCOPE, f"{i} fish", vector(1, i), latents(5, 10, 15))
        assert cache.size_bytes <= 20_000


def test_two_threads_do_not_evict_at_once(tmp_path: Path) -> None:
    reached, released = threading.Event(), threading.Event()
    evicting: list[str] = []

    class Slow(LatentStore):
        def delete(self, names: list[str]) -> None:
            evicting.append(threading.current_thread().name)
            reached.set()
            released.wait(60)
            super().delete(names)

    cache = open_cache(tmp_path, limit_bytes=1, store=Slow)
    fish = (SCOPE, "a red fish", vector(1), latents(5))
    slow = threading.Thread(target=cache.keep, args=fish, name="slow")
    slow.start()
    assert reached.wait(60)
    assert cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5)) is not None
    assert evicting == ["slow"]
    released.set()
    slow.join()
    assert cache.keep(SCOPE, "a green cup", vector(0, 0, 1), latents(5)) is not None
    assert cache.size_bytes == 0


def test_an_entry_without_latents_is_passed_over(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    with closing(sqlite3.connect(tmp_path / "catalogue.db")) as other:
        other.execute("DELETE FROM latents WHERE entry = 1")
        other.commit()
    found: list[Neighbour] = []
    search = threading.Thread(
        target=lambda: found.extend(cache.find(SCOPE, vector(1))), daemon=True
    )
    search.start()
    search.join(20)
    assert [one.prompt for one in found] == ["a blue boat"]


class Restless(Catalogue):
    """Between any two of a search's looks another process removes what it found."""

    def of_ids(self, entries: Collection[int]) -> dict[int, Entry]:
        for one in entries:
            self.remove_entry(one)
        return super().of_ids(entries)


def test_a_search_gives_up_when_everything_it_finds_is_removed_meanwhile(
    tmp_path: Path, database: str
) -> None:
    cache = open_cache(tmp_path, database, catalogue=Restless)
    for i in range(9):
        cache.keep(SCOPE, f"{i} fish", vector(1, i), latents(5))
    assert cache.find(SCOPE, vector(1), count=2) == []
    assert len(cache) == 5


class Meanwhile(Catalogue):
    """Another thread keeps an entry right after changes were read."""

    cache: ApproximateCache | None = None

    def changes(self, after: int, limit: int = PAGE) -> Changes:
        found = super().changes(after, limit)
        if self.cache is not None:
            cache, self.cache = self.cache, None
            cache.keep(SCOPE, "a green cup", vector(0, 0, 1), latents(5))
        return found


def test_an_entry_kept_while_others_are_dropped_is_found(tmp_path: Path, database: str) -> None:
    catalogue = Meanwhile(database)
    cache = ApproximateCache(catalogue, LatentStore(str(tmp_path / "latents"), catalogue.id), 10**9)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    cache.load()
    open_cache(tmp_path, database).remove()
    catalogue.cache = cache
    cache.find(SCOPE, vector(1))
    cache.follow()
    found = nearest(cache, SCOPE, vector(0, 0, 1))
    assert found is not None
    assert found.prompt == "a green cup"


class Slow(Catalogue):
    """Gives the first vector at once, and the others when it is released."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.read, self.reading, self.released = 0, threading.Event(), threading.Event()

    def vectors(self) -> Iterator[tuple[int, str, Vector]]:
        self.read += 1
        for one in list(super().vectors()):
            yield one
            self.reading.set()
            self.released.wait(30)


def test_the_index_is_built_once_and_what_is_kept_meanwhile_is_in_it(
    tmp_path: Path, database: str
) -> None:
    open_cache(tmp_path, database).keep(SCOPE, "a red fish", vector(1), latents(5))
    catalogue = Slow(database)
    cache = ApproximateCache(catalogue, LatentStore(str(tmp_path / "latents"), catalogue.id), 10**9)
    boat = (SCOPE, "a blue boat", vector(0, 1), latents(5))
    threads = [
        threading.Thread(target=cache.load),
        threading.Thread(target=cache.keep, args=boat),
        threading.Thread(target=cache.find, args=(SCOPE, vector(1))),
    ]
    threads[0].start()
    assert catalogue.reading.wait(30)
    for thread in threads[1:]:
        thread.start()
    while cache.stored(SCOPE, "a blue boat") is None:
        pass
    catalogue.released.set()
    for thread in threads:
        thread.join(30)
    found = nearest(cache, SCOPE, vector(0, 1))
    assert found is not None
    assert found.prompt == "a blue boat"
    assert catalogue.read == 1


class Unread(Catalogue):
    def vectors(self) -> Iterator[tuple[int, str, Vector]]:
        raise AssertionError("the index is built")


def test_entries_are_counted_without_the_index(tmp_path: Path, database: str) -> None:
    cache = open_cache(tmp_path, database)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    again = open_cache(tmp_path, database, catalogue=Unread)
    assert len(again) == 2
    again.keep(SCOPE, "a green cup", vector(0, 0, 1), latents(5))
    assert len(again) == 3
    again.remove(prompt="a red fish")
    assert len(again) == 2


def test_a_write_that_hangs_holds_up_no_other(tmp_path: Path, database: str) -> None:
    reached, released = threading.Event(), threading.Event()

    class HangingOnce(LatentStore):
        def put(self, k: int, latents: torch.Tensor) -> StoredLatents:
            if not reached.is_set():
                reached.set()
                released.wait(30)
            return super().put(k, latents)

    cache = open_cache(tmp_path, database, store=HangingOnce)
    fish = (SCOPE, "a red fish", vector(1), latents(5))
    hanging = threading.Thread(target=cache.keep, args=fish, daemon=True)
    hanging.start()
    assert reached.wait(30)
    boat: list[int | None] = []
    other = threading.Thread(
        target=lambda: boat.append(cache.keep(SCOPE, "a boat", vector(0, 1), latents(5))),
        daemon=True,
    )
    other.start()
    other.join(20)
    assert boat == [1]
    assert cache.keep(*fish) is None  # another thread is storing it
    released.set()
    hanging.join(30)
    assert len(cache) == 2


def test_latents_are_not_added_to_an_entry_that_is_gone(tmp_path: Path, database: str) -> None:
    """Another process may remove an entry between two looks of this one."""

    class Evicting(LatentStore):
        evicting = False

        def put(self, k: int, latents: torch.Tensor) -> StoredLatents:
            if self.evicting:
                open_cache(tmp_path, database).remove()
            return super().put(k, latents)

    cache = open_cache(tmp_path, database, store=Evicting)
    first = cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evicting, "evicting", True)
        second = cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10))
    assert first != second
    (entry,) = cache.entries()
    assert (entry.id, entry.skips) == (second, (10,))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    assert cache.fetch(found, 10) is not None


def test_of_two_servers_that_remove_the_last_latents_of_an_entry_one_removes_the_entry(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Each would see the latents that the other deletes, if they did not lock the entry first."""
    url = postgres.new_database()
    cache = open_cache(tmp_path, url)
    entry = cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10))
    assert entry is not None
    at_once(url, "SELECT entries", [[(entry, 5)], [(entry, 10)]])
    cache.follow()
    assert (len(cache), cache.size_bytes) == (0, 0)
    assert list(Catalogue(url).vectors()) == []


def at_once(url: str, first: str, removals: list[list[tuple[int, int]]]) -> None:
    """Remove latents with a catalogue each; all wait for each other before the first statement that
    begins so."""
    begun = threading.Barrier(len(removals), timeout=60)

    def remove(pairs: list[tuple[int, int]]) -> list[Removed]:
        catalogue, waiting = Catalogue(url), [begun]

        def hold(*given: Any) -> None:
            if given[2].startswith(first) and waiting:
                waiting.pop().wait()

        sa.event.listen(catalogue._engine, "before_cursor_execute", hold)
        try:
            return catalogue.remove_latents(pairs)
        finally:
            catalogue.close()

    with ThreadPoolExecutor(len(removals)) as threads:
        list(threads.map(remove, removals))


def test_servers_that_remove_latents_of_the_same_entries_do_not_deadlock(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Whichever of them has the entry first, when both begin."""
    url = postgres.new_database()
    cache = open_cache(tmp_path, url)
    for n in range(8):
        entry = cache.keep(SCOPE, f"{n} fish", vector(1, n), latents(5, 10))
        assert entry is not None
        at_once(url, "SELECT entries", [[(entry, 5), (entry, 10)], [(entry, 10)]])
    cache.follow()
    assert (len(cache), cache.size_bytes) == (0, 0)
