"""The cache as a request sees it: never in the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.index import Vector
from argus.cache.scope import Scope
from argus.control.breaker import LEAST_S, PROBE_S, Breaker
from argus.workers.messages import pack, unpack

log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT_S = 5.0
READERS = 4
MOST_STORING = 256


class Retrieval:
    """Asks the cache from an asyncio loop. What it cannot find, read or store in time is done
    without, and logged; nothing is raised.

    It works in threads of its own, so that a store that hangs holds up nothing else.
    """

    def __init__(self, cache: ApproximateCache) -> None:
        self._cache = cache
        self._storing: set[asyncio.Task[None]] = set()
        self._reading = ThreadPoolExecutor(READERS, "cache-read")
        self._writing = ThreadPoolExecutor(1, "cache-write")
        self._breaker = Breaker(time.monotonic)

    @property
    def usable(self) -> float:
        """The share of fetches that brought latents in time, lately."""
        return self._breaker.usable

    @property
    def shut(self) -> bool:
        """Whether the latent store is given up for now: nothing that needs latents makes sense."""
        return self._breaker.open

    @property
    def storing(self) -> int:
        """Full runs whose latents are not stored yet."""
        return len(self._storing)

    async def find(self, scope: Scope, vector: Vector, count: int) -> list[Neighbour]:
        search = asyncio.get_running_loop().run_in_executor(
            self._reading, self._cache.find, scope, vector, count
        )
        try:
            return await asyncio.wait_for(search, LIMIT_S)
        except Exception as error:
            log.warning("The cache cannot be searched: %r", error)
            return []

    async def fetch(self, neighbour: Neighbour, k: int, limit_s: float = LIMIT_S) -> bytes | None:
        """A neighbour's latents after K steps, packed for a worker, if they are there in time."""

        def read() -> Tensor | None:
            return self._cache.fetch(neighbour, k)

        if self._breaker.open or limit_s < LEAST_S:
            return None
        latents = await self._asked(read, limit_s)
        return None if latents is None else pack(latents)

    async def watch(self, limit_s: float) -> None:
        """See now and then whether a store that failed answers again, within `limit_s` seconds;
        does not end."""
        while True:
            await asyncio.sleep(PROBE_S)
            if self._breaker.doubted and not self._breaker.open:
                await self._asked(self._cache.probe, limit_s)

    async def _asked(self, read: Callable[[], T], limit_s: float) -> T | None:
        """What a reader of the store gives; None if it fails or takes too long."""
        trial = self._breaker.begin()
        reading = asyncio.get_running_loop().run_in_executor(self._reading, read)
        try:
            result = await asyncio.wait_for(reading, max(0.0, min(limit_s, LIMIT_S)))
        except Exception as error:
            self._breaker.failure(trial)
            log.warning("Latents cannot be fetched: %r", error)
            return None
        except asyncio.CancelledError:
            self._breaker.abandon(trial)
            raise
        self._breaker.success()  # even if what was asked for is gone: the store answers
        return result

    def keep(self, scope: Scope, prompt: str, vector: Vector, packed: Mapping[int, bytes]) -> None:
        """Store a full run's latents behind its answer, unless too many wait for that already."""
        if self.storing >= MOST_STORING:
            log.warning("Storing latents falls behind; those of a picture are not kept")
            return

        def store() -> None:
            latents = {k: unpack(data) for k, data in packed.items()}
            self._cache.keep(scope, prompt, vector, latents)

        async def stored() -> None:
            try:
                await asyncio.get_running_loop().run_in_executor(self._writing, store)
            except Exception as error:
                log.warning("Latents cannot be stored: %r", error)

        task = asyncio.create_task(stored())
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def close(self, limit_s: float) -> None:
        """Wait for what is being stored, but no longer than `limit_s` seconds."""
        if self._storing:
            await asyncio.wait(self._storing, timeout=limit_s)
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._writing.shutdown(wait=False, cancel_futures=True)
