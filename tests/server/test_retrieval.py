"""A cache that fails or hangs costs a request its shortcut and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy.exc import DataError, IntegrityError, OperationalError

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.catalogue import Catalogue
from argus.cache.disk_tier import DiskTier
from argus.cache.index import Vector
from argus.cache.latents import LatentStore, StoredLatents
from argus.cache.saved_index import restored
from argus.cache.scope import Scope
from argus.config import Settings, SloClass
from argus.control import breaker
from argus.control.breaker import SHUT_AT
from argus.server import health, retrieval
from argus.server.health import StorageHealth
from argus.server.retrieval import Retrieval
from argus.workers.packing import pack, unpack
from tests.server.running import running

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
VECTOR = np.array([1.0, 0.0], np.float32)


class Hanging(LatentStore):
    """Hangs in reading, and in writing once it is told to, until it is released."""

    released: threading.Event
    writes = True

    def get(self, stored: StoredLatents) -> torch.Tensor:
        self.released.wait()
        return super().get(stored)

    def put(self, k: int, latents: torch.Tensor) -> StoredLatents:
        if not self.writes:
            self.released.wait()
        return super().put(k, latents)


class Unlucky(ApproximateCache):
    """Hangs when it is searched, and raises what no one expects otherwise."""

    def __init__(self, folder: Path, released: threading.Event) -> None:
        catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
        super().__init__(catalogue, LatentStore(str(folder), catalogue.id), 10**9)
        self._released = released

    def find(self, scope: Scope, vector: Vector, count: int = 1) -> list[Neighbour]:
        self._released.wait()
        return super().find(scope, vector, count)

    def fetch(self, neighbour: Neighbour, k: int) -> torch.Tensor | None:
        raise ValueError("the endpoint is gone")

    def keep(self, *_: object) -> int | None:
        self._released.wait()
        raise ValueError("the endpoint is gone")


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_what_the_cache_cannot_do_is_done_without(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "LIMIT_S", 0.05)
    monkeypatch.setattr(retrieval, "MOST_STORING", 2)

    async def use() -> None:
        edge = Retrieval(Unlucky(tmp_path, released))
        assert await edge.find(SCOPE, VECTOR, 1) == []
        assert await edge.fetch(Neighbour(1, "a red fish", 1.0, (5,)), 5) is None
        for _ in range(3):
            edge.keep(SCOPE, "a red fish", VECTOR, {5: pack(torch.zeros(1))})
        assert edge.storing == 2  # the third is not kept, rather than filling the memory
        await edge.close(limit_s=0.05)

    asyncio.run(asyncio.wait_for(use(), 30))


def open_cache(folder: Path, store: type[LatentStore] = LatentStore) -> ApproximateCache:
    catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
    return ApproximateCache(catalogue, store(str(folder / "latents"), catalogue.id), 10**9)


def test_a_request_without_time_left_says_nothing_about_the_store(tmp_path: Path) -> None:
    async def use() -> None:
        cache = open_cache(tmp_path)
        cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        edge = Retrieval(cache)
        (found,) = await edge.find(SCOPE, VECTOR, 1)
        for _ in range(SHUT_AT):
            assert await edge.fetch(found, 5, limit_s=0.0) is None
        assert edge.usable == 1
        assert not edge.shut
        assert await edge.fetch(found, 5) is not None

    asyncio.run(asyncio.wait_for(use(), 30))


def test_latents_come_back_packed(tmp_path: Path) -> None:
    async def use() -> None:
        catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
        store = LatentStore(str(tmp_path), catalogue.id)
        edge = Retrieval(ApproximateCache(catalogue, store, 10**9))
        edge.keep(SCOPE, "a red fish", VECTOR, {5: pack(torch.arange(3.0))})
        while edge.storing:
            await asyncio.sleep(0)
        (found,) = await edge.find(SCOPE, VECTOR, 1)
        packed = await edge.fetch(found, 5)
        assert packed is not None
        assert torch.equal(unpack(packed), torch.arange(3.0))
        await edge.close(limit_s=5)

    asyncio.run(asyncio.wait_for(use(), 30))


@pytest.fixture
def hanging(released: threading.Event, monkeypatch: pytest.MonkeyPatch) -> type[LatentStore]:
    monkeypatch.setattr(Hanging, "released", released, raising=False)
    return Hanging


def test_a_store_that_hangs_keeps_no_search_waiting(
    tmp_path: Path, hanging: type[LatentStore], caplog: pytest.LogCaptureFixture
) -> None:
    async def use() -> None:
        cache = open_cache(tmp_path, hanging)
        cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        edge = Retrieval(cache)
        (found,) = await edge.find(SCOPE, VECTOR, 1)
        while not edge.shut:
            assert await edge.fetch(found, 5, limit_s=0.02) is None
        caplog.clear()
        for _ in range(20):
            assert await edge.find(SCOPE, VECTOR, 1) == [found]

    asyncio.run(asyncio.wait_for(use(), 30))
    assert not caplog.records


def test_a_store_that_hung_is_found_to_answer_again(
    tmp_path: Path,
    hanging: type[LatentStore],
    released: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 0.01)

    async def use() -> None:
        cache = open_cache(tmp_path, hanging)
        cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        edge = Retrieval(cache)
        (found,) = await edge.find(SCOPE, VECTOR, 1)
        for _ in range(2 * retrieval.READERS):
            assert await edge.fetch(found, 5, limit_s=0.02) is None
            await asyncio.sleep(0.01)
        released.set()
        while await edge.fetch(found, 5) is None:
            await asyncio.sleep(0.01)
        assert not edge.shut

    asyncio.run(asyncio.wait_for(use(), 30))


def test_a_search_ends_within_the_time_that_its_request_has(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "LIMIT_S", 60.0)

    async def use() -> None:
        edge = Retrieval(Unlucky(tmp_path, released))
        assert await edge.find(SCOPE, VECTOR, 1, limit_s=0.02) == []
        assert await edge.find(SCOPE, VECTOR, 1, limit_s=-1.0) == []

    asyncio.run(asyncio.wait_for(use(), 30))


def cancelled_as_it_ends(use: Callable[[], Awaitable[object]]) -> bool:
    """Whether a task is cancelled whose cancellation comes as the answer of a thread does."""

    async def outer() -> bool:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(use())
        deliver = loop.call_soon_threadsafe

        def deliver_and_cancel(callback: Callable[..., None], *arguments: object) -> object:
            def both() -> None:
                callback(*arguments)
                task.cancel()

            return deliver(both)

        loop.call_soon_threadsafe = deliver_and_cancel  # type: ignore[assignment]
        try:
            await asyncio.wait({task})
        finally:
            loop.call_soon_threadsafe = deliver  # type: ignore[method-assign]
        return task.cancelled()

    return asyncio.run(asyncio.wait_for(outer(), 30))


@pytest.mark.parametrize("what", ["find", "fetch"])
def test_a_cancellation_that_comes_with_the_answer_is_not_lost(tmp_path: Path, what: str) -> None:
    cache = open_cache(tmp_path)
    entry = cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
    assert entry is not None
    found = Neighbour(entry, "a red fish", 1.0, (5,))

    async def use() -> object:
        edge = Retrieval(cache)
        return await (edge.find(SCOPE, VECTOR, 1) if what == "find" else edge.fetch(found, 5))

    assert cancelled_as_it_ends(use)


HANGS = """
import asyncio, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_retrieval import *

Hanging.released = threading.Event()

async def use():
    cache = open_cache(Path(sys.argv[1]), Hanging)
    cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
    edge = Retrieval(cache)
    (found,) = await edge.find(SCOPE, VECTOR, 1)
    await edge.fetch(found, 5, limit_s=0.05)
    Hanging.writes = False
    for _ in range(3):
        edge.keep(SCOPE, "a blue boat", VECTOR, {5: pack(torch.zeros(1))})
    await edge.close(limit_s=0.05)
    assert not edge.storing

asyncio.run(use())
print("ended")
"""


@pytest.mark.slow
def test_a_store_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert ended.stdout == "ended\n"


def test_a_request_waits_for_a_search_no_longer_than_its_deadline(
    tiny_family: Path,
    tmp_path: Path,
    released: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "LIMIT_S", 300.0)
    given = Settings(
        family=str(tiny_family), data=tmp_path, workers=1, slo={"default": SloClass(latency="3s")}
    )
    with running(given) as server:
        monkeypatch.setattr(server.service.cache, "find", lambda *_: released.wait())
        answer = server.generate("a red fish")  # made, or given up when its 3 s are over
        assert answer.status_code in (200, 429, 504)


def test_the_index_is_built_in_a_thread_before_the_server_is_ready(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_by: list[str] = []
    vectors = Catalogue.vectors

    def noted(catalogue: Catalogue) -> Iterator[tuple[int, str, Vector]]:
        built_by.append(threading.current_thread().name)
        return vectors(catalogue)

    monkeypatch.setattr(Catalogue, "vectors", noted)
    with running(Settings(family=str(tiny_family), data=tmp_path, workers=1)) as server:
        assert built_by == ["cache-search"]
        assert "argus_cache_entries 0.0" in server.http.get("/metrics").text
        assert server.generate("a red fish").status_code == 200
    assert len(built_by) == 1


def test_uses_are_counted_behind_the_answer_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "COUNT_AFTER_S", 0.01)

    async def use() -> None:
        cache = open_cache(tmp_path)
        entry = cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        assert entry is not None
        found = Neighbour(entry, "a red fish", 1.0, (5,))
        edge = Retrieval(cache)
        for uses in (1, 2):
            await edge.fetch(found, 5)
            while cache.stats().uses < uses:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(retrieval, "COUNT_AFTER_S", 1e9)
        for _ in range(3):
            await edge.fetch(found, 5)
        await edge.close(limit_s=20)
        assert cache.stats().uses == 5

    asyncio.run(asyncio.wait_for(use(), 30))


def test_after_a_write_that_hangs_none_is_tried_until_the_store_is_found_to_work(
    tmp_path: Path,
    hanging: type[LatentStore],
    released: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "STORE_LIMIT_S", 0.05)
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.01)

    async def use() -> None:
        cache = open_cache(tmp_path, hanging)
        works = StorageHealth()
        edge = Retrieval(cache, works)
        monkeypatch.setattr(Hanging, "writes", False)
        edge.keep(SCOPE, "a red fish", VECTOR, {5: pack(torch.zeros(1))})
        while edge.storing:
            await asyncio.sleep(0.01)
        assert len(cache) == 0
        assert works.degraded == ["latents"]
        edge.keep(SCOPE, "a green hat", VECTOR, {5: pack(torch.zeros(1))})
        assert edge.storing == 0
        monkeypatch.setattr(Hanging, "writes", True)
        while works.degraded:
            await asyncio.sleep(0.01)
        monkeypatch.setattr(retrieval, "STORE_LIMIT_S", 20.0)
        edge.keep(SCOPE, "a blue boat", VECTOR, {5: pack(torch.zeros(1))})
        while edge.storing:
            await asyncio.sleep(0.01)
        assert [one.prompt for one in cache.entries()] == ["a blue boat"]
        await edge.close(limit_s=1)

    asyncio.run(asyncio.wait_for(use(), 30))


class Refusing(ApproximateCache):
    """Cannot store one prompt, whatever state the store is in."""

    error: Exception

    def keep(
        self, scope: Scope, prompt: str, vector: Vector, latents: Mapping[int, torch.Tensor]
    ) -> int | None:
        if prompt == "an odd fish":
            raise self.error
        return super().keep(scope, prompt, vector, latents)


@pytest.mark.parametrize(
    "error",
    [
        DataError("INSERT", {}, ValueError("NUL")),
        IntegrityError("INSERT", {}, ValueError("twice")),
        UnicodeError("surrogates"),
    ],
)
def test_a_request_that_cannot_be_stored_keeps_others_from_nothing(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refusing, "error", error, raising=False)

    async def use() -> None:
        catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
        cache = Refusing(catalogue, LatentStore(str(tmp_path), catalogue.id), 10**9)
        works = StorageHealth()
        edge = Retrieval(cache, works)
        for prompt in ("an odd fish", "a red fish"):
            edge.keep(SCOPE, prompt, VECTOR, {5: pack(torch.zeros(1))})
        while edge.storing:
            await asyncio.sleep(0.01)
        assert works.degraded == []
        assert [one.prompt for one in cache.entries()] == ["a red fish"]
        await edge.close(limit_s=1)

    asyncio.run(asyncio.wait_for(use(), 30))


def test_the_index_is_saved_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "SAVE_EVERY_S", 0.01)
    file = tmp_path / "index"
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    store = LatentStore(str(tmp_path / "latents"), catalogue.id)

    async def use() -> None:
        cache = ApproximateCache(catalogue, store, 10**9, index_file=file)
        edge = Retrieval(cache)
        await edge.load()
        saving = asyncio.create_task(edge.keep_saved())
        cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        while not file.exists():
            await asyncio.sleep(0.01)
        saving.cancel()
        before = file.read_bytes()
        cache.keep(SCOPE, "a blue boat", -VECTOR, {5: torch.zeros(1)})
        await edge.close(limit_s=20)
        assert file.read_bytes() != before

    asyncio.run(asyncio.wait_for(use(), 30))
    monkeypatch.setattr(Catalogue, "vectors", lambda _: pytest.fail("the index is rebuilt"))
    assert len(restored(file, catalogue)) == 2


def test_a_disk_that_hangs_while_the_index_is_saved_holds_up_nothing(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: released.wait())
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    store = LatentStore(str(tmp_path / "latents"), catalogue.id)

    async def use() -> None:
        cache = ApproximateCache(catalogue, store, 10**9, index_file=tmp_path / "index")
        edge = Retrieval(cache)
        await edge.load()
        cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        saving = asyncio.create_task(asyncio.to_thread(cache.save_index))
        while not list(tmp_path.glob("index.new")):
            await asyncio.sleep(0.01)
        cache.keep(SCOPE, "a blue boat", -VECTOR, {5: torch.zeros(1)})
        (found,) = await edge.find(SCOPE, -VECTOR, 1)
        assert found.prompt == "a blue boat"
        assert await edge.fetch(found, 5) is not None
        await edge.close(limit_s=0.05)
        assert not (tmp_path / "index").exists()
        released.set()
        await saving

    asyncio.run(asyncio.wait_for(use(), 30))


def test_a_catalogue_that_fails_is_not_taken_for_the_disk_tier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> StoredLatents | None:
        raise OperationalError("SELECT", {}, Exception("connection refused"))

    monkeypatch.setattr(Catalogue, "latents", unreachable)
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    store = LatentStore(str(tmp_path / "latents"), catalogue.id, DiskTier(tmp_path / "near", 10**6))

    async def use() -> None:
        edge = Retrieval(ApproximateCache(catalogue, store, 10**9))
        assert await edge.fetch(Neighbour(1, "a red fish", 1.0, (5,)), 5) is None

    asyncio.run(asyncio.wait_for(use(), 30))
    assert "The cache's catalogue cannot be read" in caplog.text
    assert "disk tier" not in caplog.text
