"""Runs blocking calls in daemon threads, with a limit on time and on how many may hang."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_HUNG = 32


async def loaded(loading: Future[T]) -> T:
    """The result of a future that a thread sets, once it is there. Raises its error."""
    if loading.done():
        return loading.result()
    return await asyncio.shield(asyncio.wrap_future(loading))


class TooManyHang(Exception):
    """So many earlier calls have not returned that no thread is started for another."""


class Threads:
    """At most `count` calls at a time, each in a daemon thread, for one asyncio loop.

    A call whose caller no longer waits, because its time is up or it was cancelled, is written
    off: it keeps its thread and no longer counts among the `count`. While `most_hung` such calls
    have not returned, new ones fail at once; that is logged once, not for each call. Unlike the
    threads of `concurrent.futures`, these are not joined when the interpreter exits.
    """

    def __init__(self, name: str, count: int, most_hung: int = MOST_HUNG) -> None:
        self._name, self._most_hung = name, most_hung
        self._free, self._most_idle = asyncio.Semaphore(count), count
        self._hung = 0
        self._logged = False
        self._idle: list[_Thread] = []

    @property
    def hung(self) -> int:
        """Number of calls that were written off and have not returned."""
        return self._hung

    async def run(self, call: Callable[[], T], limit_s: float | None = None) -> T:
        """Returns what `call` returns, or raises what it raises.

        Raises TimeoutError after `limit_s` seconds, the wait for a free thread included, and
        TooManyHang.
        """
        async with asyncio.timeout(limit_s), self._free:
            if self._hung >= self._most_hung:
                raise TooManyHang(f"{self._hung} calls hang in {self._name}")
            return await self._in_thread(call)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Future[T]] = loop.create_future()
        thread = self._idle.pop() if self._idle else _Thread(self._name)

        def end(outcome: Future[T]) -> None:
            if len(self._idle) < self._most_idle:
                self._idle.append(thread)
            else:
                thread.calls.put(None)
            if answer.cancelled():
                self._came_back()
            else:
                answer.set_result(outcome)

        def work() -> None:
            outcome: Future[T] = Future()
            try:
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(end, outcome)

        thread.calls.put(work)
        try:
            return (await answer).result()
        finally:
            if answer.cancelled():
                self._write_off()

    def _write_off(self) -> None:
        self._hung += 1
        if self._hung >= self._most_hung and not self._logged:
            self._logged = True
            log.warning(
                "%d calls hang in %s; others fail until some return", self._hung, self._name
            )

    def _came_back(self) -> None:
        self._hung -= 1
        if self._hung <= 0:
            self._logged = False


class _Thread:
    """A thread that makes the `calls` it is given, until a None."""

    def __init__(self, name: str) -> None:
        self.calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        Thread(target=_make, args=(self.calls,), name=name, daemon=True).start()

    def __del__(self) -> None:
        self.calls.put(None)


def _make(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # it refers to its thread, which ends once nothing else does
