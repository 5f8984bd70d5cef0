"""A worker whose process is supervised: started, watched, and replaced when it dies.

Where the process lives is the subclass's: `workers/local.py` on this machine, `workers/ray.py` on a
node of a Ray cluster.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from argus.core.errors import NotEnoughMemory
from argus.core.job import Job
from argus.workers.messages import (
    Answer,
    Beat,
    Begun,
    Cancel,
    Done,
    Failed,
    Held,
    Keep,
    Load,
    Preview,
    Progress,
    Ready,
    Request,
    Stop,
    Task,
    Unusable,
)
from argus.workers.worker import Finished, Model, OnPreview, State, Unanswered, WorkerError

log = logging.getLogger(__name__)

MAX_DEATHS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
PARTING_S = 5.0
LOOK_S = 0.25  # between two looks at whether a process hangs
FIRST_TIMES = 10  # factor of the allowed silence before a model's first picture: kernels are chosen

OnStep = Callable[[int, int], None]


class Body(Protocol):
    """A process that runs `process.run_worker`, and the way of messages to it. `name` is for the
    log. `ended` is set, in the asyncio loop, once nothing more comes from it; `ran` says whether
    there was a process at all."""

    name: str
    ended: asyncio.Event
    ran: bool

    def send(self, request: Request) -> None:
        """Send a message; messages arrive in order. Does not block."""

    def close(self) -> None:
        """Send nothing more."""

    def kill(self) -> None:
        """End the process at once, if it still runs. May be called from any thread."""

    async def release(self) -> None:
        """Wait until nothing is left of a process that has ended."""


@dataclass
class _Pending:
    task: Task
    model: Model
    answer: asyncio.Future[Finished]
    on_step: OnStep | None
    on_preview: OnPreview | None
    shown: int = 0
    in_flight: bool = False
    deaths: int = 0


class SupervisedWorker(abc.ABC):
    """Runs jobs in a process, many at once. For use from one asyncio loop.

    A process that dies is started again and gets the unanswered jobs, but those of a model that was
    held before: they raise Unanswered. Those that were in flight then run one at a time, so that a
    job that crashes the process does so alone; it fails at its third death. A model that does not
    load (an error, or three deaths while loading) makes the worker unusable. A process that has
    jobs and sends nothing for longer than `silence_s()` seconds is killed and replaced; loading has
    no time limit. `on_change` is called whenever `state` may have changed.
    """

    opaque = False

    def __init__(
        self, model: Model, on_change: Callable[[], None] = lambda: None, device_type: int = 0
    ) -> None:
        self.model, self.device_type, self.on_change = model, device_type, on_change
        self.state = State.STARTING
        self.restarts = 0
        self.busy_s = self._busy_before_s = 0.0  # the latter without the present process
        self.problem: Exception | None = None
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._body: Body | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._loaded_once = False  # whether the present model was ever loaded
        self._loading = False  # whether the running process loads another model
        self._failed_loads = 0  # processes in a row that died while loading the model
        self._asked = model  # the model that the process was last asked to load
        self._proven = False  # whether the process has made a picture with its model
        self._held: frozenset[Model] = frozenset()  # the process's models
        self._kept = asyncio.Event()  # whether the last `Keep` is answered
        self._heard_s = 0.0  # time of the last message, or of the first pending job
        self.silence_s: Callable[[], float] = lambda: math.inf

    @abc.abstractmethod
    async def _launch(self, model: Model) -> Body:
        """Start a process that loads a model. It calls `_hear` with every answer, from any thread.

        Raises OSError and EOFError if it cannot be started now.
        """

    @property
    def backlog(self) -> int:
        """Number of queued and running jobs."""
        return len(self._pending)

    @property
    def _wanted(self) -> bool:
        """Whether there is to be a process; `restart` may change that after a failed load."""
        return self.state not in (State.UNUSABLE, State.STOPPED)

    @property
    def silent_s(self) -> float:
        """Seconds since the last message of a process that has jobs; 0 without jobs."""
        busy = self.state is State.READY and bool(self._pending)
        return max(0.0, time.monotonic() - self._heard_s) if busy else 0.0

    def start(self) -> None:
        """Start the process; `ready` waits until its model is loaded."""
        self._supervisor = asyncio.create_task(self._supervise())

    def restart(self, model: Model) -> None:
        """Start again with another model, after one that could not be loaded."""
        self.model, self.problem = model, None
        self.state, self._loading = State.STARTING, False
        self._loaded_once, self._failed_loads = False, 0
        self._settled.clear()
        if self._supervisor is None or self._supervisor.done():  # else it goes on by itself
            self.start()

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises the error that prevents it."""
        await self._settled.wait()
        if self.problem is not None:
            raise self.problem

    def load(self, model: Model) -> None:
        """Hold another model, at once if `at_hand` says so; else once earlier jobs are done, and
        the state is `STARTING` until then.

        A model that cannot be loaded makes the worker unusable; after a lack of memory it is first
        tried again in a new process, without what the last model left behind.
        """
        here = self.at_hand(model)
        self.model = self._asked = model
        self._loaded_once, self._failed_loads, self._proven = here, 0, False
        if self.state is State.READY and not here:
            self.state = State.STARTING
            self._loading = True
            self._settled.clear()
        self._send(Load(model))

    def at_hand(self, model: Model) -> bool:
        return self.state is State.READY and model in self._held

    async def keep(self, models: Sequence[Model], limit_s: float) -> None:
        if self.state is not State.READY:
            return
        self._kept.clear()
        self._send(Keep(tuple(models)))
        try:
            async with asyncio.timeout(limit_s):
                await self._kept.wait()
        except TimeoutError:
            log.warning("Loading other models ahead takes longer than %.0f s: given up", limit_s)
            self.kill()

    async def run(
        self,
        job: Job,
        start: bytes | None = None,
        keep: tuple[int, ...] = (),
        previews: int = 0,
        on_preview: OnPreview | None = None,
        on_step: OnStep | None = None,
    ) -> Finished:
        """See `Worker.run`. `on_step(done, steps)` is called after every step."""
        if self.state in (State.UNUSABLE, State.STOPPED):
            raise WorkerError(f"The worker is {self.state.value}.") from self.problem
        number = next(self._numbers)
        answer: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()
        task = Task(
            number, job, start, keep, progress=on_step is not None, previews=previews
        )  # fmt: skip
        if not self._pending:
            self._heard_s = time.monotonic()
        self._pending[number] = _Pending(task, self.model, answer, on_step, on_preview)
        self._send(task)
        try:
            return await answer
        except asyncio.CancelledError:
            self._send(Cancel(number))
            raise
        finally:
            self._pending.pop(number, None)

    async def stop(self, grace_s: float) -> None:
        """Let jobs finish for up to `grace_s` seconds, then end the process."""
        if self.state is not State.UNUSABLE:
            self.state = State.STOPPED
        self._kept.set()
        self._send(Stop())
        waiting = [pending.answer for pending in self._pending.values()]
        if waiting:
            await asyncio.wait(waiting, timeout=grace_s)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
        body = self._body
        if body is not None and not body.ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PARTING_S if not self._pending else 0.0):
                    await body.ended.wait()
            if not body.ended.is_set():
                body.kill()
                await body.ended.wait()
            await body.release()
        self._fail_pending(WorkerError("The worker was stopped."))

    def kill(self) -> None:
        """End the process at once, if it still runs. For the end of the program."""
        if self._body is not None and not self._body.ended.is_set():
            self._body.kill()

    def _send(self, request: Request) -> None:
        """Send a message to the process, if there is one: one that starts gets what is pending."""
        if self._body is not None:
            self._body.send(request)

    async def _supervise(self) -> None:
        """Keep a process running: start it, send it the pending jobs, wait for its end."""
        pause = FIRST_PAUSE_S
        while self.state is not State.STOPPED:
            name, ran = "that could not start", False
            try:
                body = await self._start_body()
            except (OSError, EOFError) as error:
                log.warning("A worker process cannot be started: %r", error)
            else:
                await self._ended(body)
                await body.release()
                name, ran = body.name, body.ran
            self._held = frozenset()
            self._kept.set()
            if not self._wanted:
                return
            self._settled.clear()
            if self.state is State.READY or self._loading:
                self._loading = False
                pause, self._failed_loads = FIRST_PAUSE_S, 0
                self.state = State.STARTING
                self._blame()
                self.on_change()
            elif ran and self._asked == self.model:  # else a model no longer wanted was deadly
                self._failed_loads += 1
                if self._failed_loads >= MAX_DEATHS and not self._loaded_once:
                    self._give_up(WorkerError(f"It died {MAX_DEATHS} times while loading."))
                    if not self._wanted:
                        return
            self.restarts += 1
            log.warning("Worker process %s ended; starting another in %g s", name, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _ended(self, body: Body) -> None:
        """Wait until a process has ended; kill one that hangs."""
        while not body.ended.is_set():
            looked_s = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await body.ended.wait()
            now = time.monotonic()
            if now - looked_s > 2 * LOOK_S:  # this loop was held up
                self._heard_s = now
            allowed_s = self.silence_s() * (1 if self._proven else FIRST_TIMES)
            if self.silent_s > allowed_s:
                log.warning(
                    "Worker process %s said nothing for %.1f s; killing it",
                    body.name,
                    self.silent_s,
                )
                body.kill()
                await body.ended.wait()

    async def _start_body(self) -> Body:
        """Start a process for the present model, and send it the pending jobs."""
        self._loop, model = asyncio.get_running_loop(), self.model
        if self._body is not None:
            self._body.close()
            self._body = None
        body = self._body = await self._launch(model)
        self._asked, self._proven, self._heard_s = model, False, time.monotonic()
        self._busy_before_s = self.busy_s
        if self.model != model:  # `load` was called meanwhile
            self._asked = self.model
            body.send(Load(self.model))
        for pending in self._pending.values():
            if pending.model == self.model:
                body.send(pending.task)
            elif not pending.answer.done():
                pending.answer.set_exception(Unanswered("The worker's model changed.", busy=True))
        return body

    def _hear(self, answer: Answer) -> None:
        """Take an answer of the process. From any thread: the loop may be busy when it comes."""
        self._heard_s = time.monotonic()
        self._loop.call_soon_threadsafe(self._take, answer)

    def _take(self, answer: Answer) -> None:
        if isinstance(answer, Ready):
            self._held = frozenset(answer.held)
            if answer.model != self.model:
                return  # another is asked for by now
            was_ready = self.state is State.READY
            if self.state is State.STARTING:
                self.state = State.READY
            self._loaded_once, self._loading = True, False
            self._settled.set()
            if not was_ready:
                self.on_change()
        elif isinstance(answer, Held):
            self._held = frozenset(answer.models)
            self._kept.set()
        elif isinstance(answer, Begun):
            for number in answer.numbers:
                if number in self._pending:
                    self._pending[number].in_flight = True
        elif isinstance(answer, Unusable):
            if answer.model != self.model:
                return  # another is asked for by now
            again = self._loading or self._loaded_once
            if again and isinstance(answer.error, NotEnoughMemory):
                log.warning("No memory to load the model yet: %s", answer.error)
            else:
                self._give_up(answer.error)
        elif isinstance(answer, Beat):
            pass  # `_hear` has set the time of the last message
        else:
            self._answer(answer)

    def _answer(self, answer: Progress | Preview | Done | Failed) -> None:
        pending = self._pending.get(answer.number)
        if pending is None or pending.answer.done():
            return
        if isinstance(answer, Progress):
            if pending.on_step is not None:
                pending.on_step(answer.done, answer.steps)
        elif isinstance(answer, Preview):
            if pending.on_preview is not None and answer.index >= pending.shown:
                pending.shown = answer.index + 1  # a job that is run again shows none twice
                pending.on_preview(answer.index, answer.image)
        elif isinstance(answer, Done):
            self._proven |= pending.model == self.model
            self.busy_s = self._busy_before_s + answer.busy_s
            pending.answer.set_result(answer.finished)
        else:
            pending.answer.set_exception(answer.error)

    def _blame(self) -> None:
        """Count a death against the jobs in flight, and fail those with `MAX_DEATHS`."""
        for number, pending in list(self._pending.items()):
            if not pending.in_flight:
                continue
            pending.in_flight = False
            pending.deaths += 1
            pending.task = replace(pending.task, alone=True)
            if pending.deaths >= MAX_DEATHS and not pending.answer.done():
                pending.answer.set_exception(
                    WorkerError(f"The worker died {MAX_DEATHS} times while making this picture.")
                )
                del self._pending[number]

    def _give_up(self, problem: Exception) -> None:
        """The model cannot be loaded: fail all that waits for it."""
        self.state, self.problem = State.UNUSABLE, problem
        self._settled.set()
        self._fail_pending(WorkerError(f"The worker cannot work: {problem}"))
        self.on_change()

    def _fail_pending(self, error: WorkerError) -> None:
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)
