"""Several real workers: jobs are spread, models move, and a worker's death loses nothing."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from argus.control.batching import StepBatching
from argus.control.request import Request
from argus.control.variants import DeviceType, variant_table
from argus.core.job import Job
from argus.core.profile import Profile
from argus.engine.engine import Engine
from argus.families.catalog import read_family
from argus.workers import fleet as fleets
from argus.workers.fleet import MOST_YIELDING, Fleet, HandedBack, TooLate, Yielded
from argus.workers.local import LocalWorker
from argus.workers.worker import Finished, Model, WorkerError
from tests.workers.pictures import alike

JOB = Job("a red fish", seed=1, steps=6, guidance=3.0, width=32, height=32)
LONG = Job("a red fish", seed=1, steps=400, guidance=3.0, width=32, height=32)


def with_fleet(family_file: Path, use: Callable[[Fleet], Awaitable[None]]) -> None:
    """Two workers and two models, both with the first."""
    family = read_family(family_file)
    profile = Profile.read(family_file.parent / "profile.json")
    models = [
        Model(source, sampler, threads=1)
        for source, sampler in zip(family.models.values(), ("ddim", "lcm"), strict=True)
    ]
    table = variant_table(family, [DeviceType.of(profile)])
    workers = [LocalWorker(models[0]) for _ in range(2)]

    async def run() -> None:
        fleet = Fleet(table, [models], workers, StepBatching())
        fleet.start()
        try:
            await asyncio.gather(*(worker.ready() for worker in workers))
            await use(fleet)
        finally:
            await fleet.stop(grace_s=0.0)

    asyncio.run(asyncio.wait_for(run(), 300))


def request(job: Job = JOB, limit_s: float = 600.0) -> Request:
    at = time.monotonic() + limit_s
    return Request(deadline_s=at, expires_s=at, work_steps=float(job.steps))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_a_model_moves_while_the_others_serve(measured_family: Path) -> None:
    async def use(fleet: Fleet) -> None:
        held = asyncio.create_task(fleet.run(request(LONG), LONG, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        fleet.move([1, 1])  # both, but never at once
        assert fleet.cluster().models == [-1, 0]
        with pytest.raises(HandedBack):
            await fleet.run(request(), JOB, 0, 0)
        assert isinstance(await fleet.run(request(), JOB, 1, 0), Finished)
        assert isinstance(await held, Finished)  # what was in flight was finished
        await until(lambda: fleet.cluster().models == [1, 1])
        assert fleet.loads == 2
        made = await asyncio.gather(*(fleet.run(request(), JOB, n % 2, 1) for n in range(6)))
        assert all(isinstance(one, Finished) for one in made)

    with_fleet(measured_family, use)


def test_models_at_hand_are_taken_up_while_pictures_are_made(
    measured_family: Path, room: None
) -> None:
    family = read_family(measured_family)
    source = list(family.models.values())[1]
    expected = Engine.load(source, sampler="lcm").run(JOB).image
    assert not alike(expected, Engine.load(source, sampler="ddim").run(JOB).image)

    async def use(fleet: Fleet) -> None:
        await fleet.calibrate([(JOB, 6.0)] * 2)
        held = asyncio.create_task(fleet.run(request(LONG), LONG, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        fleet.move([1, 1])
        assert fleet.cluster().models == [1, 1]
        assert max(queue.free_at_s for queue in fleet.queues) <= time.monotonic()  # they begin more
        made = await asyncio.gather(*(fleet.run(request(), JOB, n % 2, 1) for n in range(6)))
        assert all(alike(one.image, expected) for one in made)
        assert not held.done() and isinstance(await held, Finished)
        assert fleet.queues[0].guests == set()

    with_fleet(measured_family, use)


def test_what_was_begun_as_a_worker_took_up_another_model_is_handed_back(
    measured_family: Path, room: None
) -> None:
    async def use(fleet: Fleet) -> None:
        await fleet.calibrate([(JOB, 6.0)] * 2)
        begun = asyncio.create_task(fleet.run(request(), JOB, 0, 0))
        await asyncio.sleep(0)  # it runs by the books, and the worker has not heard of it
        assert fleet.queues[0].running
        fleet.move([1, 0])
        with pytest.raises(HandedBack):
            await begun

    with_fleet(measured_family, use)


def test_a_plan_that_changes_its_mind_while_a_worker_finishes_costs_no_worker(
    measured_family: Path,
) -> None:
    async def use(fleet: Fleet) -> None:
        held = asyncio.create_task(fleet.run(request(LONG), LONG, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        fleet.move([1, 0])
        assert fleet.cluster().models == [-1, 0]
        fleet.move([0, 0])
        assert fleet.cluster().models == [0, 0]
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)
        assert isinstance(await held, Finished)
        assert fleet.loads == 0

    with_fleet(measured_family, use)


def test_the_exact_model_is_never_gone_while_two_workers_swap(measured_family: Path) -> None:
    async def use(fleet: Fleet) -> None:
        fleet.move([0, 1])
        await until(lambda: fleet.cluster().models == [0, 1])
        fleet.move([1, 0])
        seen = set()
        while fleet.cluster().models != [1, 0]:
            seen.add(tuple(fleet.cluster().models))
            await asyncio.sleep(0.001)
        assert all(0 in models for models in seen)

    with_fleet(measured_family, use)


def test_a_pinned_model_is_fetched_and_kept_against_the_plan(measured_family: Path) -> None:
    async def use(fleet: Fleet) -> None:
        assert 1 not in fleet.targets
        fleet.require(1)
        number = await fleet.holding(1, 60.0)
        assert isinstance(await fleet.run(request(), JOB, number, 1), Finished)
        fleet.move([0, 0])
        assert sorted(fleet.targets) == [0, 1]

    with_fleet(measured_family, use)


def test_the_first_picture_of_a_process_does_not_count_for_its_speed(
    measured_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = [0.0]  # seconds of a clock that only pictures move

    async def use(fleet: Fleet) -> None:
        await fleet.retire(1).stop(grace_s=0.0)
        seconds = iter([9.0, 1.0, 1.2, 1.0, 1.0])  # the first alone is longer than all may take

        async def run(job: Job) -> None:
            spent[0] += next(seconds)

        monkeypatch.setattr(fleet.workers[0], "run", run)
        monkeypatch.setattr(fleets, "time", SimpleNamespace(monotonic=lambda: spent[0]))
        await fleet.calibrate([(JOB, 6.0)] * 2)
        step_s = fleet._table.batch_step_s(0, 0, 1)
        assert fleet.scale == fleet.idle_scale == pytest.approx(1 / (6 * step_s))

    with_fleet(measured_family, use)


def test_a_pinned_model_is_given_back_when_nobody_asks_for_it(
    measured_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleets, "HELD_S", 0.5)
    monkeypatch.setattr(fleets, "HELD_LOADS", 0.0)

    async def use(fleet: Fleet) -> None:
        planned = fleet.planned
        fleet.require(1)
        waiting = asyncio.create_task(fleet.holding(1, 60.0))
        assert isinstance(await fleet.run(request(), JOB, await waiting, 1), Finished)
        assert fleet.planned == planned  # a pin is no plan
        await until(lambda: fleet.targets == planned)
        await until(lambda: fleet.cluster().models == planned)

    with_fleet(measured_family, use)


def test_an_idle_worker_gives_up_a_pinned_model_for_another_pin(measured_family: Path) -> None:
    async def use(fleet: Fleet) -> None:
        await fleet.retire(1).stop(grace_s=0.0)  # one worker, two models
        fleet.require(0)
        held = asyncio.create_task(fleet.run(request(LONG), LONG, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        waiting = asyncio.create_task(fleet.holding(1, 280.0))
        fleet.require(1)
        assert fleet.targets[0] == 0  # not while it is busy
        assert isinstance(await held, Finished)
        assert await waiting == 0
        assert fleet.targets[0] == 1

    with_fleet(measured_family, use)


def test_a_model_that_cannot_be_loaded_costs_no_worker(
    measured_family: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    shutil.rmtree(broken / "unet")

    async def use(fleet: Fleet) -> None:
        first, second = fleet._models[0]
        fleet._models = [[first, replace(second, source=str(broken))]]
        fleet.move([1, 0])
        await until(lambda: fleet.cluster().models == [-1, 0])
        await until(lambda: fleet.cluster().models == [0, 0])
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)
        with pytest.raises(WorkerError, match="other cannot work"):
            fleet.require(1)

    with_fleet(measured_family, use)


def test_a_dead_worker_s_jobs_are_handed_back_and_it_returns(measured_family: Path) -> None:
    async def use(fleet: Fleet) -> None:
        lost = asyncio.create_task(fleet.run(request(LONG), LONG, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        worker = fleet.workers[0]
        assert isinstance(worker, LocalWorker) and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(HandedBack):
            await lost
        assert fleet.cluster().models == [-1, 0]
        assert isinstance(await fleet.run(request(), JOB, 1, 0), Finished)
        await until(lambda: fleet.cluster().models == [0, 0])
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)

    with_fleet(measured_family, use)


def test_a_job_without_time_is_refused_and_a_cancelled_one_leaves_no_trace(
    measured_family: Path,
) -> None:
    async def use(fleet: Fleet) -> None:
        with pytest.raises(TooLate):
            await fleet.run(request(limit_s=0.0), JOB, 0, 0)
        task = asyncio.create_task(fleet.run(request(LONG), LONG, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        task.cancel()
        await until(lambda: fleet.idle)
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)

    with_fleet(measured_family, use)


def test_requests_that_yield_make_room_at_as_many_workers_as_are_needed(
    measured_family: Path,
) -> None:
    def yielding() -> Request:
        return replace(request(LONG), deadline_s=math.inf, expires_s=math.inf, yields=True)

    async def use(fleet: Fleet) -> None:
        room = fleet.room
        assert room == 2 * MOST_YIELDING
        many = [asyncio.create_task(fleet.run(yielding(), LONG, n, 0)) for n in (0, 0, 1)]
        await until(lambda: fleet.cluster().running == [2, 1])
        assert fleet.room == room - 3
        fleet.make_room(1)  # at the worker where less is lost
        with pytest.raises(Yielded):
            await many[2]
        other = asyncio.create_task(fleet.run(request(LONG), LONG, 1, 0))
        await until(lambda: fleet.cluster().running == [2, 1])
        assert (fleet.spare(0), fleet.spare(1)) == (True, False)
        assert (fleet.unyielding, fleet.room) == (1, MOST_YIELDING - 2)
        fleet.make_room(2)  # one is all that there is
        for task in many[:2]:
            with pytest.raises(Yielded):
                await task
        assert not other.done()
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)
        other.cancel()

    with_fleet(measured_family, use)
