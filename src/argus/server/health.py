"""Tracks whether pictures, latents and other state can be stored."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextvars import Context

from argus.core.errors import named
from argus.server.threads import Threads, TooManyHang

log = logging.getLogger(__name__)

PROBE_EVERY_S = 5.0
PROBE_LIMIT_S = 5.0
MOST_PAUSE_S = 60.0
MOST_HUNG = 8  # probes of one kind


class StorageHealth:
    """Tracks which kinds of state (pictures, latents, …) cannot be stored now.

    A failed write is reported by `failed`; nothing of that kind is written until a probe succeeds,
    which runs every few seconds in a thread of its own. The pause before a probe doubles, up to
    `MOST_PAUSE_S`, after a probe that hung, and when a write fails soon after a probe succeeded (a
    disk that is almost full). Only changes are logged. For use from one asyncio loop.
    """

    def __init__(self) -> None:
        self._probes: dict[str, Callable[[], None]] = {}
        self._threads: dict[str, Threads] = {}
        self._recovering: dict[str, asyncio.Task[None]] = {}
        self._recovered: dict[str, tuple[float, float]] = {}  # when (loop time), the pause before

    def add(self, kind: str, probe: Callable[[], None]) -> None:
        """Add a kind with a probe, which raises as long as nothing of that kind can be stored. The
        probe may block or hang."""
        self._probes[kind] = probe
        self._threads[kind] = Threads(f"{kind}-probe", 1, MOST_HUNG)

    @property
    def kinds(self) -> list[str]:
        return list(self._probes)

    @property
    def degraded(self) -> list[str]:
        """The kinds that cannot be stored."""
        return list(self._recovering)

    def works(self, *kinds: str) -> bool:
        """Whether all of these kinds can be stored, as far as is known."""
        return self._recovering.keys().isdisjoint(kinds)

    def failed(self, kind: str, error: Exception) -> None:
        """Report that something of a kind could not be stored."""
        if kind in self._recovering:
            return
        log.warning("Degraded: %s cannot be stored (%s)", kind, named(error))
        at, pause_s = self._recovered.get(kind, (-math.inf, 0.0))
        soon = asyncio.get_running_loop().time() - at < MOST_PAUSE_S
        pause_s = min(2 * pause_s, MOST_PAUSE_S) if soon else PROBE_EVERY_S
        recovery = self._recover(kind, pause_s)  # not on the way of the request that failed
        self._recovering[kind] = asyncio.create_task(recovery, context=Context())

    async def check(self, kind: str) -> None:
        """Probe a kind once, and report it if it cannot be stored."""
        try:
            await self._probe(kind)
        except Exception as error:
            self.failed(kind, error)

    async def _recover(self, kind: str, first_pause_s: float) -> None:
        pause_s = first_pause_s
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self._probe(kind)
            except (TimeoutError, TooManyHang):
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
                continue
            except Exception:
                pause_s = first_pause_s
                continue
            del self._recovering[kind]
            self._recovered[kind] = asyncio.get_running_loop().time(), pause_s
            log.warning("Recovered: %s can be stored again", kind)
            return

    async def _probe(self, kind: str) -> None:
        await self._threads[kind].run(self._probes[kind], PROBE_LIMIT_S)

    def close(self) -> None:
        """Stop probing."""
        for task in self._recovering.values():
            task.cancel()
