"""The inside of a worker process: load models, and run tasks with them."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from argus.core.errors import ArgusError, ModelError, NotEnoughMemory, traced
from argus.workers.messages import (
    BEAT_S,
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
from argus.workers.packing import pack, unpack
from argus.workers.worker import Finished, Model, WorkerError

if TYPE_CHECKING:
    from PIL import Image

    from argus.engine.engine import Engine, Result

log = logging.getLogger(__name__)

ROOM = 0.5  # of a device's memory: for what pictures take, and for its other users
NICENESS = 5  # on a CPU, so that the server stays responsive while workers compute


class Pipe(Protocol):
    """A process's end of the way of messages, as `multiprocessing`'s."""

    def poll(self) -> bool:
        """Whether a message has come."""

    def recv(self) -> Request:
        """The next message, once there is one. Raises EOFError when the other end is closed."""

    def send(self, answer: Answer, /) -> None: ...


def run_process(pipe: Pipe, model: Model) -> None:
    """The main function of a process that has nothing else to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when workers stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run_worker(pipe, model)


def run_worker(pipe: Pipe, model: Model, beat_s: float = BEAT_S) -> None:
    """Serve `pipe` until a `Stop` or until its other end is closed."""
    try:
        _Worker(pipe, model, beat_s).serve()
    except (EOFError, BrokenPipeError):
        return  # the server is gone
    except Exception as error:  # Python would print its message, which may quote a prompt
        log.critical("A worker fails:\n%s", traced(error))
        sys.exit(1)


class _Engines:
    """The engines of a process by their models. Besides the one that serves there are others where
    a share `ROOM` of the device's memory is free beside them: to take up theirs takes no load."""

    def __init__(self) -> None:
        self._held: dict[Model, Engine] = {}
        self._serving: Model | None = None

    @property
    def serving(self) -> Engine:
        """The engine of the model that was taken up last."""
        assert self._serving is not None
        return self._held[self._serving]

    @property
    def busy(self) -> list[Engine]:
        return [engine for engine in self._held.values() if engine.busy]

    @property
    def held(self) -> tuple[Model, ...]:
        return tuple(self._held)

    def take_up(self, model: Model) -> None:
        """Serve with a model, loaded if it is not here. Raises ArgusError if it cannot be."""
        if model not in self._held:
            engine = self._loaded(model)
            if self._held and not _has_room(model.device):
                self._let_go(self.held)
            self._held[model] = engine
        self._serving = model
        self.serving.max_batch = model.max_batch  # which a lack of memory may have lowered

    def keep(self, models: Iterable[Model]) -> None:
        """Load models beside those that are here while there is room, but for those that cannot be
        loaded."""
        for model in models:
            if model in self._held:
                continue
            if not _has_room(model.device):
                return
            try:
                self._held[model] = _load(model)
            except ArgusError as error:
                log.info("A model is not loaded ahead: %s", error)
            if not _has_room(model.device):
                self._let_go([model])
                return

    def give_way(self) -> bool:
        """Let go of the engines that only wait to be taken up, whose memory pictures need; whether
        there were any."""
        idle = [m for m, engine in self._held.items() if m != self._serving and not engine.busy]
        self._let_go(idle)
        return bool(idle)

    def _loaded(self, model: Model) -> Engine:
        try:
            return _load(model)
        except NotEnoughMemory:
            if not self._held:
                raise
        # not before, as the error holds what was loaded so far
        self._let_go(self.held)
        return _load(model)

    def _let_go(self, models: Iterable[Model]) -> None:
        for model in models:
            self._held.pop(model, None)
            _clean_up(model.device)


def _clean_up(device: str) -> None:
    import torch

    from argus.engine.memory import clean_up

    clean_up(torch.device(device))


def _has_room(device: str) -> bool:
    """Whether so much of a device's memory is free that engines may stay which nobody uses."""
    import torch

    from argus.engine.memory import clean_up, free_and_total

    where = torch.device(device)
    clean_up(where)
    free, total = free_and_total(where)
    return free >= ROOM * total


def _load(model: Model) -> Engine:
    import torch  # here, since the server imports this file too
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from argus.engine.engine import Engine
    from argus.engine.sources import fingerprint, model_folder

    diffusers_logging.set_verbosity_error()  # it warns of long prompts, and quotes them
    transformers_logging.set_verbosity_error()
    if model.threads is not None:
        torch.set_num_threads(model.threads)
    if model.device == "cpu" and hasattr(os, "nice"):
        lower_priority()
    if model.weights is not None and fingerprint(model_folder(model.source)) != model.weights:
        raise ModelError(f"{model.source} has other weights on this node than on the server's.")
    engine = Engine.load(
        model.source, model.device, model.dtype, model.sampler, model.max_batch, model.compiled
    )
    engine.warm_up()
    return engine


def lower_priority() -> None:
    """Raise this process's niceness to `NICENESS`, unless it is as high already.

    Lowering it would need a privilege, and would undo the operator's setting.
    """
    os.nice(max(0, NICENESS - os.nice(0)))


class _Worker:
    """Runs the engines, and reads messages between two steps. `_waiting` are the messages that wait
    for their turn: those behind a task that must be alone, or behind a load. `busy_s` are the
    seconds in which this process was busy so far.

    A model that is here is taken up at once: tasks of before go on with their engine, a step of
    each in turn.
    """

    def __init__(self, pipe: Pipe, model: Model, beat_s: float = BEAT_S) -> None:
        self._pipe, self._beats_s = pipe, beat_s
        self._engines = _Engines()
        self._waiting: deque[Task | Load | Keep] = deque([Load(model)])
        self._tasks: dict[tuple[Engine, int], Task] = {}  # by an engine's ticket
        self._begun: set[int] = set()
        self._stopping = False
        self._beat_s = -math.inf
        self._busy_before_s = 0.0  # until `_since_s`, when the engines became busy
        self._since_s: float | None = None

    def serve(self) -> None:
        """Work until a `Stop`, or until a model cannot be loaded."""
        while True:
            while self._pipe.poll():
                self._take(self._pipe.recv())
            self._rest()
            self._admit()
            if self._engines.busy:
                self._step()
            elif self._stopping:
                return
            else:
                self._take(self._pipe.recv())

    def _rest(self) -> None:
        """End to count time as busy if nothing is left to do."""
        if not self._engines.busy:
            self._busy_before_s, self._since_s = self.busy_s, None

    def _take(self, request: Request) -> None:
        if isinstance(request, Cancel):
            self._cancel(request.number)
        elif isinstance(request, Stop):
            self._stopping = True
            while self._waiting and not isinstance(self._waiting[-1], Task):
                self._waiting.pop()  # no task needs it
        else:
            self._waiting.append(request)

    def _cancel(self, number: int) -> None:
        self._waiting = deque(
            one for one in self._waiting if not (isinstance(one, Task) and one.number == number)
        )
        for (engine, ticket), task in list(self._tasks.items()):
            if task.number == number:
                engine.cancel(ticket)
                del self._tasks[engine, ticket]

    def _admit(self) -> None:
        """Do what waits, in its order, until something must wait for the engines' tasks."""
        while self._waiting and not self._is_blocked(self._waiting[0]):
            first = self._waiting.popleft()
            if isinstance(first, Task):
                self._begin(first, self._engines.serving)
            elif isinstance(first, Load):
                self._load(first.model)
            else:
                self._engines.keep(first.models)
                self._pipe.send(Held(self._engines.held))

    def _is_blocked(self, request: Task | Load | Keep) -> bool:
        if isinstance(request, Task):
            alone = request.alone or any(task.alone for task in self._tasks.values())
            return alone and bool(self._tasks)
        if isinstance(request, Load) and request.model in self._engines.held:
            return False
        return self._occupied

    @property
    def _occupied(self) -> bool:
        """Whether engines have anything to do, if only for tasks that were cancelled."""
        return bool(self._tasks or self._engines.busy)

    def _load(self, model: Model) -> None:
        """Take up a model. If it cannot be loaded, which is not tried beside tasks, the process
        ends: what waits has no model."""
        try:
            self._engines.take_up(model)
        except ArgusError as error:
            self._pipe.send(Unusable(model, error))
            self._waiting.clear()
            self._stopping = True
        else:
            self._pipe.send(Ready(model, self._engines.held))

    def _begin(self, task: Task, engine: Engine) -> None:
        now_s = time.perf_counter()  # of before, as the shares count from the admission
        try:
            ticket = engine.admit(
                task.job,
                start=None if task.start is None else unpack(task.start),
                keep=task.keep,
                on_step=self._reporter(task) if task.progress else None,
                previews=task.previews,
                on_preview=self._shower(task) if task.previews else None,
            )
        except Exception as error:
            self._pipe.send(Failed(task.number, _public(error)))
        else:
            self._tasks[engine, ticket] = task
            if self._since_s is None:
                self._since_s = now_s

    def _step(self) -> None:
        """A step of every engine that has tasks."""
        engines = self._engines.busy
        begun = {
            self._tasks[engine, ticket].number
            for engine in engines
            for ticket in (*engine.in_flight, *engine.upcoming)
            if (engine, ticket) in self._tasks  # else it was cancelled
        }
        if begun - self._begun:  # before the step, in case it kills the process
            self._pipe.send(Begun(tuple(begun - self._begun)))
        self._begun = begun
        for engine in engines:
            self._beat()
            most, outcomes = engine.max_batch, engine.step()
            short = any(isinstance(outcome, NotEnoughMemory) for _, outcome in outcomes)
            more = (short or engine.max_batch < most) and self._engines.give_way()
            if more:
                engine.max_batch = most
                self._pipe.send(Held(self._engines.held))
            for ticket, outcome in outcomes:
                task = self._tasks.pop((engine, ticket))
                if more and isinstance(outcome, NotEnoughMemory):
                    self._begin(task, engine)
                else:
                    self._pipe.send(self._answer(task.number, outcome))
            for other in engines:
                if other is not engine:
                    other.resume()

    def _answer(self, number: int, outcome: Result | Exception) -> Done | Failed:
        if isinstance(outcome, Exception):
            return Failed(number, _public(outcome))
        kept = {k: pack(latents) for k, latents in outcome.kept.items()}
        share = outcome.share
        finished = Finished(outcome.image, kept, outcome.timings_ms, share.seconds, share.joules)
        return Done(number, finished, self.busy_s)

    @property
    def busy_s(self) -> float:
        """Seconds in which the engine was busy, up to now."""
        since_s = self._since_s
        return self._busy_before_s + (0.0 if since_s is None else time.perf_counter() - since_s)

    def _beat(self) -> None:
        """Send a beat, since a silent process counts as hung."""
        now = time.monotonic()
        if now - self._beat_s >= self._beats_s:
            self._beat_s = now
            self._pipe.send(Beat())

    def _reporter(self, task: Task) -> Callable[[int, int], None]:
        return lambda done, steps: self._pipe.send(Progress(task.number, done, steps))

    def _shower(self, task: Task) -> Callable[[int, Image.Image], None]:
        return lambda index, image: self._pipe.send(Preview(task.number, index, image))


def _public(error: Exception) -> ArgusError:
    """The error as one that a client can be shown."""
    if isinstance(error, ArgusError):
        return error
    log.error("A picture failed:\n%s", traced(error))
    return WorkerError(f"The worker failed on this picture: {type(error).__name__}: {error}")
