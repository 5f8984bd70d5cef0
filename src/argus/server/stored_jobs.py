"""The job store for asyncio: each call has a time limit, and failures are reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from argus.server.health import StorageHealth
from argus.server.job_store import JobStore
from argus.server.retrieval import OF_ONE_REQUEST
from argus.server.threads import Threads, TooManyHang

T = TypeVar("T")

JOBS = "jobs"  # the kind of data, as in `StorageHealth`
THREADS = 4
LIMIT_S = 10.0
AGAIN_S = 1.0
STORE_ERRORS = (SQLAlchemyError, OSError, TimeoutError, TooManyHang)


class StoredJobs:
    """Calls the job store in the database at `url`, which is opened by the first call. After a
    call that failed, `works` is False until `health` finds that the database works again. For use
    from one asyncio loop."""

    def __init__(self, url: str, health: StorageHealth, probe: Callable[[], None]) -> None:
        self._url, self._health = url, health
        self._store: JobStore | None = None
        self._threads = Threads("jobs", THREADS)
        health.add(JOBS, probe)

    @property
    def works(self) -> bool:
        return self._health.works(JOBS)

    async def call(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store returns. Raises one of `STORE_ERRORS` if it fails, or takes
        longer than `LIMIT_S`: it may have been done all the same."""
        try:
            return await self._threads.run(lambda: call(self._opened()), LIMIT_S)
        except OF_ONE_REQUEST:
            raise
        except STORE_ERRORS as error:
            self._health.failed(JOBS, error)
            raise

    async def until_done(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store returns, which is repeated as long as the store fails. Raises
        what is due to the call alone."""
        while True:
            if self.works:
                try:
                    return await self.call(call)
                except OF_ONE_REQUEST:
                    raise
                except STORE_ERRORS:
                    pass  # reported
            await asyncio.sleep(AGAIN_S)

    def _opened(self) -> JobStore:
        if self._store is None:
            self._store = JobStore(self._url)
        return self._store
