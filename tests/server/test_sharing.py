"""A database that others share, stops and comes back: requests go on without the cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.latents import LatentStore
from argus.cache.scope import Scope
from argus.server import health, retrieval
from argus.server.health import StorageHealth
from argus.server.retrieval import CATALOGUE, Retrieval

if TYPE_CHECKING:
    from tests.postgres import Postgres

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
FISH, BOAT = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)


def open_cache(folder: Path, url: str) -> ApproximateCache:
    catalogue = Catalogue(url)
    return ApproximateCache(catalogue, LatentStore(str(folder), catalogue.id), 10**9)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_a_server_follows_what_others_keep_and_remove(tmp_path: Path, database: str) -> None:
    async def use() -> None:
        cache, other = open_cache(tmp_path, database), open_cache(tmp_path, database)
        edge = Retrieval(cache)
        await edge.load()
        following = asyncio.create_task(edge.follow())
        other.keep(SCOPE, "a red fish", FISH, {5: torch.zeros(1)})
        await until(lambda: len(cache) == 1)
        (found,) = await edge.find(SCOPE, FISH, 1)
        assert await edge.fetch(found, 5) is not None
        other.remove()
        await until(lambda: len(cache) == 0)
        assert cache.size_bytes == 0
        following.cancel()
        await edge.close(limit_s=5)

    asyncio.run(asyncio.wait_for(use(), 60))


def test_a_database_that_hangs_holds_up_nothing_and_is_used_again_when_it_answers(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "LOAD_LIMIT_S", 0.2)
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.1)
    monkeypatch.setattr(health, "PROBE_LIMIT_S", 0.5)

    async def use() -> None:
        url = postgres.new_database()
        cache, other = open_cache(tmp_path, url), open_cache(tmp_path, url)
        works = StorageHealth()
        edge = Retrieval(cache, works)
        other.keep(SCOPE, "a red fish", FISH, {5: torch.zeros(1)})
        (found,) = await edge.find(SCOPE, FISH, 1)
        following = asyncio.create_task(edge.follow())
        with postgres.frozen():
            assert await edge.find(SCOPE, FISH, 1, limit_s=0.1) == []
            assert await edge.fetch(found, 5, limit_s=0.1) is None
            await until(lambda: not works.works(CATALOGUE))
            edge.keep(SCOPE, "a green cup", BOAT, {5: b"not stored meanwhile"})
            assert edge.storing == 0
        await until(lambda: works.works(CATALOGUE))
        assert [one.prompt for one in await edge.find(SCOPE, FISH, 1)] == ["a red fish"]
        other.keep(SCOPE, "a blue boat", BOAT, {5: torch.zeros(1)})
        await until(lambda: len(cache) == 2)
        following.cancel()
        await edge.close(limit_s=5)
        works.close()

    asyncio.run(asyncio.wait_for(use(), 60))


def test_a_database_that_restarts_is_used_again(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.1)

    async def use() -> None:
        url = postgres.new_database()
        cache, works = open_cache(tmp_path, url), StorageHealth()
        edge = Retrieval(cache, works)
        await edge.load()
        following = asyncio.create_task(edge.follow())
        postgres.stop()
        assert await edge.find(SCOPE, FISH, 1) == []
        await until(lambda: not works.works(CATALOGUE))
        postgres.start()
        await until(lambda: works.works(CATALOGUE))
        open_cache(tmp_path, url).keep(SCOPE, "a red fish", FISH, {5: torch.zeros(1)})
        await until(lambda: len(cache) == 1)
        assert [one.prompt for one in await edge.find(SCOPE, FISH, 1)] == ["a red fish"]
        following.cancel()
        await edge.close(limit_s=5)
        works.close()

    asyncio.run(asyncio.wait_for(use(), 60))
