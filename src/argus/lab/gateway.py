"""Pictures and their times from upstreams, for `argus calibrate` and `argus profile`."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from typing import Any, TypeVar

from argus.config import Upstream
from argus.core.family import UPSTREAM, Family, Variant
from argus.core.job import Job
from argus.core.profile import ModelProfile, Profile
from argus.lab.painting import Commission
from argus.workers.upstream import UpstreamWorker
from argus.workers.worker import Finished, Model, State, Unanswered, WorkerError

T = TypeVar("T")
R = TypeVar("R")

PROMPT = "a picture of two small things, one above the other"
MOST_TRIES = 2  # of a picture at a server
LOOK_S, PAUSE_S = 0.5, 0.05
FEWER = 3  # share of a variant's steps that are left for the other measurement


class Gateway:
    """Servers that hold the same model, each with as many requests in flight as its `concurrency`.

    For use outside asyncio. Raises WorkerError if none of them works.
    """

    def __init__(self, servers: Sequence[Upstream]) -> None:
        self._runner = asyncio.Runner()
        self.workers = [UpstreamWorker(one, Model(UPSTREAM)) for one in servers]
        self._runner.run(self._start())

    async def _start(self) -> None:
        for worker in self.workers:
            worker.start()
        ready = (worker.ready() for worker in self.workers)
        problems = await asyncio.gather(*ready, return_exceptions=True)
        if all(isinstance(problem, Exception) for problem in problems):
            await asyncio.gather(*(worker.stop(0.0) for worker in self.workers))
            raise WorkerError(f"No upstream works: {problems[0]}")

    def close(self) -> None:
        async def stop() -> None:
            await asyncio.gather(*(worker.stop(0.0) for worker in self.workers))

        self._runner.run(stop())
        self._runner.close()

    def paint(
        self, commissions: Iterable[Commission[T]]
    ) -> Iterator[tuple[Commission[T], Finished]]:
        """Have jobs' pictures made, all at once; one that a server fails at is made by another.

        Raises what the servers refuse, and WorkerError for a picture that none makes.
        """
        waiting = [(one, Counter[UpstreamWorker]()) for one in commissions]
        yield from self._run(self._painted(waiting))

    def _run(self, work: Coroutine[Any, Any, R]) -> R:
        try:
            return self._runner.run(work)
        except ExceptionGroup as errors:  # of a task group: its first ended the others
            raise errors.exceptions[0] from None

    async def _painted(
        self, waiting: list[tuple[Commission[T], Counter[UpstreamWorker]]]
    ) -> list[tuple[Commission[T], Finished]]:
        """Make the pictures of jobs, each with how often every server has failed at it."""
        count, made = len(waiting), list[tuple[Commission[T], Finished]]()

        async def make(worker: UpstreamWorker) -> None:
            while len(made) < count:
                own = (i for i, (_, failed) in enumerate(waiting) if failed[worker] < MOST_TRIES)
                at = next(own, None)
                if at is None or worker.state is not State.READY:
                    await asyncio.sleep(PAUSE_S)
                    continue
                one, failed = waiting.pop(at)
                try:
                    made.append((one, await self._once(worker, one.job)))
                except Unanswered as error:
                    failed[worker] += not error.busy
                    living = [other for other in self.workers if other.state is not State.STARTING]
                    if living and all(failed[other] >= MOST_TRIES for other in living):
                        raise
                    waiting.insert(0, (one, failed))

        async with asyncio.TaskGroup() as group:
            for worker in self.workers:
                for _ in range(worker.upstream.concurrency):
                    group.create_task(make(worker))
        return made

    async def _once(self, worker: UpstreamWorker, job: Job) -> Finished:
        """A picture by one server. Raises Unanswered when that goes away."""
        run = asyncio.create_task(worker.run(job))
        try:
            while not run.done():
                await asyncio.wait((run,), timeout=LOOK_S)
                if worker.state is State.STARTING and not run.done():
                    raise Unanswered(f"{worker.upstream.url} is out.")
            return run.result()
        finally:
            run.cancel()

    def latency_s(self, variant: Variant, in_flight: int, repeats: int) -> float:
        """Median seconds of a picture by the first server while so many are in flight."""
        return self._run(self._latency_s(variant, in_flight, repeats))

    async def _latency_s(self, variant: Variant, in_flight: int, repeats: int) -> float:
        worker = self.workers[0]
        seconds: list[float] = []

        async def client(number: int) -> None:
            for turn in range(1 + repeats):
                job = variant.job(f"{PROMPT} {number} {turn}", seed=turn)
                begun = time.monotonic()
                await self._once(worker, job)
                if turn:  # the first ones begin together, which later ones do not
                    seconds.append(time.monotonic() - begun)

        async with asyncio.TaskGroup() as group:
            for number in range(in_flight):
                group.create_task(client(number))
        return statistics.median(seconds)


def profile_upstreams(
    family: Family,
    servers: Mapping[str, Sequence[Upstream]],
    sizes: Collection[int],
    repeats: int,
    on_model: Callable[[str], None] = lambda name: None,
) -> Profile:
    """Measure models through their first upstream, by the number of requests in flight.

    What a picture takes at two numbers of steps tells a step from the rest, which is the profile's
    decoding. `sizes` beyond a server's concurrency are left out. Raises WorkerError when a server
    does not work, and what it refuses.
    """
    models = {}
    for name, held in servers.items():
        on_model(name)
        variant = next((v for v in family.variants.values() if v.model == name), family.exact)
        gateway = Gateway(held[:1])
        try:
            models[name] = _measured(gateway, variant, sizes, repeats)
        finally:
            gateway.close()
    where = {
        "name": UPSTREAM,
        "device": UPSTREAM,
        "servers": {name: held[0].url for name, held in servers.items()},
    }
    weights = dict.fromkeys(models, UPSTREAM)
    exact = family.exact
    return Profile(family.name, where, exact.width, exact.height, weights, models)


def _measured(
    gateway: Gateway, variant: Variant, sizes: Collection[int], repeats: int
) -> ModelProfile:
    concurrency = gateway.workers[0].upstream.concurrency
    fewer = max(1, variant.steps // FEWER)
    step_s, rest_s = {}, {}
    for size in sorted({1, *(size for size in sizes if size <= concurrency)}):
        whole_s = gateway.latency_s(variant, size, repeats)
        part_s = gateway.latency_s(replace(variant, steps=fewer), size, repeats)
        step_s[size], rest_s[size] = _split(whole_s, variant.steps, part_s, fewer)
    return ModelProfile(
        step_s=step_s, decode_s=rest_s, encode_s=0.0, picture_s=0.0,
        load_s={"disk": 0.0, "page_cache": 0.0}, peak_bytes=0,
    )  # fmt: skip


def _split(whole_s: float, steps: int, part_s: float, fewer: int) -> tuple[float, float]:
    """Seconds of a step and of the rest, from two numbers of steps. Where more steps do not take
    longer, all counts as steps."""
    if steps == fewer or part_s >= whole_s:
        return whole_s / steps, 0.0
    step_s = min((whole_s - part_s) / (steps - fewer), whole_s / steps)
    return step_s, whole_s - steps * step_s
