"""A cache that fails or hangs costs a request its shortcut and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.catalogue import Catalogue
from argus.cache.index import Vector
from argus.cache.latents import LatentStore
from argus.cache.scope import Scope
from argus.control.breaker import SHUT_AT
from argus.server import retrieval
from argus.server.retrieval import Retrieval
from argus.workers.messages import pack, unpack

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
VECTOR = np.array([1.0, 0.0], np.float32)


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
