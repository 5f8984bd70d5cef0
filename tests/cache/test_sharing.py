"""Several processes over one catalogue and store: each follows what the others change."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from argus.cache import cache as cache_module
from argus.cache.cache import ORPHAN_AGE_S, ApproximateCache
from argus.cache.catalogue import Catalogue, Forgotten
from argus.cache.latents import LatentStore, StoredLatents
from tests.cache.test_cache import SCOPE, latents, nearest, open_cache, vector

if TYPE_CHECKING:
    from tests.postgres import Postgres


def two_caches(folder: Path, url: str, **more: Any) -> tuple[ApproximateCache, ApproximateCache]:
    caches = open_cache(folder, url, **more), open_cache(folder, url, **more)
    for cache in caches:
        cache.load()
    return caches


def test_what_one_server_keeps_another_finds_and_fetches(tmp_path: Path, database: str) -> None:
    one, other = two_caches(tmp_path, database)
    one.keep(SCOPE, "a red fish", vector(1, 0), latents(5, 10))
    one.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    other.follow()
    found = nearest(other, SCOPE, vector(1, 0))
    assert found is not None
    assert (found.prompt, found.skips) == ("a red fish", (5, 10))
    assert other.fetch(found, 10) is not None
    assert (len(other), other.size_bytes) == (2, one.size_bytes)


def test_what_one_server_removes_leaves_the_index_of_another(tmp_path: Path, database: str) -> None:
    one, other = two_caches(tmp_path, database)
    for n in range(5):
        one.keep(SCOPE, f"{n} fish", vector(1, n), latents(5))
    other.follow()
    assert len(other) == 5
    one.remove(prompt="2 fish")
    other.follow()
    assert (len(other), other.size_bytes) == (4, one.size_bytes)
    assert "2 fish" not in [found.prompt for found in other.find(SCOPE, vector(1, 2), count=5)]


def test_totals_are_followed_without_an_index(tmp_path: Path, database: str) -> None:
    one, other = open_cache(tmp_path, database), open_cache(tmp_path, database)
    one.keep(SCOPE, "a red fish", vector(1), latents(5))
    assert (len(other), other.size_bytes) == (0, 0)
    other.follow()
    assert (len(other), other.size_bytes) == (1, one.size_bytes)


def test_many_changes_are_applied_in_parts(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "FOLLOWED", 3)
    one, other = two_caches(tmp_path, database)
    for n in range(10):
        one.keep(SCOPE, f"{n} fish", vector(1, n), latents(5))
    one.remove(prompt="3 fish")
    other.follow(wait=False)
    assert 0 < len(other) < 9
    other.follow()
    assert len(other) == 9


def test_a_server_that_lags_too_far_behind_builds_its_index_anew(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = two_caches(tmp_path, database)
    for n in range(5):
        one.keep(SCOPE, f"{n} fish", vector(1, n), latents(5))
    other.follow()
    one.remove(prompt="1 fish")
    one.keep(SCOPE, "6 fish", vector(1, 6), latents(5))
    catalogue = Catalogue(database)
    catalogue.forget_changes(1)
    with pytest.raises(Forgotten):
        catalogue.changes(0)
    other.follow()
    assert "built anew" in caplog.text
    prompts = {found.prompt for found in other.find(SCOPE, vector(1), count=9)}
    assert prompts == {"0 fish", "2 fish", "3 fish", "4 fish", "6 fish"}
    one.keep(SCOPE, "7 fish", vector(1, 7), latents(5))
    other.follow()
    assert len(other) == 6


def test_a_restored_backup_is_noticed(tmp_path: Path, database: str) -> None:
    one, other = two_caches(tmp_path, database)
    one.keep(SCOPE, "a red fish", vector(1, 0), latents(5))
    size = one.size_bytes
    one.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    other.follow()
    with one._catalogue._engine.begin() as connection:
        for statement in (
            "DELETE FROM entries WHERE id > 1",
            "DELETE FROM latents WHERE entry > 1",
            "DELETE FROM changes WHERE version > 1",
            f"UPDATE totals SET entries = 1, version = 1, size_bytes = {size}",
        ):
            connection.exec_driver_sql(statement)
    other.follow()
    assert (len(other), other.size_bytes) == (1, size)
    assert [found.prompt for found in other.find(SCOPE, vector(1, 0), count=9)] == ["a red fish"]


def test_only_changes_that_every_server_may_have_seen_are_forgotten(database: str) -> None:
    catalogue = Catalogue(database)
    for n in range(9):
        stored = [StoredLatents(5, "a name", "a hash", 100)]
        catalogue.add(SCOPE, f"{n} fish", vector(1, n), stored, 0.0)
    catalogue.forget_changes(4)
    assert [one.version for one in catalogue.changes(5).found] == [6, 7, 8, 9]
    catalogue.forget_changes(6)  # what was forgotten stays so
    with pytest.raises(Forgotten):
        catalogue.changes(4)


def test_an_entry_that_becomes_visible_late_is_not_missed(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Its id is the smaller one, and it is committed after the other was seen."""
    url = postgres.new_database()
    late, other = open_cache(tmp_path, url), open_cache(tmp_path, url)
    other.load()
    reached, released = threading.Event(), threading.Event()

    def hold(*given: Any) -> None:
        if given[2].startswith("UPDATE totals"):
            reached.set()
            released.wait(60)

    sa.event.listen(late._catalogue._engine, "before_cursor_execute", hold)
    fish = (SCOPE, "a red fish", vector(1, 0), latents(5))
    keeping = threading.Thread(target=late.keep, args=fish)
    keeping.start()
    assert reached.wait(60)
    assert other.keep(SCOPE, "a blue boat", vector(0, 1), latents(5)) == 2
    other.follow()
    assert len(other) == 1
    released.set()
    keeping.join()
    other.follow()
    found = nearest(other, SCOPE, vector(1, 0))
    assert found is not None and (found.entry, found.prompt) == (1, "a red fish")


def test_two_servers_that_evict_at_once_keep_the_limit_and_lose_no_object(
    tmp_path: Path, database: str
) -> None:
    limit = 20_000
    caches = two_caches(tmp_path, database, limit_bytes=limit)
    begin = threading.Barrier(2, timeout=60)

    def fill(which: int) -> None:
        begin.wait()
        for n in range(40):
            caches[which].keep(SCOPE, f"{which}: {n} fish", vector(which, n), latents(5, 10))

    threads = [threading.Thread(target=fill, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache in caches:
        cache.follow()
    stats = caches[0].stats()
    assert 0.7 * limit < stats.size_bytes <= limit
    assert {cache.size_bytes for cache in caches} == {stats.size_bytes}
    assert {len(cache) for cache in caches} == {stats.entries}
    objects = list((tmp_path / "latents").iterdir())
    assert {one.name for one in objects} == Catalogue(database).names()
    assert sum(one.stat().st_size for one in objects) == stats.size_bytes


def test_of_several_servers_one_sweeps_at_a_time(tmp_path: Path, database: str) -> None:
    catalogue = Catalogue(database)
    store = LatentStore(str(tmp_path / "latents"), catalogue.id)
    orphan = store.put(5, latents(5)[5])
    now = (tmp_path / "latents" / orphan.name).stat().st_mtime
    sweeps: list[str] = []

    class Watched(ApproximateCache):
        def sweep(self) -> None:
            sweeps.append("one")
            super().sweep()

    one = Watched(catalogue, store, 10**9, clock=lambda: now)
    other = Watched(Catalogue(database), store, 10**9, clock=lambda: now + 2)
    one.sweep_in_turn(3600)
    other.sweep_in_turn(3600)
    assert len(sweeps) == 1
    assert catalogue.names() == set()
    assert len(list(store.written())) == 1  # too young
    later = Watched(Catalogue(database), store, 10**9, clock=lambda: now + 3600 + ORPHAN_AGE_S)
    later.sweep_in_turn(3600)
    assert len(sweeps) == 2
    assert list(store.written()) == []


def test_objects_that_took_too_long_to_write_are_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server may have swept them already."""
    cache = open_cache(tmp_path)
    monkeypatch.setattr(cache_module, "WRITE_S", -1.0)
    with pytest.raises(TimeoutError):
        cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    assert cache.entries() == []
    assert not list((tmp_path / "latents").iterdir())


def test_latents_that_another_server_has_just_evicted_are_no_warning(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = two_caches(tmp_path, database)
    one.keep(SCOPE, "a red fish", vector(1), latents(5))
    found = nearest(one, SCOPE, vector(1))
    assert found is not None

    class Evicted(LatentStore):
        def get(self, stored: Any) -> Any:
            other.remove()
            return super().get(stored)

    catalogue = Catalogue(database)
    late = ApproximateCache(
        catalogue, Evicted(str(tmp_path / "latents"), catalogue.id), 10**9
    )  # fmt: skip
    assert late.fetch(found, 5) is None
    assert not caplog.records
