"""A kind of worker: its process is started by a command, here `nice`.

    python docs/examples/new_worker.py

The command may be `numactl --cpunodebind 1`, `taskset -c 4-7` or a profiler. `SupervisedWorker`
does the rest: it sends the jobs, notices a death or a hang, starts the process again and hands it
what it had.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

from argus.core.job import Job
from argus.families.catalog import default_family
from argus.workers.messages import Answer, Request
from argus.workers.process import run_process
from argus.workers.supervised import SupervisedWorker
from argus.workers.worker import Finished, Model


class CommandWorker(SupervisedWorker):
    """Runs jobs in a process that `command` starts on this machine."""

    command: Sequence[str] = ("nice", "-n", "5")

    @property
    def pid(self) -> int | None:
        """The present or last process's."""
        return self._body.pid if isinstance(self._body, _Process) else None

    async def _launch(self, model: Model) -> _Process:
        ours, theirs = Pipe()
        with theirs:  # the process has its own copy: once it is gone, `ours` ends
            process = subprocess.Popen(
                [*self.command, sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
        ours.send(model)
        return _Process(ours, process, self._hear)


class _Process:
    """A process and our end of its pipe, as `SupervisedWorker` wants it (`supervised.Body`)."""

    def __init__(
        self, pipe: Connection, process: subprocess.Popen[bytes], hear: Callable[[Answer], None]
    ) -> None:
        self._process, self._pipe = process, pipe
        self.pid, self.name = process.pid, str(process.pid)
        self.ended, self.ran = asyncio.Event(), True
        self._outbox: SimpleQueue[Request | None] = SimpleQueue()
        loop = asyncio.get_running_loop()
        Thread(target=self._speak, daemon=True).start()
        Thread(target=self._listen, args=(loop, hear), daemon=True).start()

    def send(self, request: Request) -> None:
        self._outbox.put(request)

    def close(self) -> None:
        self._outbox.put(None)

    def kill(self) -> None:
        self._process.kill()

    async def release(self) -> None:
        await asyncio.to_thread(self._process.wait)

    def _speak(self) -> None:
        """In a thread, because a full pipe blocks: send what is in the outbox until a None."""
        with contextlib.suppress(OSError):
            while (request := self._outbox.get()) is not None:
                self._pipe.send(request)

    def _listen(self, loop: asyncio.AbstractEventLoop, hear: Callable[[Answer], None]) -> None:
        """In a thread: pass on every answer until the process is gone."""
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            with contextlib.suppress(EOFError, OSError):
                while True:
                    hear(self._pipe.recv())
            self._process.kill()  # it cannot be heard any more
            loop.call_soon_threadsafe(self.ended.set)


def inside(number: int) -> None:
    """The main function of the process, whose end of the pipe has a number."""
    with Connection(number) as pipe:
        run_process(pipe, pipe.recv())


async def picture(prompt: str) -> Finished:
    """A picture of the bundled family by such a worker."""
    family = default_family()
    exact = family.exact
    worker = CommandWorker(Model(family.models[exact.model], exact.sampler))
    worker.start()
    await worker.ready()
    job = Job(prompt, steps=exact.steps, guidance=exact.guidance)
    made = await worker.run(job)
    await worker.stop(grace_s=1.0)
    return made


if __name__ == "__main__":
    if len(sys.argv) == 2:
        inside(int(sys.argv[1]))
    else:
        finished = asyncio.run(picture("a red fish in the sea"))
        finished.image.save("worker.png")
        print("wrote worker.png;", {name: round(ms) for name, ms in finished.timings_ms.items()})
