"""An S3 endpoint that is killed or hangs costs requests their shortcut and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.catalogue import Catalogue
from argus.cache.disk_tier import DiskTier
from argus.cache.latents import LatentStore
from argus.cache.scope import Scope
from argus.config import Settings
from argus.control import breaker
from argus.server import health
from argus.server.retrieval import Retrieval
from argus.workers.packing import pack
from tests.s3 import S3Endpoint
from tests.server.running import running, wait_until

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
VECTOR = np.array([1.0, 0.0], np.float32)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.05)


@pytest.fixture
def hanging(s3: S3Endpoint) -> Iterator[S3Endpoint]:
    """The endpoint, to `stop`; goes on at the end."""
    yield s3
    s3.go_on()


def open_cache(bucket: str, folder: Path, disk: DiskTier | None = None) -> ApproximateCache:
    catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
    store = LatentStore(f"s3://{bucket}/latents", catalogue.id, disk)
    return ApproximateCache(catalogue, store, 10**9)


async def failed(edge: Retrieval, neighbour: Neighbour) -> None:
    """Fetch until the breaker opens."""
    while not edge.shut:
        assert await edge.fetch(neighbour, 5, limit_s=0.1) is None


async def recovered(edge: Retrieval, neighbour: Neighbour) -> None:
    while await edge.fetch(neighbour, 5) is None:
        await asyncio.sleep(0.05)


def test_an_endpoint_that_hangs_is_done_without_until_it_answers(
    hanging: S3Endpoint, bucket: str, tmp_path: Path
) -> None:
    async def use() -> None:
        cache = open_cache(bucket, tmp_path)
        cache.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        edge = Retrieval(cache)
        (found,) = await edge.find(SCOPE, VECTOR, 1)
        hanging.stop()
        await failed(edge, found)
        for _ in range(20):
            assert await edge.find(SCOPE, VECTOR, 1) == [found]
        edge.keep(SCOPE, "a blue boat", VECTOR, {5: pack(torch.zeros(1))})
        hanging.go_on()
        await recovered(edge, found)
        while edge.storing:
            await asyncio.sleep(0.05)
        assert cache.stored(SCOPE, "a blue boat") is not None
        await edge.close(limit_s=5)

    asyncio.run(asyncio.wait_for(use(), 120))


def test_what_is_on_the_disk_is_fetched_while_the_endpoint_hangs(
    hanging: S3Endpoint, bucket: str, tmp_path: Path
) -> None:
    async def use() -> None:
        tier = DiskTier(tmp_path / "near", 10**6)
        one, other = open_cache(bucket, tmp_path, tier), open_cache(bucket, tmp_path)
        one.keep(SCOPE, "a red fish", VECTOR, {5: torch.zeros(1)})
        other.keep(SCOPE, "a blue boat", -VECTOR, {5: torch.zeros(1)})
        tier.settle()
        edge = Retrieval(one)
        (fish,), (boat,) = [await edge.find(SCOPE, sign * VECTOR, 1) for sign in (1, -1)]
        hanging.stop()
        await failed(edge, boat)
        while await edge.fetch(fish, 5, limit_s=1.0) is None:
            pass  # on a machine that is busy, a disk may miss its limit
        assert edge.failing  # what is on the disk says nothing about the store
        hanging.go_on()
        await recovered(edge, boat)
        await edge.close(limit_s=5)
        assert one.stats().uses >= 2
        one.remove()
        assert await edge.fetch(fish, 5) is None

    asyncio.run(asyncio.wait_for(use(), 120))


@pytest.mark.cluster
def test_a_server_outlives_its_endpoint(
    tiny_family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3: S3Endpoint,
    new_clients: None,
) -> None:
    """It makes every picture while the endpoint is killed, starts without it, and uses it again."""
    own = S3Endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL", own.url)
    own.make_bucket("latents")
    given = Settings(
        family=str(tiny_family), data=tmp_path, workers=1, cache_latents="s3://latents/argus"
    )
    try:
        with running(given) as server:

            def stored(count: int) -> bool:
                return len(server.service.cache) == count and not server.service.retrieval.storing

            assert server.generate("a red fish").status_code == 200
            wait_until(lambda: stored(1))
            own.kill()
            for prompt in ("a red fish", "a blue boat", "a green cup"):
                assert server.generate(prompt).status_code == 200
            wait_until(lambda: server.service.degraded == ["latents"])
        with running(given) as server:
            wait_until(lambda: server.service.degraded == ["latents"])
            assert server.generate("a red fish").status_code == 200
            own.start()
            own.make_bucket("latents")
            wait_until(lambda: not server.service.degraded)
            before = len(server.service.cache)
            assert server.generate("a yellow house").status_code == 200
            wait_until(lambda: stored(before + 1))
    finally:
        own.kill()
