"""A worker of this machine: an engine in a process of its own, restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread

from argus.workers import forking
from argus.workers.messages import Answer, Request
from argus.workers.process import run_process
from argus.workers.supervised import PARTING_S, SupervisedWorker
from argus.workers.worker import Model

log = logging.getLogger(__name__)


class LocalWorker(SupervisedWorker):
    """Runs jobs in a process of this machine; see `SupervisedWorker`."""

    @property
    def pid(self) -> int | None:
        """The present or last process's."""
        return self._body.pid if isinstance(self._body, _Process) else None

    async def _launch(self, model: Model) -> _Process:
        context = forking.context(model.device)
        try:
            ours, process = await _start(context, model)
        except (OSError, EOFError) as error:
            log.warning("The fork server fails (%r); a worker starts without it", error)
            ours, process = await _start(forking.spawning(), model)
        return _Process(ours, process, self._hear)


class _Process:
    """A process that has begun, and our end of its pipe; `hear` gets its answers, in a thread."""

    def __init__(
        self, pipe: Connection, process: BaseProcess, hear: Callable[[Answer], None]
    ) -> None:
        self._process, self.pid, self.name = process, process.pid, str(process.pid)
        self.ended, self.ran = asyncio.Event(), True
        self._outbox: SimpleQueue[Request | None] = SimpleQueue()
        loop = asyncio.get_running_loop()
        Thread(target=_speak, args=(pipe, self._outbox), daemon=True).start()
        Thread(target=self._listen, args=(pipe, loop, hear), daemon=True).start()

    def send(self, request: Request) -> None:
        self._outbox.put(request)

    def close(self) -> None:
        self._outbox.put(None)

    def kill(self) -> None:
        """`process.kill` does nothing once the fork server is gone."""
        if self.pid is not None and not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                _kill(self._process)

    async def release(self) -> None:
        await asyncio.to_thread(_end, self._process)

    def _listen(
        self, pipe: Connection, loop: asyncio.AbstractEventLoop, hear: Callable[[Answer], None]
    ) -> None:
        """In a thread: pass on every answer until the process is gone, or an answer cannot be read,
        which counts as the same."""
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            try:
                while True:
                    hear(pipe.recv())
            except (EOFError, OSError):
                pass
            except Exception:
                log.exception("Worker process %s sends what cannot be read", self.pid)
            finally:
                pipe.close()
                loop.call_soon_threadsafe(self.ended.set)


async def _start(
    context: SpawnContext | ForkServerContext, model: Model
) -> tuple[Connection, BaseProcess]:
    """A process and our end of its pipe. In a thread, since the fork server may still import
    the libraries; a process that nobody waits for any more is killed."""
    ours, theirs = context.Pipe()
    process = context.Process(target=run_process, args=(theirs, model), daemon=True)
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if not begun.cancelled():
            begun.set_result(None) if error is None else begun.set_exception(error)
        elif error is None:
            _kill(process)

    def start() -> None:
        failed: BaseException | None = None
        try:
            process.start()
        except BaseException as error:
            failed = error
        try:
            loop.call_soon_threadsafe(tell, failed)
        except RuntimeError:  # the loop is closed
            if failed is None:
                _kill(process)

    Thread(target=start, daemon=True).start()
    await begun
    theirs.close()
    return ours, process


def _kill(process: BaseProcess) -> None:
    """Kill a process whose pipe is open."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            if hasattr(signal, "SIGKILL"):
                os.kill(process.pid, signal.SIGKILL)
            else:
                process.kill()


def _end(process: BaseProcess) -> None:
    """Make sure that a process whose pipe is closed has ended."""
    process.join(PARTING_S)
    if process.is_alive():
        process.kill()
        process.join()


def _speak(pipe: Connection, outbox: SimpleQueue[Request | None]) -> None:
    """In a thread, because a full pipe blocks: send what is in the outbox until a None."""
    with contextlib.suppress(OSError):
        while (request := outbox.get()) is not None:
            pipe.send(request)
