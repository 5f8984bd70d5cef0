from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from argus.core.errors import BadRequest, ModelError
from argus.core.job import Job
from argus.engine.engine import Engine
from argus.workers.local import LocalWorker, State
from argus.workers.messages import (
    Answer,
    Cancel,
    Finished,
    Model,
    Progress,
    Stop,
    Task,
    WorkerError,
)
from argus.workers.packing import pack, unpack
from argus.workers.process import _Worker

LONG = 900  # steps that last until the test ends them


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def worker(runner: asyncio.Runner, tiny_sd: Path) -> Iterator[LocalWorker]:
    """One for all tests but those that stop theirs, because a process takes seconds to start."""
    worker = runner.run(started(tiny_sd))
    yield worker
    runner.run(worker.stop(grace_s=0.0))


async def started(folder: Path) -> LocalWorker:
    worker = LocalWorker(Model(str(folder)))
    worker.start()
    await worker.ready()
    return worker


def test_a_worker_makes_the_engine_s_picture_and_hands_up_latents(
    runner: asyncio.Runner, worker: LocalWorker, tiny_sd: Path
) -> None:
    job = Job("a red fish", seed=1, steps=4, guidance=3.0)
    expected = Engine.load(str(tiny_sd)).run(job, keep=[2])
    seen: list[tuple[int, int]] = []

    async def use() -> None:
        whole = await worker.run(job, keep=(2,), on_step=lambda *at: seen.append(at))
        assert whole.image.tobytes() == expected.image.tobytes()
        assert torch.allclose(unpack(whole.kept[2]), expected.kept[2], atol=1e-3)
        resumed = Job("a red fish", seed=1, steps=4, guidance=3.0, skip=2)
        again = await worker.run(resumed, start=pack(expected.kept[2]))
        assert again.image.tobytes() == expected.image.tobytes()

    runner.run(use())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_job_that_cannot_be_done_fails_alone(runner: asyncio.Runner, worker: LocalWorker) -> None:
    async def use() -> None:
        restarts = worker.restarts
        with pytest.raises(BadRequest, match="multiple of 2"):
            await worker.run(Job("a red fish", steps=2, width=33))
        assert (await worker.run(Job("a red fish", steps=2))).image.size == (32, 32)
        assert worker.restarts == restarts

    runner.run(use())


def test_a_failure_nobody_foresaw_fails_its_job_alone(
    runner: asyncio.Runner, worker: LocalWorker
) -> None:
    async def use() -> None:
        restarts = worker.restarts
        with pytest.raises(WorkerError, match="failed on this picture"):
            await worker.run(Job("a red fish", steps=4, skip=2), start=b"no latents")
        assert (await worker.run(Job("a red fish", steps=2))).image.size == (32, 32)
        assert worker.restarts == restarts

    runner.run(use())


def test_cancelling_frees_the_work(runner: asyncio.Runner, worker: LocalWorker) -> None:
    async def use() -> None:
        running = asyncio.Event()
        endless = asyncio.create_task(
            worker.run(Job("a fish", steps=LONG), on_step=lambda *_: running.set())
        )
        waiting = asyncio.create_task(worker.run(Job("a boat", steps=LONG)))
        await running.wait()
        seen: list[int] = []
        after = asyncio.create_task(
            worker.run(Job("a cup", steps=2), on_step=lambda done, _: seen.append(done))
        )
        endless.cancel()
        waiting.cancel()
        assert (await after).image.size == (32, 32)
        assert seen == [1, 2]
        assert worker.backlog == 0

    runner.run(use())


def test_a_killed_process_is_replaced_and_no_job_is_lost(
    runner: asyncio.Runner, worker: LocalWorker
) -> None:
    async def use() -> None:
        restarts = worker.restarts
        running = asyncio.Event()
        jobs = [Job("a red fish", seed=1, steps=100), Job("a blue boat", seed=2, steps=2)]
        runs = [
            asyncio.create_task(worker.run(job, on_step=lambda *_: running.set())) for job in jobs
        ]
        await running.wait()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        results = await asyncio.gather(*runs)
        assert [result.image.size for result in results] == [(32, 32)] * 2
        assert worker.restarts == restarts + 1
        assert worker.state is State.READY
        assert worker.backlog == 0

    runner.run(use())


def test_a_job_that_kills_is_given_up_and_takes_no_other_with_it(
    runner: asyncio.Runner, worker: LocalWorker
) -> None:
    async def use() -> None:
        restarts = worker.restarts

        def kill(*_: int) -> None:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)

        deadly = asyncio.create_task(worker.run(Job("a deadly fish", steps=LONG), on_step=kill))
        beside = [
            asyncio.create_task(worker.run(Job(f"boat {i}", seed=i, steps=60))) for i in range(2)
        ]
        with pytest.raises(WorkerError, match="died 3 times while making this picture"):
            await deadly
        assert [result.image.size for result in await asyncio.gather(*beside)] == [(32, 32)] * 2
        assert worker.restarts == restarts + 3

    runner.run(use())


def test_cancelled_tasks_are_dropped_inside_the_process(tiny_sd: Path) -> None:
    ours, theirs = Pipe()
    thread = threading.Thread(target=_Worker(theirs, Engine.load(str(tiny_sd))).serve)
    ours.send(Task(1, Job("an endless fish", steps=LONG), progress=True))
    ours.send(Task(2, Job("waits until it is alone", steps=LONG), alone=True))
    ours.send(Task(3, Job("a boat", steps=3)))
    thread.start()
    while not isinstance(ours.recv(), Progress):
        pass
    ours.send(Cancel(1))
    ours.send(Cancel(2))
    ours.send(Stop())
    answers: list[Answer] = []
    while not any(isinstance(answer, Finished) for answer in answers):
        answers.append(ours.recv())
    thread.join()
    assert [answer.number for answer in answers if isinstance(answer, Finished)] == [3]
    assert not ours.poll()


def test_a_model_that_cannot_be_loaded_is_said_and_not_tried_again(
    runner: asyncio.Runner,
) -> None:
    async def use() -> None:
        worker = LocalWorker(Model("./nowhere"))
        worker.start()
        with pytest.raises(ModelError, match="no folder"):
            await worker.ready()
        with pytest.raises(WorkerError, match="unusable"):
            await worker.run(Job("a red fish"))
        await worker.stop(grace_s=1.0)
        assert worker.restarts == 0

    runner.run(use())


def test_stopping_finishes_what_is_in_flight_within_the_grace(
    runner: asyncio.Runner, tiny_sd: Path
) -> None:
    async def use() -> None:
        worker = await started(tiny_sd)
        short = asyncio.create_task(worker.run(Job("a red fish", steps=5)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(worker.stop(grace_s=60.0))
        assert (await short).image.size == (32, 32)
        await stopping
        with pytest.raises(WorkerError, match="stopped"):
            await worker.run(Job("a red fish"))

    runner.run(use())


def test_a_stop_that_takes_too_long_ends_the_job_with_a_reason(
    runner: asyncio.Runner, tiny_sd: Path
) -> None:
    async def use() -> None:
        worker = await started(tiny_sd)
        running = asyncio.Event()
        run = asyncio.create_task(
            worker.run(Job("a fish", steps=LONG), on_step=lambda *_: running.set())
        )
        await running.wait()
        await worker.stop(grace_s=0.0)
        with pytest.raises(WorkerError, match="was stopped"):
            await run

    runner.run(use())
