from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from argus.core.errors import ModelError, NotEnoughMemory
from argus.core.job import Job
from argus.engine import memory as engine_memory
from argus.engine.engine import Engine
from argus.workers import process
from argus.workers.local import LocalWorker
from argus.workers.messages import (
    Answer,
    Cancel,
    Done,
    Failed,
    Held,
    Keep,
    Load,
    Progress,
    Ready,
    Stop,
    Task,
)
from argus.workers.process import _Engines, _Worker, run_worker
from argus.workers.worker import Model, State, WorkerError
from tests.workers.pictures import alike

GB = 10**9
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


def test_cancelled_tasks_are_dropped_inside_the_process(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Pipe()
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    thread = threading.Thread(target=_Worker(theirs, Model(str(tiny_sd))).serve)
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
    while not any(isinstance(answer, Done) for answer in answers):
        answers.append(ours.recv())
    thread.join()
    assert [answer.number for answer in answers if isinstance(answer, Done)] == [3]
    assert not ours.poll()


@contextmanager
def worker_of(model: Model) -> Iterator[Any]:
    """Our end of the pipe to a worker in a thread, which is stopped at the end."""
    ours, theirs = Pipe()
    thread = threading.Thread(target=run_worker, args=(theirs, model))
    thread.start()
    try:
        yield ours
    finally:
        ours.send(Stop())
        thread.join()


class Decoding:
    """An engine whose cancelled job is being decoded while another one goes on."""

    in_flight, upcoming, max_batch = (1, 2), (), 2

    def __init__(self) -> None:
        self.steps = 0

    @property
    def busy(self) -> bool:
        return self.steps < 3

    def step(self) -> list[tuple[int, Exception]]:
        self.steps += 1
        return [(1, ModelError("none"))] if self.steps == 3 else []


def test_a_cancelled_task_that_is_still_decoded_costs_the_process_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Decoding()
    monkeypatch.setattr(process, "_load", lambda model: engine)
    ours, theirs = Pipe()
    inside = _Worker(theirs, Model("none"))
    inside._admit()
    inside._tasks[engine, 1] = Task(7, Job("a fish"))  # type: ignore[index]
    ours.send(Stop())
    inside.serve()
    answers = list[Answer]()
    while ours.poll():
        answers.append(ours.recv())
    assert [one.number for one in answers if isinstance(one, Failed)] == [7]


def test_time_without_pictures_is_not_busy_after_one_was_cancelled(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Pipe()
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    model, other = Model(str(tiny_sd)), Model(str(tiny_sd), sampler="lcm")
    inside, load = _Worker(theirs, model), process._load
    loads = list[float]()

    def watched(wanted: Model) -> Engine:
        before_s = inside.busy_s
        engine = load(wanted)
        loads.append(inside.busy_s - before_s)
        return engine

    monkeypatch.setattr(process, "_load", watched)
    thread = threading.Thread(target=inside.serve)
    ours.send(Task(1, Job("an endless fish", steps=LONG), progress=True))
    thread.start()
    try:
        while not isinstance(ours.recv(), Progress):
            pass
        ours.send(Cancel(1))
        ours.send(Load(other))
        while not isinstance(ours.recv(), Ready):
            pass
        busy_s = inside.busy_s
        time.sleep(0.2)
    finally:
        ours.send(Stop())
        thread.join()
    assert busy_s == inside.busy_s > 0
    assert loads == [0.0, 0.0]


def test_a_worker_is_busy_from_the_admission_of_a_task(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    admit = Engine.admit

    def slow(engine: Engine, *given: Any, **named: Any) -> int:
        ticket = admit(engine, *given, **named)
        time.sleep(0.2)
        return ticket

    monkeypatch.setattr(Engine, "admit", slow)
    with worker_of(Model(str(tiny_sd))) as ours:
        ours.send(Task(1, Job("a red fish", steps=3)))
        while not isinstance(answer := ours.recv(), Done):
            pass
    assert 0.2 < answer.finished.worker_s <= answer.busy_s


def test_a_process_keeps_engines_while_there_is_memory(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    monkeypatch.setattr(engine_memory, "memory", lambda: (50 * GB, 100 * GB))
    model, other = Model(str(tiny_sd)), Model(str(tiny_sd), sampler="euler")
    engines = _Engines()

    def taken_up(model: Model) -> Engine:
        engines.take_up(model)
        return engines.serving

    first, second = taken_up(model), taken_up(other)
    first.max_batch = 1  # as after a lack of memory
    assert taken_up(model) is first and taken_up(other) is second
    assert first.max_batch == model.max_batch
    gone = [weakref.ref(first), weakref.ref(second)]
    del first, second
    monkeypatch.setattr(engine_memory, "memory", lambda: (49 * GB, 100 * GB))
    engines.take_up(Model(str(tiny_sd), sampler="ddim"))
    assert [one() for one in gone] == [None, None]


def test_a_load_that_lacks_memory_is_tried_again_without_earlier_engines(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    monkeypatch.setattr(engine_memory, "memory", lambda: (100 * GB, 100 * GB))
    engines, load, tried = _Engines(), process._load, list[Model]()
    model, other = Model(str(tiny_sd)), Model(str(tiny_sd), sampler="euler")
    engines.take_up(model)
    first = weakref.ref(engines.serving)

    def short(wanted: Model) -> Engine:
        tried.append(wanted)
        if first() is not None or len(tried) == 1:
            raise NotEnoughMemory("no room")
        return load(wanted)

    monkeypatch.setattr(process, "_load", short)
    engines.take_up(other)
    assert tried == [other, other]
    tried.clear()
    with pytest.raises(NotEnoughMemory):
        _Engines().take_up(model)
    assert tried == [model]


def test_a_worker_goes_back_to_an_engine_it_had(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    monkeypatch.setattr(engine_memory, "memory", lambda: (100 * GB, 100 * GB))
    loaded, load = list[Model](), process._load

    def noting(wanted: Model) -> Engine:
        loaded.append(wanted)
        return load(wanted)

    monkeypatch.setattr(process, "_load", noting)
    model, other = Model(str(tiny_sd), sampler="ddim"), Model(str(tiny_sd), sampler="lcm")
    ready, pictures = list[Model](), list[Image.Image]()
    with worker_of(model) as ours:
        for number, wanted in enumerate((model, other, model), 1):
            if number > 1:
                ours.send(Load(wanted))
            ready.append(ours.recv().model)
            ours.send(Task(number, Job("a red fish", steps=3)))
            while not isinstance(answer := ours.recv(), Done):
                pass
            pictures.append(answer.finished.image)
    assert ready == [model, other, model] and loaded == [model, other]
    assert alike(pictures[0], pictures[2]) and not alike(pictures[0], pictures[1])


def test_tasks_go_on_beside_those_of_a_model_at_hand(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    monkeypatch.setattr(engine_memory, "memory", lambda: (100 * GB, 100 * GB))
    model, other = Model(str(tiny_sd), sampler="ddim"), Model(str(tiny_sd), sampler="lcm")
    jobs = {1: Job("a red fish", seed=1, steps=30), 2: Job("a red fish", seed=1, steps=4)}
    done = list[Done]()
    with worker_of(model) as ours:
        assert ours.recv() == Ready(model, (model,))
        ours.send(Keep((model, other)))
        assert ours.recv() == Held((model, other))
        ours.send(Task(1, jobs[1]))
        ours.send(Load(other))
        ours.send(Task(2, jobs[2]))
        while len(done) < 2:
            if isinstance(answer := ours.recv(), Done):
                done.append(answer)
    assert [one.number for one in done] == [2, 1]
    for one, own, foreign in zip(done, (other, model), (model, other), strict=True):
        fits = [
            alike(
                one.finished.image,
                Engine.load(str(tiny_sd), sampler=used.sampler).run(jobs[one.number]).image,
            )
            for used in (own, foreign)
        ]
        assert fits == [True, False]
    seconds = sum(one.finished.worker_s for one in done)
    assert seconds <= done[-1].busy_s + 1e-6  # none is counted twice


@pytest.mark.parametrize(
    "free_gb", [(49, 49), (50, 49)], ids=["there is no room", "it takes the room"]
)
def test_no_model_is_loaded_ahead_where_that_leaves_too_little_room(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, free_gb: tuple[int, int]
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    engines, model = _Engines(), Model(str(tiny_sd))
    engines.take_up(model)

    def memory() -> tuple[int, int]:
        return free_gb[len(engines.held) - 1] * GB, 100 * GB

    monkeypatch.setattr(engine_memory, "memory", memory)
    engines.keep([Model(str(tiny_sd), sampler="euler")])
    assert engines.held == (model,)


def test_a_model_that_cannot_be_loaded_ahead_costs_nothing(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    monkeypatch.setattr(engine_memory, "memory", lambda: (100 * GB, 100 * GB))
    engines, model = _Engines(), Model(str(tiny_sd))
    engines.take_up(model)
    other = Model(str(tiny_sd), sampler="euler")
    engines.keep([model, Model("./nowhere"), other])
    assert engines.held == (model, other)


@pytest.mark.parametrize("most", [0, 1], ids=["no picture fits", "one at a time fits"])
def test_pictures_that_lack_memory_are_made_without_the_models_at_hand(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Memory runs out while another model is held, with more than `most` pictures at once."""
    monkeypatch.setattr(process, "lower_priority", lambda: None)
    monkeypatch.setattr(engine_memory, "memory", lambda: (100 * GB, 100 * GB))
    model, other = Model(str(tiny_sd)), Model(str(tiny_sd), sampler="lcm")
    kept, advance = list[weakref.ref[Engine]](), Engine._advance
    keep = _Engines.keep

    def keeping(engines: _Engines, models: Iterable[Model]) -> None:
        keep(engines, models)
        kept.append(weakref.ref(engines._held[other]))

    def short(engine: Engine, group: Sequence[Any]) -> None:
        if kept[0]() is not None and len(group) > most:
            raise torch.OutOfMemoryError("no room")
        advance(engine, group)

    monkeypatch.setattr(_Engines, "keep", keeping)
    monkeypatch.setattr(Engine, "_advance", short)
    jobs = [Job("a red fish", seed=seed, steps=3) for seed in range(3)]
    answers = list[Answer]()
    with worker_of(model) as ours:
        assert ours.recv() == Ready(model, (model,))
        ours.send(Keep((other,)))
        assert ours.recv() == Held((model, other))
        for number, job in enumerate(jobs):
            ours.send(Task(number, job))
        while sum(isinstance(one, Done | Failed) for one in answers) < 3:
            answers.append(ours.recv())
    assert [one for one in answers if isinstance(one, Held)] == [Held((model,))]
    pictures = {one.number: one.finished.image for one in answers if isinstance(one, Done)}
    alone = Engine.load(str(tiny_sd))
    for number, job in enumerate(jobs):
        assert alike(pictures[number], alone.run(job).image)
