"""The inside of a worker process: load the model, then answer tasks in the order they came."""

from __future__ import annotations

import logging
import signal
from collections import deque
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from argus.core.errors import ArgusError
from argus.workers.messages import (
    Failed,
    Finished,
    Model,
    Progress,
    Ready,
    Request,
    Stop,
    Task,
    Unusable,
    WorkerError,
    pack,
    unpack,
)

if TYPE_CHECKING:
    from argus.engine.engine import Engine

log = logging.getLogger(__name__)


class _Cancelled(Exception):
    """The running task is no longer wanted."""


def run_worker(pipe: Connection, model: Model) -> None:
    """Serve `pipe` until it says Stop or its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when workers stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from argus.engine.engine import Engine  # here, since the server imports this file too

    try:
        engine = Engine.load(model.source, model.device, model.dtype, model.sampler)
    except ArgusError as error:
        pipe.send(Unusable(error))
        return
    try:
        pipe.send(Ready())
        _Worker(pipe, engine).serve()
    except (EOFError, BrokenPipeError):
        return  # the server is gone, and nobody waits for a picture


class _Worker:
    def __init__(self, pipe: Connection, engine: Engine) -> None:
        self._pipe, self._engine = pipe, engine
        self._waiting: deque[Task] = deque()
        self._running: int | None = None
        self._stopping = False

    def serve(self) -> None:
        while self._waiting or not self._stopping:
            if not self._waiting:
                self._take(self._pipe.recv())
                continue
            task = self._waiting.popleft()
            self._running = task.number
            try:
                self._pipe.send(self._answer(task))
            except _Cancelled:
                continue
            finally:
                self._running = None

    def _answer(self, task: Task) -> Finished | Failed:
        try:
            result = self._engine.run(
                task.job,
                start=None if task.start is None else unpack(task.start),
                keep=task.keep,
                on_step=lambda done, steps: self._step(task.number, done, steps),
            )
        except (_Cancelled, EOFError, BrokenPipeError):
            raise
        except ArgusError as error:
            return Failed(task.number, error)
        except Exception as error:
            if "CUDA error" in str(error):
                raise  # nothing works on the device from now on: let a new process begin anew
            log.exception("Task %d failed", task.number)
            problem = f"The worker failed on this picture: {type(error).__name__}: {error}"
            return Failed(task.number, WorkerError(problem))
        kept = {k: pack(latents) for k, latents in result.kept.items()}
        return Finished(task.number, result.image, kept, result.timings_ms)

    def _step(self, number: int, done: int, steps: int) -> None:
        self._pipe.send(Progress(number, done, steps))
        while self._pipe.poll():
            self._take(self._pipe.recv())

    def _take(self, request: Request) -> None:
        if isinstance(request, Task):
            self._waiting.append(request)
        elif isinstance(request, Stop):
            self._stopping = True
        elif request.number == self._running:
            raise _Cancelled
        else:
            kept = [task for task in self._waiting if task.number != request.number]
            self._waiting = deque(kept)
