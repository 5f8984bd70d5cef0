"""The inside of a worker process: load the model, then run the tasks."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
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
    Load,
    Preview,
    Progress,
    Ready,
    Request,
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
        wanted: Model | None = model
        engines, busy_s = _Engines(), 0.0
        while wanted is not None:
            try:
                engine = engines.of(wanted)
            except ArgusError as error:
                pipe.send(Unusable(wanted, error))
                return
            pipe.send(Ready(wanted))
            worker = _Worker(pipe, engine, busy_s, beat_s)
            wanted, busy_s = worker.serve(), worker.busy_s
            del worker, engine  # so that `engines` can let go of it
    except (EOFError, BrokenPipeError):
        return  # the server is gone
    except Exception as error:  # Python would print its message, which may quote a prompt
        log.critical("A worker fails:\n%s", traced(error))
        sys.exit(1)


class _Engines:
    """The engines of a process by their models. Those that it served with before stay where a share
    `ROOM` of the device's memory is free once the next is loaded: going back takes no load then."""

    def __init__(self) -> None:
        self._held: dict[Model, Engine] = {}

    def of(self, model: Model) -> Engine:
        """The engine of a model, loaded if it is not here. Raises ArgusError if it cannot be."""
        engine = self._held.get(model)
        if engine is None:
            engine = self._loaded(model)
            if self._held and not _has_room(model.device):
                self._let_go(model.device)
            self._held[model] = engine
        engine.max_batch = model.max_batch  # which a lack of memory may have lowered
        return engine

    def _loaded(self, model: Model) -> Engine:
        try:
            return _load(model)
        except NotEnoughMemory:
            if not self._held:
                raise
        # not before, as the error holds what was loaded so far
        self._let_go(model.device)
        return _load(model)

    def _let_go(self, device: str) -> None:
        import torch

        from argus.engine.memory import clean_up

        self._held.clear()
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
    """Runs the engine, and reads messages between two steps. `_waiting` are the tasks that the
    engine does not have yet: those behind one that must be alone. `busy_s` are the seconds in which
    this process was busy so far."""

    def __init__(self, pipe: Pipe, engine: Engine, busy_s: float, beat_s: float = BEAT_S) -> None:
        self._pipe, self._engine, self._beats_s = pipe, engine, beat_s
        self._waiting: deque[Task] = deque()
        self._tasks: dict[int, Task] = {}  # by the engine's ticket
        self._begun: set[int] = set()
        self._stopping = False
        self._wanted: Model | None = None
        self._beat_s = -math.inf
        self._busy_before_s = busy_s  # until `_since_s`, when the engine became busy
        self._since_s: float | None = None

    def serve(self) -> Model | None:
        """Work until a `Stop` or `Load`; the model to load, None for a `Stop`."""
        while True:
            while self._pipe.poll():
                self._take(self._pipe.recv())
            self._admit()
            self._clock()
            if self._engine.busy:
                self._beat()
                self._step()
                self._clock()
            elif self._stopping:
                return self._wanted
            else:
                self._take(self._pipe.recv())

    def _clock(self) -> None:
        """Begin or end to count time as busy."""
        if not self._engine.busy:
            self._busy_before_s, self._since_s = self.busy_s, None
        elif self._since_s is None:
            self._since_s = time.perf_counter()

    def _take(self, request: Request) -> None:
        if isinstance(request, Task):
            self._waiting.append(request)
        elif isinstance(request, Cancel):
            self._cancel(request.number)
        else:
            self._stopping = True
            self._wanted = request.model if isinstance(request, Load) else None

    def _cancel(self, number: int) -> None:
        self._waiting = deque(task for task in self._waiting if task.number != number)
        for ticket, task in list(self._tasks.items()):
            if task.number == number:
                self._engine.cancel(ticket)
                del self._tasks[ticket]

    def _admit(self) -> None:
        """Admit the tasks that may run beside those in the engine."""
        while self._waiting:
            alone = self._waiting[0].alone or any(task.alone for task in self._tasks.values())
            if alone and self._tasks:
                return
            task = self._waiting.popleft()
            try:
                ticket = self._engine.admit(
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
                self._tasks[ticket] = task

    def _step(self) -> None:
        begun = {*self._engine.in_flight, *self._engine.upcoming}
        if begun - self._begun:  # before the step, in case it kills the process
            numbers = [self._tasks[ticket].number for ticket in begun - self._begun]
            self._pipe.send(Begun(tuple(numbers)))
        self._begun = begun
        for ticket, outcome in self._engine.step():
            self._pipe.send(self._answer(self._tasks.pop(ticket).number, outcome))

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
