"""A worker whose engine is another image server: vLLM-Omni, SGLang, another Argus, a hosted API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from argus.config import Upstream
from argus.core.errors import BadRequest, ModelError
from argus.core.job import Job
from argus.workers.images_api import MOST_PAUSE_S, Answer, ImagesApi, Load, Unable
from argus.workers.worker import Finished, Model, OnPreview, State, Unanswered, WorkerError

log = logging.getLogger(__name__)

WATCH_S, GUARD_S = 1.0, 0.1  # between two looks at its health, and at whether it hangs
RETRY_S = 0.25  # the same while it is out
BAD_LOOKS, GOOD_LOOKS = 3, 2  # in a row, after which it is out, or back
BAD_JOBS = 3  # in a row, after which it gets no other for a while
MAX_LOSSES = 3  # of connections or of the server, while it makes the same picture
FIRST_TIMES = 10  # factor of the allowed silence before its first picture, and after it hung


class _Lost(Exception):
    """The server went away, or broke off, while it made a picture."""


@dataclass(eq=False)
class _Flight:
    """A request at the server. `shared_s` is `_shared_s` at its start."""

    job: Job
    begun_s: float
    shared_s: float
    asking: asyncio.Task[Answer]
    lost: bool = False


class UpstreamWorker:
    """Has a server make pictures, up to `concurrency` at once. For use from one asyncio loop.

    The server holds one model. It is out (`STARTING`) when it cannot be reached, when its health
    route fails several times in a row, when it does not have `served_model`, or when it hangs:
    pictures are its only signs of life. What was in flight is then asked again once it is back,
    unless the caller cancels it; a server that hung must first make the picture that it hung at.
    A server that is busy, refuses the key, or fails several times in a row is `FULL` for a while.
    A request that it refuses is a BadRequest, one that it fails at is Unanswered.

    Cancelling a job closes its connection. Whether the server then stops is its own affair.
    """

    opaque = True

    def __init__(
        self,
        upstream: Upstream,
        model: Model,
        on_change: Callable[[], None] = lambda: None,
        device_type: int = 0,
    ) -> None:
        self.upstream, self.model, self.device_type = upstream, model, device_type
        self.on_change = on_change
        self.state = State.STARTING
        self.problem: Exception | None = None
        self.restarts = 0
        self.busy_s = 0.0
        self.load_said: Load | None = None
        self.silence_s: Callable[[], float] = lambda: math.inf
        self._api: ImagesApi | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._gate = asyncio.Semaphore(upstream.concurrency)
        self._flights: set[_Flight] = set()
        self._shared_s = 0.0  # seconds, each divided among the requests in flight
        self._counted_s = 0.0  # when `busy_s` and `_shared_s` were counted last
        self._heard_s = 0.0  # when the last picture came, or the first request in flight was sent
        self._served = False  # whether it was ever ready
        self._proven = False  # whether it has made a picture
        self._proof: tuple[Job, float] | None = None  # what it hung at, and the time it gets now
        self._failures = self._pauses = 0  # in a row
        self._bad = self._good = 0  # looks in a row
        self._looked = asyncio.Event()  # set once it was looked at
        self._opened = asyncio.Event()  # set while it is ready, and once it never will be
        self._worried = asyncio.Event()  # set to have it looked at at once

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def silent_s(self) -> float:
        """Seconds for which it has been silent, beyond the half of what is allowed."""
        return max(0.0, self._silent_s - self._allowed_s / 2)

    @property
    def _silent_s(self) -> float:
        serving = self.state in (State.READY, State.FULL)
        return time.monotonic() - self._heard_s if serving and self._flights else 0.0

    @property
    def _allowed_s(self) -> float:
        return self.silence_s() * (1 if self._proven else FIRST_TIMES)

    def start(self) -> None:
        """Begin to look at the server."""
        self._api = ImagesApi(self.upstream)
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._guard())]

    async def ready(self) -> None:
        """Wait until the server was looked at. Raises why it is out, if it is."""
        await self._looked.wait()
        if self.problem is not None:
            raise self.problem

    def load(self, model: Model) -> None:
        """Another model than its own makes the worker unusable."""
        if model.source != self.model.source:
            self.problem = ModelError(f"{self.upstream.url} holds one model and loads no other.")
            self.state = State.UNUSABLE
            self._opened.set()
            self._lose()
        self.model = model
        self.on_change()

    def at_hand(self, model: Model) -> bool:
        return False

    async def keep(self, models: Sequence[Model], limit_s: float) -> None:
        """It holds one model."""

    def restart(self, model: Model) -> None:
        """Start again with its own model, after `load` of another."""
        self.model, self.problem = model, None
        self._close(State.STARTING)
        self._worried.set()

    async def run(
        self,
        job: Job,
        start: bytes | None = None,
        keep: tuple[int, ...] = (),
        previews: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Finished:
        """See `Worker.run`. It returns no latents and shows no unfinished pictures."""
        if start is not None or job.skip:
            raise WorkerError("An upstream cannot resume from latents.")
        for _ in range(MAX_LOSSES):
            async with self._gate:
                api = await self._open_api()
                with contextlib.suppress(_Lost):
                    return await self._ask(api, job)
        times = f"{MAX_LOSSES} times while making this picture"
        raise Unanswered(f"{self.upstream.url} broke off or went away {times}.")

    async def stop(self, grace_s: float) -> None:
        """Let jobs finish for up to `grace_s` seconds, then close their connections."""
        asking = [flight.asking for flight in self._flights]
        self.state = State.STOPPED
        self._opened.set()
        for task in self._tasks:
            task.cancel()
        if asking:
            await asyncio.wait(asking, timeout=grace_s)
        self._lose()
        await asyncio.gather(*self._tasks, *asking, return_exceptions=True)
        if self._api is not None:
            await self._api.close()

    def kill(self) -> None:
        """Nothing of it outlives the program."""

    async def _open_api(self) -> ImagesApi:
        """The server's API, once it is ready. Raises WorkerError when it never will be."""
        while self.state is not State.READY or self._api is None:
            if self.state is State.STOPPED:
                raise WorkerError("The worker was stopped.")
            if self.state is State.UNUSABLE:
                raise WorkerError(f"The worker is unusable: {self.problem}")
            await self._opened.wait()
        return self._api

    # --- one request

    async def _ask(self, api: ImagesApi, job: Job) -> Finished:
        """Have the server make a picture. Raises _Lost when it goes away meanwhile."""
        self._count()
        now = time.monotonic()
        if not self._flights:
            self._heard_s = now
        flight = _Flight(job, now, self._shared_s, asyncio.create_task(api.ask(job)))
        self._flights.add(flight)
        try:
            answer = await flight.asking
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            if flight.lost:
                raise _Lost from None
            self._failed(Unable("it forgot a request"))
            raise Unanswered(f"{self.upstream.url} forgot this request.") from None
        except BadRequest:
            self._heard_s = time.monotonic()
            raise
        except Unable as error:
            self._failed(error)
            busy = error.pause_s is not None
            raise Unanswered(f"{self.upstream.url} made no picture: {error}", busy) from None
        except Exception as error:  # the connection cannot be made, or breaks off
            problem = await api.problem()
            if problem is None:
                self._failed(Unable(f"it broke off ({type(error).__name__})"))
            else:
                self._out(problem)
            raise _Lost from None
        finally:
            flight.asking.cancel()
            self._count()
            self._flights.discard(flight)
        self._heard_s, self._proven = time.monotonic(), True
        self._failures = self._pauses = 0
        worker_s = self._shared_s - flight.shared_s
        return Finished(answer.image, timings_ms=answer.timings_ms, worker_s=worker_s)

    def _count(self) -> None:
        """Count the time since the last call for the requests in flight."""
        now = time.monotonic()
        if self._flights:
            self.busy_s += now - self._counted_s
            self._shared_s += (now - self._counted_s) / len(self._flights)
        self._counted_s = now

    def _failed(self, error: Unable) -> None:
        """Count a failure. The server gets no other request for a while if it says so, or after
        several in a row."""
        self._heard_s = time.monotonic()
        self._failures += 1
        pause_s = error.pause_s
        if self.state is not State.READY:
            return
        if pause_s is None and self._failures >= BAD_JOBS:
            pause_s = min(MOST_PAUSE_S, 2.0**self._pauses)
            self._pauses += 1
        if pause_s is None:
            return
        log.warning("%s gets no requests for %g s: %s", self.upstream.url, pause_s, error.reason)
        asyncio.get_running_loop().call_later(pause_s, self._reopen)
        self._close(State.FULL)
        self.on_change()

    def _reopen(self) -> None:
        if self.state is State.FULL:
            self._open()

    # --- its state

    def _open(self) -> None:
        self.state, self.problem, self._served = State.READY, None, True
        self._opened.set()
        self._looked.set()
        self.on_change()

    def _close(self, state: State) -> None:
        self.state = state
        self._opened.clear()

    def _out(self, why: str) -> None:
        """The server is out: lose what it has in flight, and have it looked at."""
        if self.state not in (State.READY, State.FULL):
            return
        log.warning("%s is out: %s", self.upstream.url, why)
        self._close(State.STARTING)
        self.problem = WorkerError(f"{self.upstream.url} is out: {why}.")
        self._lose()
        self._worried.set()
        self.on_change()

    def _lose(self) -> None:
        self._count()
        for flight in self._flights:
            flight.lost = True
            flight.asking.cancel()

    async def _watch(self) -> None:
        """Look at the server's health, regularly and when something went wrong."""
        assert self._api is not None
        while True:
            self._worried.clear()
            try:
                await self._look(self._api)
            except Exception:
                log.exception("Looking at %s failed", self.upstream.url)
            calm = self.state in (State.READY, State.FULL) and not self._bad
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S if calm else RETRY_S):
                    await self._worried.wait()

    async def _look(self, api: ImagesApi) -> None:
        if self.state in (State.READY, State.FULL):
            problem = await api.problem()
            self._good, self._bad = 0, 0 if problem is None else self._bad + 1
            if problem is not None and self._bad >= BAD_LOOKS:
                self._out(problem)
            self.load_said = None if problem is not None else await api.load()
        elif self.state is State.STARTING:
            problem = await self._missing(api)
            self._good = self._good + 1 if problem is None else 0
            if problem is not None:
                self._tell(problem)
            elif self._good >= (GOOD_LOOKS if self._looked.is_set() else 1):
                self._bad = 0
                self.restarts += self._served
                log.info("%s is ready", self.upstream.url)
                self._open()

    def _tell(self, problem: str) -> None:
        """Say once why it is out."""
        said = WorkerError(f"{self.upstream.url} is out: {problem}.")
        if str(said) != str(self.problem):
            log.warning("%s", said)
        self.problem = said
        self._looked.set()

    async def _missing(self, api: ImagesApi) -> str | None:
        """What keeps a server that is out from being ready."""
        problem = await api.problem() or await api.unserved()
        if problem is not None or self._proof is None:
            return problem
        job, limit_s = self._proof
        try:
            async with asyncio.timeout(limit_s):
                await api.ask(job)
        except BadRequest:
            pass
        except TimeoutError:
            return f"it makes no picture within {limit_s:.1f} s"
        except Exception:
            return "it hung, and makes no picture"
        self._proof = None
        return None

    async def _guard(self) -> None:
        """Give a server up that hangs, and a request that is forgotten while others are made."""
        while True:
            looked_s = time.monotonic()
            await asyncio.sleep(GUARD_S)
            now = time.monotonic()
            if now - looked_s > 5 * GUARD_S:  # this loop was held up
                self._heard_s = now
            allowed_s = self._allowed_s
            if self._silent_s > allowed_s:
                first = min(self._flights, key=lambda flight: flight.begun_s)
                self._proof = first.job, FIRST_TIMES * allowed_s
                self._out(f"it has made no picture for {self._silent_s:.1f} s")
            for flight in self._flights:
                if now - flight.begun_s > self.upstream.concurrency * allowed_s:
                    flight.asking.cancel()
