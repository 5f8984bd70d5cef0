"""All workers of a server: which model each holds, and when each request runs."""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from argus.control.batching import Batching
from argus.control.policy import Cluster, soonest
from argus.control.request import Request
from argus.control.step_curve import StepCurve
from argus.control.variants import EXACT, VariantTable
from argus.control.worker_queue import WorkerQueue, mean_slowness
from argus.core.errors import Expired
from argus.core.job import Job
from argus.workers.worker import (
    Finished,
    Model,
    OnPreview,
    State,
    Unanswered,
    Worker,
    WorkerError,
)

log = logging.getLogger(__name__)

HANDOVER_STEPS = 2.0  # steps: decoding, and the time of a message
BATCH_HANDOVER_STEPS = 1.0  # where batches do not mix: one's last step, the next one's first
WARM_UP = 1  # trials that are not counted: the first picture of a process takes longer
MOST_TRIALS, TRIALS_S = 9, 4.0
CALIBRATIONS = 3  # tries, where workers die in them
KEEP_LOADS, LEAST_KEEP_S = 5.0, 60.0  # times of all models' loads, seconds, for loading ahead
STRAGGLE = 3.0  # times of the first measured worker, for which the others are waited for
HELD_S, HELD_LOADS = 5.0, 2.0  # seconds, or loads, that a pinned model stays after its last use
PINNED_LOOK_S = 0.5  # between looks whether a worker can give up a pinned model for another one
MOST_FAILURES = 3  # of workers at the same job, after which it fails
DEADLY = 2  # deaths of workers at the same job, after which it runs alone
SILENT_STEPS = 10  # of the largest batch, for which a busy worker may be silent
LEAST_SILENCE_S = 2.0  # the same where steps are short: a process may wait for a core
OVERDUE = 2.0  # times of its longest running picture, for which an upstream may be silent
LEAST_OVERDUE_S = 1.0  # the same where pictures take less: a network may hesitate
SUSPECT_S = 1.0  # of silence, from which it counts as wait: more than between two beats
MOST_YIELDING = 4  # on a worker: a larger batch makes little faster, and loses more when it yields


class HandedBack(Exception):
    """The worker cannot run a request: it died, hangs, fails at it or is to hold another model."""


class Yielded(Exception):
    """A request that yields made room for others: run it when workers have room."""


class TooLate(Expired):
    """No time is left for a request's variant; another variant may be faster."""


@dataclass(frozen=True)
class _Run:
    """The arguments of `Worker.run` for a request, the future of its result, and the context in
    which it was asked for: its work may begin in that of another request."""

    job: Job
    start: bytes | None
    keep: tuple[int, ...]
    previews: int
    on_preview: OnPreview | None
    answer: asyncio.Future[Finished]
    context: Context = field(default_factory=copy_context)


class Fleet:
    """The workers of a server, a queue each. For use from one asyncio loop.

    `models` (d, m) are what a worker of a type loads for each model of the variant table; workers
    begin with their type's home model. Workers may join (`add`) and leave (`retire`) at any time;
    those that left keep their numbers until another of their type takes it. `scale` is the workers'
    time as a multiple of the table's, `idle_scale` the same as `calibrate` found it, before there
    was any load. `on_change` is called when workers come or go. With `grows` workers join while it
    serves: one that is unusable says nothing of those to come, and a model that one cannot load is
    kept from that one alone.
    """

    def __init__(
        self,
        table: VariantTable,
        models: Sequence[Sequence[Model]],
        workers: Sequence[Worker],
        batching: Batching,
        on_change: Callable[[], None] = lambda: None,
        grows: bool = False,
    ) -> None:
        self._table, self._models, self._batching = table, models, batching
        self._grows, self._started = grows, False
        self._on_change = on_change
        self._best_batch = table.best_batch.tolist()
        self.workers: list[Worker] = []
        self.queues: list[WorkerQueue[Request]] = []
        self._gone: set[int] = set()  # numbers of workers that left
        self._runs: dict[Request, _Run] = {}  # of queued and running requests
        self._tasks: dict[Request, asyncio.Task[None]] = {}  # of running ones
        self._planned: list[int] = []  # the models of the last plan, without pinned ones
        self._pinned: dict[int, float] = {}  # until when each stays
        self._awaited = Counter[int]()  # requests that wait for a worker with a model
        self._giving_back: asyncio.TimerHandle | None = None
        self._loaded_at: dict[int, float] = {}
        self._broken: dict[tuple[int, int], Exception] = {}  # by `_site` and model
        self._reserved: dict[Request, WorkerQueue[Request]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._changed = asyncio.Event()
        self.idle_scale = 1.0
        self.loads = 0
        for worker in workers:
            self.add(worker)

    def add(self, worker: Worker) -> int:
        """Add a worker that holds or loads its type's home model; returns its number."""
        kind = worker.device_type
        alike = [one for one in self.queues if one.kind == kind]
        number = next((one.number for one in alike if one.number in self._gone), len(self.queues))
        queue = WorkerQueue[Request](
            number=number,
            kind=kind,
            model=self._table.home(kind),
            target=self._table.home(kind),
            step_s=self._table.batch_step_s,
            batching=self._batching,
            batch_limit=self._batch_limit,
            largest_batch=int(self._table.batches[-1]),
            handover_steps=_handover_steps(self._batching),
            slowness=mean_slowness([one for one in alike if one.known] or self.queues),
            alive=not self._started,  # one that joins later lives once it has loaded
            ready=False,
            known=False,
        )
        self._broken = {of: why for of, why in self._broken.items() if of[0] != number}
        if number in self._gone:
            self._gone.discard(number)
            self.workers[number], self.queues[number] = worker, queue
            self._planned[number] = queue.target
        else:
            self.workers.append(worker)
            self.queues.append(queue)
            self._planned.append(queue.target)
        if worker.opaque:
            sizes = range(1, self._batch_limit(kind, queue.model) + 1)
            known = [self._table.batch_step_s(kind, queue.model, size) for size in sizes]
            queue.curve = StepCurve(known)
        worker.silence_s = partial(self._silence_s, worker, queue)
        worker.on_change = partial(self.changed, number)
        return number

    def retire(self, number: int) -> Worker:
        """Take out a worker that is gone or leaves: its requests are handed back. Returns it, to be
        stopped."""
        worker, queue = self.workers[number], self.queues[number]
        self._gone.add(number)
        worker.on_change = lambda: None
        self._leave(queue, died=False)
        for _, _, request in list(queue.running):  # those that several workers died of
            self._forget(request, queue)
            self._fail(request, HandedBack())
        self._on_change()
        self._tell()
        return worker

    def _batch_limit(self, kind: int, model: int) -> int:
        return min(int(self._best_batch[kind][model]), self._models[kind][model].max_batch)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the workers that have not left."""
        return [number for number in range(len(self.workers)) if number not in self._gone]

    @property
    def present(self) -> list[Worker]:
        """The workers that have not left."""
        return [self.workers[number] for number in self.numbers]

    def rebatch(self, batching: Batching) -> None:
        """Have all workers form batches by another rule. What runs goes on; what is queued begins
        by the new rule."""
        self._batching = batching
        for queue in self.queues:
            queue.rebatch(batching, _handover_steps(batching))
            self._go_on(queue)

    @property
    def scale(self) -> float:
        """The mean slowness of the workers that were measured."""
        return mean_slowness(self.queues)

    @property
    def targets(self) -> list[int]:
        """The model that every worker holds, loads or is to load."""
        return [queue.target for queue in self.queues]

    @property
    def planned(self) -> list[int]:
        """The model that every worker is to hold by the last plan, pins aside."""
        return list(self._planned)

    @property
    def ready(self) -> bool:
        """Whether any worker can serve."""
        return any(one.serving >= 0 for one in self.queues)

    @property
    def settled(self) -> bool:
        """Whether every worker that is alive serves the model that it is to hold."""
        return all(one.serving == one.target for one in self.queues_present if one.alive)

    @property
    def wanted(self) -> set[int]:
        """The models that workers hold, load or are to load."""
        return {queue.target for queue in self.queues_present}

    @property
    def problem(self) -> Exception | None:
        """Why no worker will ever work; None if one may."""
        present = self.present
        if (
            not self._grows
            and present
            and all(worker.state is State.UNUSABLE for worker in present)
        ):
            return present[0].problem
        return None

    @property
    def idle(self) -> bool:
        """Whether no request is queued, running or on its way to a worker."""
        return not any(one.queued or one.running or one.queued_s > 0 for one in self.queues)

    def spare(self, number: int) -> bool:
        """Whether a worker serves, and has no requests but such that yield."""
        queue = self.queues[number]
        return queue.serving >= 0 and all(request.yields for request in _requests(queue))

    @property
    def room(self) -> int:
        """Number of further requests that yield which spare workers could run now."""
        spare = [queue for queue in self.queues if self.spare(queue.number)]
        most = [min(MOST_YIELDING, one.batch_limit(one.kind, one.model)) for one in spare]
        return sum(
            max(0, limit - len(_requests(one))) for limit, one in zip(most, spare, strict=True)
        )

    def make_room(self, count: int) -> None:
        """Hand back requests that yield, those of whole workers, until `count` workers that serve
        have no request; first where the fewest are lost."""
        spare = [queue for queue in self.queues if self.spare(queue.number)]
        for queue in sorted(spare, key=lambda queue: len(_requests(queue)))[:count]:
            for request in _requests(queue):
                self._forget(request, queue)
                self._fail(request, Yielded())

    @property
    def unyielding(self) -> int:
        """Number of queued and running requests that do not yield."""
        return sum(not request.yields for one in self.queues for request in _requests(one))

    @property
    def running(self) -> int:
        """Number of requests that workers run now."""
        return sum(len(one.running) for one in self.queues)

    @property
    def backlog(self) -> int:
        return sum(len(one.queued) + len(one.running) for one in self.queues)

    def cluster(self) -> Cluster:
        """The workers as policies see them, with waits in seconds of the variant table."""
        now, scale, queues = time.monotonic(), self.scale, self.queues
        return Cluster(
            now,
            [one.kind for one in queues],
            [one.serving for one in queues],
            [self._wait_s(one, now) / scale for one in queues],
            [len(one.running) for one in queues],
            scale,
        )

    def _wait_s(self, queue: WorkerQueue[Request], now: float) -> float:
        """Predicted seconds until a request that is sent to a worker now begins."""
        wait_s = queue.free_at_s - now if queue.free_at_s > now else 0.0
        if queue.running:
            silent_s = self.workers[queue.number].silent_s
            wait_s += silent_s if silent_s > SUSPECT_S else 0.0
        return wait_s

    def start(self) -> None:
        self._started = True
        for worker in self.workers:
            worker.start()

    async def calibrate(self, jobs: Sequence[tuple[Job, float]]) -> float:
        """Time a picture, alone, on every worker that is ready; returns the seconds of the exact
        variant on the fastest worker, as the slowness of the measured ones gives it. The others
        are measured by the requests they serve.

        `jobs` (m,) are a job for each model, and its work steps. Raises WorkerError when no worker
        can work, or none makes a picture.
        """
        exact_s = self._table.alone_s[EXACT]

        async def timed(worker: Worker, queue: WorkerQueue[Request]) -> float:
            job, work_steps = jobs[queue.model]
            seconds: list[float] = []
            while len(seconds) <= WARM_UP or (
                len(seconds) < MOST_TRIALS and sum(seconds[WARM_UP:]) < TRIALS_S
            ):
                begun, restarts = time.monotonic(), worker.restarts
                await worker.run(job)
                if worker.restarts == restarts:  # else it includes the start of a process
                    seconds.append(time.monotonic() - begun)
            took = statistics.median(seconds[WARM_UP:])
            step_s = self._table.batch_step_s(queue.kind, queue.model, 1)
            queue.set_slowness(took / (work_steps * step_s))
            able = self._table.runs[EXACT, queue.kind]
            return queue.slowness * float(exact_s[queue.kind]) if able else math.inf

        await self.holding(None, math.inf)
        await self._keep_all()
        for _ in range(CALIBRATIONS):
            await self.holding(None, math.inf)
            trials = [
                asyncio.create_task(timed(worker, queue))
                for worker, queue in zip(self.workers, self.queues, strict=True)
                if worker.state is State.READY
            ]
            times, problem = await _without_stragglers(trials)
            if times:
                for queue in self.queues:
                    if not queue.known:
                        queue.slowness = self.scale
                self.idle_scale = self.scale
                return min(*times, self.scale * self._table.slo_s)  # other types may be faster
        raise WorkerError(f"No worker makes a picture: {problem}")

    async def _keep_all(self) -> None:
        """Have the workers that are ready load their types' other models too, where there is room:
        the first burst does not wait for that then. Processes that start later load them when they
        must."""
        limit_s = max(LEAST_KEEP_S, KEEP_LOADS * float(self._table.load_s.max(axis=0).sum()))
        keeping = []
        for worker, queue in zip(self.workers, self.queues, strict=True):
            if worker.state is State.READY:
                able = [m for m in range(len(self._table.models)) if self._can_hold(queue, m)]
                models = [self._model(queue, model) for model in able]
                keeping.append(worker.keep(models, limit_s))
        await asyncio.gather(*keeping)

    # --- work

    @property
    def backlog_s(self) -> float:
        """Worker-seconds of work that the queued and running requests are."""
        now = time.monotonic()
        for one in self.queues:
            one.advance(now)
        return sum(one.backlog_s for one in self.queues)

    def expected(self, request: Request, number: int, model: int) -> tuple[int, float]:
        """How many requests are queued at a worker, and the seconds after which one more, decided
        on but not sent yet, should be done."""
        queue = self.queues[number]
        size = min(len(queue.running) + 1, queue.batch_limit(queue.kind, model))
        work_s = request.work_steps * self._table.batch_step_s(queue.kind, model, size)
        return len(queue.queued), self._wait_s(queue, time.monotonic()) + work_s * self.scale

    def type_of(self, number: int) -> str:
        """The name of a worker's type of device."""
        return self._table.types[self.queues[number].kind]

    def reserve(self, request: Request, number: int) -> None:
        """Reserve a worker's time for a request while its latents are being fetched."""
        self._reserved[request] = self.queues[number]
        self.queues[number].reserve(request, time.monotonic())

    def release(self, request: Request, number: int) -> None:
        """Release the time that was reserved for a request that goes elsewhere."""
        self._was_reserved(request, self.queues[number])
        self.queues[number].release(request)
        self.queues[number].next_s(time.monotonic())

    def _was_reserved(self, request: Request, queue: WorkerQueue[Request]) -> None:
        """Forget what was reserved in a queue that another one has replaced since."""
        if self._reserved.pop(request, queue) is not queue:
            request.reserved_s = 0.0

    async def run(
        self,
        request: Request,
        job: Job,
        number: int,
        model: int,
        start: bytes | None = None,
        keep: tuple[int, ...] = (),
        previews: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Finished:
        """Run a request's job with `model` on worker `number`; the rest as for `Worker.run`.

        Raises HandedBack when the worker cannot, so that the request is to be routed again; TooLate
        when it was queued until no time was left to run it; and what the worker raises. Cancelling
        the caller cancels the request.
        """
        queue = self.queues[number]
        self._was_reserved(request, queue)
        if queue.serving != model:
            queue.release(request)
            raise HandedBack
        answer: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()
        self._runs[request] = _Run(job, start, keep, previews, on_preview, answer)
        queue.advance(time.monotonic())
        queue.enqueue(request, time.monotonic())
        self._go_on(queue)
        limit_s = min(request.expires_s, request.begin_by_s) - time.monotonic()
        timer = None
        if limit_s < math.inf:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(0.0, limit_s), self._expire, request, queue)
        try:
            return await answer
        except asyncio.CancelledError:
            self._forget(request, queue)
            raise
        finally:
            self._runs.pop(request, None)
            if timer is not None:
                timer.cancel()

    def _fail(self, request: Request, error: Exception) -> None:
        run = self._runs.get(request)
        if run is not None and not run.answer.done():
            run.answer.set_exception(error)

    def _expire(self, request: Request, queue: WorkerQueue[Request]) -> None:
        """Drop a request whose time is over, unless it is running."""
        if self._runs[request].answer.done() or (request in self._tasks and queue.alive):
            return
        self._forget(request, queue)
        self._fail(request, TooLate("The deadline left no time to make the picture."))

    def _forget(self, request: Request, queue: WorkerQueue[Request]) -> None:
        task = self._tasks.pop(request, None)
        if task is not None:
            task.cancel()
        queue.remove(request, time.monotonic(), done=False)
        self._go_on(queue)

    def _go_on(self, queue: WorkerQueue[Request]) -> None:
        """Start requests that can run, drop those that are too late, and call again when that
        changes."""
        now = time.monotonic()
        queue.advance(now)
        begun, dropped = queue.begin(now)
        for request in dropped:
            self._fail(request, TooLate("The deadline left no time to make the picture."))
        for request in begun:
            context = self._runs[request].context
            work = self._work(request, queue, queue.model)
            self._tasks[request] = asyncio.create_task(work, context=context)
        at = queue.next_s(now)
        timer = self._timers.pop(queue.number, None)
        if timer is not None:
            timer.cancel()
        if queue.queued and at < math.inf:
            loop = asyncio.get_running_loop()
            delay = max(0.01, at - now)
            self._timers[queue.number] = loop.call_later(delay, self._go_on, queue)
        self._settle(queue)

    async def _work(self, request: Request, queue: WorkerQueue[Request], model: int) -> None:
        worker, run, done = self.workers[queue.number], self._runs[request], False
        try:
            if queue.model != model:  # it was taken up since
                raise HandedBack
            finished = await worker.run(run.job, run.start, run.keep, run.previews, run.on_preview)
            done = True
            if not run.answer.done():
                run.answer.set_result(finished)
        except asyncio.CancelledError:
            raise
        except Unanswered as error:
            if not error.busy:
                request.failed_at += (queue.number,)
            failed = not error.busy and len(request.failed_at) >= MOST_FAILURES
            if not run.answer.done():
                run.answer.set_exception(error if failed else HandedBack())
        except Exception as error:
            if not run.answer.done():
                run.answer.set_exception(error)
        finally:
            if self._tasks.get(request) is asyncio.current_task():
                del self._tasks[request]
                queue.remove(request, time.monotonic(), done)
                self._go_on(queue)

    # --- models

    def move(self, targets: Sequence[int]) -> None:
        """Have the workers hold the models `targets` (w,). A worker that is to hold another one
        hands back its queued requests and, unless that is at hand, finishes its running ones and
        loads. Pinned models stay with one worker until nobody has asked for them for a while."""
        sound = [
            model if self._can_hold(queue, model) else before
            for queue, model, before in zip(self.queues, targets, self._planned, strict=True)
        ]
        sound = [
            model if self._can_hold(queue, model) else self._table.home(queue.kind)
            for queue, model in zip(self.queues, sound, strict=True)
        ]
        self._planned = list(sound)
        for queue, target in zip(self.queues, self._with_pinned(sound), strict=True):
            queue.target = target
        for queue in self.queues:
            self._settle(queue)
        self._drain_all()

    def require(self, model: int) -> None:
        """Have one worker hold a model, because a request pins it, until nobody has waited for it
        for a while (`_held_s`); then the worker goes back to what the plan wants. Where all workers
        hold pinned ones, one that is idle gives its own up.

        Raises WorkerError for a model that could not be loaded.
        """
        able = [queue for queue in self.queues_present if self._table.holds[queue.kind, model]]
        broken = [
            self._broken[self._site(queue), model] for queue in able
            if (self._site(queue), model) in self._broken
        ]  # fmt: skip
        if able and len(broken) == len(able):
            raise WorkerError(f"{self._table.models[model]} cannot work: {broken[0]}")
        known = model in self._pinned
        self._hold(model)
        if not known or model not in self.wanted:
            self.move(self._planned)

    def _hold(self, model: int, wait_s: float = 0.0) -> None:
        """Keep a pinned model for a while after `wait_s`."""
        self._pinned[model] = time.monotonic() + wait_s + self._held_s(model)
        self._give_back_later()

    def _held_s(self, model: int) -> float:
        """Seconds that a pinned model stays after its last use: a long load is to pay."""
        return max(HELD_S, HELD_LOADS * float(self._table.load_s[:, model].min()) * self.scale)

    def _give_back_later(self) -> None:
        """Set the timer for when the first pinned model may be given back."""
        if self._giving_back is not None:
            self._giving_back.cancel()
            self._giving_back = None
        if self._pinned:
            left_s = max(0.0, min(self._pinned.values()) - time.monotonic())
            loop = asyncio.get_running_loop()
            self._giving_back = loop.call_later(left_s, self._give_back)

    def _give_back(self) -> None:
        """Have the workers hold what the plan wants again, where nobody asks for pinned models."""
        now = time.monotonic()
        for model, until in self._pinned.items():
            if until <= now and self._is_used(model):
                self._pinned[model] = now + self._held_s(model)
        self.move(self._planned)
        self._give_back_later()

    def _is_used(self, model: int) -> bool:
        """Whether requests that pin a model wait for a worker with it, or in its queue."""
        return self._awaited[model] > 0 or any(
            getattr(request, "pinned", False)
            for queue in self.queues_present
            if queue.model == model
            for _, _, request in queue.queued
        )

    async def holding(
        self,
        model: int | None,
        limit_s: float,
        rather_not: Collection[int] = (),
        insist: bool = True,
    ) -> int:
        """The worker that holds a model (None: any) and begins soonest, once there is one; one of
        `rather_not` only where no other does.

        Those that `insist` require a model again that was given up for another one. Raises
        WorkerError if there is none within `limit_s` seconds.
        """
        if model is None:
            return await self._holding(None, limit_s, rather_not, insist)
        self._awaited[model] += 1
        try:
            worker = await self._holding(model, limit_s, rather_not, insist)
        finally:
            self._awaited[model] -= 1
        if model in self._pinned:
            self._hold(model, self._wait_s(self.queues[worker], time.monotonic()))
        return worker

    async def _holding(
        self, model: int | None, limit_s: float, rather_not: Collection[int], insist: bool
    ) -> int:
        deadline = time.monotonic() + limit_s
        while True:
            cluster = self.cluster()
            able = [
                w for w, held in enumerate(cluster.models)
                if (held >= 0 if model is None else held == model)
            ]  # fmt: skip
            worker = soonest([w for w in able if w not in rather_not] or able, cluster)
            if worker is not None:
                return worker
            if self.problem is not None:
                raise WorkerError(f"No worker can work: {self.problem}")
            left = deadline - time.monotonic()
            if left <= 0:
                what = "is ready" if model is None else f"holds {self._table.models[model]}"
                raise WorkerError(f"No worker {what} yet.")
            changed = self._changed
            if insist and model is not None and model not in self.wanted:
                self.require(model)
                left = min(left, PINNED_LOOK_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(left if left < math.inf else None):
                    await changed.wait()

    def _with_pinned(self, targets: list[int]) -> list[int]:
        now, given_up = time.monotonic(), set[int]()
        self._pinned = {
            model: until
            for model, until in self._pinned.items()
            if until > now or self._awaited[model]
        }
        for model in self._pinned:
            holders = [
                queue.number for queue in self.queues_present
                if self._can_hold(queue, model)
            ]  # fmt: skip
            if model in given_up or any(targets[number] == model for number in holders):
                continue
            present = [held for n, held in enumerate(targets) if n not in self._gone]
            counts = {number: present.count(targets[number]) for number in holders}
            spare = [n for n in holders if targets[n] not in self._pinned or counts[n] > 1]
            idle = [n for n in holders if self._is_idle(n) and self.queues[n].target == targets[n]]
            if spare:
                there = [n for n in spare if self.queues[n].target == model]
                targets[max(there or spare, key=lambda n: counts[n])] = model
            elif idle:  # more models are pinned than there are workers: first what is not exact
                number = min(idle, key=lambda n: (targets[n] == 0, self._pinned[targets[n]]))
                given_up.add(targets[number])
                targets[number] = model
        for model in given_up:
            del self._pinned[model]
        return targets

    def _is_idle(self, number: int) -> bool:
        """Whether a worker serves, and has no requests; not at once after a load, since those that
        waited for it are only on their way."""
        queue = self.queues[number]
        loaded_s = time.monotonic() - self._loaded_at.get(number, -math.inf)
        idle = queue.serving >= 0 and not _requests(queue) and queue.queued_s <= 0
        return idle and loaded_s >= PINNED_LOOK_S

    def _can_hold(self, queue: WorkerQueue[Request], model: int) -> bool:
        """Whether a worker can hold a model, as far as is known."""
        broken = (self._site(queue), model) in self._broken
        return bool(self._table.holds[queue.kind, model]) and not broken

    def _site(self, queue: WorkerQueue[Request]) -> int:
        """What a model that cannot be loaded is kept from: on other machines the one worker, which
        may lack what others have; on this one all workers of its type."""
        return queue.number if self._grows else queue.kind

    @property
    def queues_present(self) -> list[WorkerQueue[Request]]:
        """The queues of the workers that have not left."""
        return [queue for queue in self.queues if queue.number not in self._gone]

    def _drain_all(self) -> None:
        """Drain the workers that are to hold another model; again after one took its up at once,
        which may spare another."""
        while any(self._drain(queue) for queue in self.queues):
            pass

    def _drain(self, queue: WorkerQueue[Request]) -> bool:
        """Have a worker that can be spared go on to the model that it is to hold; whether it serves
        with that at once."""
        if not queue.moves or not self._spared(queue):
            return False  # it is drained when another worker is back
        log.info(
            "Worker %d goes from %s to %s", queue.number,
            self._table.models[queue.model], self._table.models[queue.target],
        )  # fmt: skip
        queue.advance(time.monotonic())
        for request in queue.drain():
            self._fail(request, HandedBack())
        self._settle(queue)
        return queue.ready

    def _spared(self, queue: WorkerQueue[Request]) -> bool:
        """Whether service goes on without a worker: another serves, or no other is alive; and the
        first model, the exact variant's, stays on some worker while the plan has it anywhere."""
        others = [one for one in self.queues if one is not queue]
        serving = [one.serving for one in others if one.serving >= 0]
        if not serving:
            return not any(one.alive for one in others)
        wanted = any(one.target == 0 for one in others if one.alive)
        return queue.model != 0 or 0 in serving or not wanted

    def _settle(self, queue: WorkerQueue[Request]) -> None:
        """Load the model of a drained worker; it serves again if it holds that already."""
        worker, target = self.workers[queue.number], queue.target
        if queue.ready or not queue.alive or worker.state is not State.READY:
            return
        now, model = time.monotonic(), self._model(queue, target)
        if queue.model == target:
            queue.advance(now)
            queue.ready = True
            self._loaded_at[queue.number] = now
        elif worker.at_hand(model):
            self.loads += 1
            worker.load(model)
            queue.take_up(target, now)
            queue.next_s(now)
            self._loaded_at[queue.number] = now
        elif not queue.running:
            queue.model = target
            self.loads += 1
            worker.load(model)
        else:
            return
        self._tell()

    def _model(self, queue: WorkerQueue[Request], model: int) -> Model:
        """What a worker loads for a model."""
        device = self.workers[queue.number].model.device
        return replace(self._models[queue.kind][model], device=device)

    def changed(self, number: int) -> None:
        """Called by a worker whose state may have changed."""
        worker, queue = self.workers[number], self.queues[number]
        now, home = time.monotonic(), self._table.home(queue.kind)
        if worker.state is State.UNUSABLE and queue.model != home:
            problem = worker.problem or WorkerError("It could not be loaded.")
            log.error("%s stays out: %s", self._table.models[queue.model], problem)
            self._broken[self._site(queue), queue.model] = problem
            self._pinned.pop(queue.model, None)
            self._leave(queue)
            queue.model = home
            self.move(self._planned)
            worker.restart(self._model(queue, home))
            self._on_change()
        elif worker.state is State.READY:
            came_back = not queue.alive
            queue.restart_at(now)
            self._drain(queue)  # the plan may have changed since
            self._drain_all()
            self._go_on(queue)
            if came_back:
                self._on_change()
        elif worker.state is State.FULL:
            for request in queue.drain():
                self._fail(request, HandedBack())
        elif queue.alive or worker.state is State.UNUSABLE:
            self._leave(queue)
            self._on_change()
        self._tell()

    def _leave(self, queue: WorkerQueue[Request], died: bool = True) -> None:
        """Hand back the requests of a worker that died or leaves, except those that `DEADLY`
        workers died of: the worker runs these alone when it is back. Upstreams die of none."""
        opaque = self.workers[queue.number].opaque or not died
        queue.advance(time.monotonic())
        queue.alive = False
        running = [request for _, _, request in queue.running]
        for request in queue.evict(running=False):
            self._fail(request, HandedBack())
        for request in running:
            if not opaque:
                request.deaths += 1
                request.failed_at += (queue.number,)  # which dies again where it is at fault
            if opaque or request.deaths < DEADLY:
                task = self._tasks.pop(request, None)
                if task is not None:
                    task.cancel()
                queue.remove(request, time.monotonic(), done=False)
                self._fail(request, HandedBack())
            elif min(request.expires_s, request.begin_by_s) <= time.monotonic():
                self._expire(request, queue)

    def _silence_s(self, worker: Worker, queue: WorkerQueue[Request]) -> float:
        """Seconds of silence after which a busy worker counts as hung."""
        if worker.opaque:
            alone_s = self._table.alone_s[self._table.model == queue.model, queue.kind].max()
            longest_s = queue.longest_s or queue.slowness * float(alone_s)
            return max(LEAST_OVERDUE_S, OVERDUE * longest_s)
        held = np.flatnonzero(self._table.holds[queue.kind]) if queue.guests else [queue.model]
        largest = int(self._table.batches[-1])
        step_s = queue.slowness * max(
            self._table.batch_step_s(queue.kind, int(model), largest) for model in held
        )
        size_factor = max((request.size_factor for _, _, request in queue.running), default=1.0)
        return max(LEAST_SILENCE_S, SILENT_STEPS * max(1.0, size_factor) * step_s)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def stop(self, grace_s: float) -> None:
        if self._giving_back is not None:
            self._giving_back.cancel()
        for timer in self._timers.values():
            timer.cancel()
        await asyncio.gather(*(worker.stop(grace_s) for worker in self.present))

    def kill(self) -> None:
        """End all processes at once. For the end of the program."""
        for worker in self.workers:
            worker.kill()


def _handover_steps(batching: Batching) -> float:
    return HANDOVER_STEPS if batching.stepwise else BATCH_HANDOVER_STEPS


def _requests(queue: WorkerQueue[Request]) -> list[Request]:
    """The queued and running requests of a worker, queued ones first."""
    return [request for _, _, request in (*queue.queued, *queue.running)]


async def _without_stragglers(
    trials: Sequence[asyncio.Task[float]],
) -> tuple[list[float], BaseException | None]:
    """The results of those that are done soon after the first success, and the first error."""
    begun, limit_s = time.monotonic(), None
    times: list[float] = []
    problem: BaseException | None = None
    pending = set(trials)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            for one in done:
                error = one.exception()
                if error is None:
                    times.append(one.result())
                    limit_s = limit_s or TRIALS_S + STRAGGLE * (time.monotonic() - begun)
                else:
                    problem = problem or error
    finally:
        for one in pending:
            one.cancel()
    return times, problem
