"""Workers whose processes fail: real workers and a real fleet around scripted processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from argus.control.batching import StepBatching
from argus.control.request import Request
from argus.control.variants import DeviceType, variant_table
from argus.core.errors import ModelError, NotEnoughMemory
from argus.core.job import Job
from argus.core.profile import Profile
from argus.families.catalog import read_family
from argus.workers import local, supervised
from argus.workers.fleet import Fleet, HandedBack, TooLate
from argus.workers.local import LocalWorker
from argus.workers.worker import Finished, Model, State, Worker, WorkerError
from tests.workers import bodies

JOB = Job("a red fish", steps=6)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "run_process", bodies.run)
    monkeypatch.setattr(supervised, "FIRST_PAUSE_S", 0.01)
    for module in (local, supervised):
        monkeypatch.setattr(module, "PARTING_S", 0.1)


def with_worker(source: str, use: Callable[[LocalWorker], Awaitable[None]]) -> None:
    async def run() -> None:
        worker = LocalWorker(Model(source))
        worker.start()
        try:
            await use(worker)
        finally:
            await worker.stop(grace_s=0.0)

    asyncio.run(asyncio.wait_for(run(), 300))


def with_fleet(
    family_file: Path,
    sources: tuple[str, str],
    use: Callable[[Fleet, list[int]], Awaitable[None]],
    workers: int = 1,
) -> None:
    """Workers that hold the first of two models; `use` also gets a list that grows by one with
    every change that asks for a plan."""
    family = read_family(family_file)
    profile = Profile.read(family_file.parent / "profile.json")
    table = variant_table(family, [DeviceType.of(profile)])
    models = [Model(source) for source in sources]
    able = [LocalWorker(models[0]) for _ in range(workers)]
    plans: list[int] = []

    async def run() -> None:
        fleet = Fleet(table, [models], able, StepBatching(), lambda: plans.append(len(plans)))
        fleet.start()
        try:
            await asyncio.gather(*(worker.ready() for worker in able))
            await use(fleet, plans)
        finally:
            await fleet.stop(grace_s=0.0)

    asyncio.run(asyncio.wait_for(run(), 300))


def request(limit_s: float = 600.0, deaths: int = 0) -> Request:
    at = time.monotonic() + limit_s
    return Request(deadline_s=at, expires_s=at, work_steps=6.0, deaths=deaths)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def kill(worker: Worker, how: signal.Signals = signal.SIGKILL) -> None:
    assert isinstance(worker, LocalWorker) and worker.pid is not None
    os.kill(worker.pid, how)


@pytest.mark.slow
def test_a_niceness_that_is_higher_already_stays() -> None:
    code = (
        "import os; from argus.workers.process import lower_priority; "
        "lower_priority(); print(os.nice(0))"
    )
    for given, expected in ((0, 5), (10, 10)):
        said = subprocess.run(
            ["nice", "-n", str(given), sys.executable, "-c", code],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        before = os.nice(0)
        assert int(said.stdout) == max(before + given, expected)


@pytest.mark.parametrize("second", ["short", "kills"])
def test_a_worker_goes_back_from_a_model_that_it_cannot_load(
    measured_family: Path, second: str
) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        fleet.move([1])
        await until(lambda: fleet.cluster().models == [-1])
        await until(lambda: fleet.cluster().models == [0])
        assert fleet.workers[0].restarts <= 5
        with pytest.raises(WorkerError, match="other cannot work"):
            fleet.require(1)
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)

    with_fleet(measured_family, ("fits", second), use)


def test_memory_that_is_short_beside_the_last_model_is_tried_once_more_without_it(
    measured_family: Path, tmp_path: Path
) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        fleet.move([1])
        await until(lambda: fleet.cluster().models == [1])
        assert fleet.workers[0].restarts == 1

    with_fleet(measured_family, ("fits", f"count:{tmp_path / 'loads'}:short,fits"), use)


def test_a_worker_whose_second_model_failed_often_still_tries_its_first(tmp_path: Path) -> None:
    async def use(worker: LocalWorker) -> None:
        await worker.ready()
        kill(worker)
        await until(lambda: worker.state is State.UNUSABLE)
        assert isinstance(worker.problem, ModelError)
        worker.restart(Model("fits"))
        await worker.ready()
        assert isinstance(await worker.run(JOB), Finished)

    kinds = "fits,short,short,short,broken"
    with_worker(f"count:{tmp_path / 'loads'}:{kinds}", use)


def test_a_first_model_without_memory_is_given_up_at_once() -> None:
    async def use(worker: LocalWorker) -> None:
        with pytest.raises(NotEnoughMemory):
            await worker.ready()
        assert worker.restarts == 0

    with_worker("short", use)


def test_a_process_that_sends_nonsense_is_replaced() -> None:
    async def use(worker: LocalWorker) -> None:
        await worker.ready()
        with pytest.raises(WorkerError, match="died 3 times"):
            await worker.run(JOB)
        assert worker.restarts >= 2

    with_worker("garbled", use)


def test_a_process_that_hangs_is_replaced_but_its_first_picture_may_take_longer() -> None:
    async def use(worker: LocalWorker) -> None:
        await worker.ready()
        worker.silence_s = lambda: 0.4
        assert isinstance(await worker.run(JOB), Finished)  # after a second without a word
        assert worker.restarts == 0
        again = asyncio.create_task(worker.run(JOB))
        await until(lambda: worker.restarts == 1)
        assert isinstance(await again, Finished)  # the first of the next process

    with_worker("slow", use)


def test_what_a_dead_worker_had_is_handed_back_though_nobody_else_serves(
    measured_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "FIRST_PAUSE_S", 60.0)  # it does not come back

    async def use(fleet: Fleet, plans: list[int]) -> None:
        kill(fleet.workers[0], signal.SIGSTOP)
        fleet.queues[0].batch_limit = lambda kind, model: 1
        runs = [asyncio.create_task(fleet.run(request(), JOB, 0, 0)) for _ in range(3)]
        await until(lambda: len(fleet.queues[0].queued) == 2)
        kill(fleet.workers[0])
        for found in await asyncio.gather(*runs, return_exceptions=True):
            assert isinstance(found, HandedBack)
        assert fleet.idle

    with_fleet(measured_family, ("fits", "fits"), use)


def test_a_job_that_is_tried_alone_is_given_up_at_its_deadline_while_the_worker_is_dead(
    measured_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "FIRST_PAUSE_S", 60.0)

    async def use(fleet: Fleet, plans: list[int]) -> None:
        kill(fleet.workers[0], signal.SIGSTOP)
        deadly = asyncio.create_task(fleet.run(request(2.0, deaths=1), JOB, 0, 0))
        await until(lambda: fleet.cluster().running[0] == 1)
        kill(fleet.workers[0])
        await until(lambda: fleet.cluster().models == [-1])
        assert not deadly.done()  # it stays with the worker that it killed
        with pytest.raises(TooLate):
            await deadly
        assert fleet.idle

    with_fleet(measured_family, ("fits", "fits"), use)


def test_a_hung_worker_s_jobs_are_handed_back_and_it_is_replaced(measured_family: Path) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)
        kill(fleet.workers[0], signal.SIGSTOP)
        asked = request()
        with pytest.raises(HandedBack):
            await fleet.run(asked, JOB, 0, 0)
        assert asked.failed_at == (0,)  # it goes to others first
        assert isinstance(await fleet.run(asked, JOB, 1, 0), Finished)
        await until(lambda: fleet.cluster().models == [0, 0])
        assert isinstance(await fleet.run(request(), JOB, 0, 0), Finished)

    with_fleet(measured_family, ("fits", "fits"), use, workers=2)


def test_requests_rather_go_elsewhere_while_a_worker_is_silent(measured_family: Path) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        kill(fleet.workers[0], signal.SIGSTOP)
        held = asyncio.create_task(fleet.run(request(), JOB, 0, 0))
        await until(lambda: fleet.cluster().wait_s[0] > 0.5)
        assert fleet.cluster().wait_s[1] == 0
        held.cancel()

    with_fleet(measured_family, ("fits", "fits"), use, workers=2)


def test_a_plan_is_asked_for_when_a_worker_goes_and_when_it_is_back(measured_family: Path) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        before = len(plans)
        kill(fleet.workers[0])
        await until(lambda: fleet.cluster().models == [-1, 0])
        assert len(plans) == before + 1
        await until(lambda: fleet.cluster().models == [0, 0])
        assert len(plans) == before + 2

    with_fleet(measured_family, ("fits", "fits"), use, workers=2)


def test_no_job_is_made_with_another_model_than_it_was_routed_to(
    measured_family: Path, tmp_path: Path
) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        fleet.move([1])
        await until(lambda: fleet.cluster().models == [1])
        kill(fleet.workers[0], signal.SIGSTOP)
        fleet.queues[0].batch_limit = lambda kind, model: 1
        runs = [asyncio.create_task(fleet.run(request(), JOB, 0, 1)) for _ in range(2)]
        await until(lambda: len(fleet.queues[0].queued) == 1)
        kill(fleet.workers[0])  # and the model cannot be loaded again
        await until(lambda: fleet.cluster().models == [0])
        for found in await asyncio.gather(*runs, return_exceptions=True):
            assert isinstance(found, HandedBack)

    with_fleet(measured_family, ("fits", f"count:{tmp_path / 'loads'}:fits,broken"), use)


def test_calibration_waits_for_a_worker_that_died(measured_family: Path) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        kill(fleet.workers[0])
        await until(lambda: fleet.workers[0].state is not State.READY)
        assert await fleet.calibrate([(JOB, 6.0)] * 2) > 0

    with_fleet(measured_family, ("fits", "fits"), use)


def test_workers_that_never_worked_say_nothing_about_the_machine(measured_family: Path) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        fleet.queues[0].set_slowness(9.0)
        assert fleet.scale == pytest.approx(9.0)
        fleet.queues[1].set_slowness(4.0)
        assert fleet.scale == pytest.approx(6.0)
        fleet.queues[1].alive = False
        assert fleet.scale == pytest.approx(9.0)
        fleet.queues[1].alive = True

    with_fleet(measured_family, ("fits", "fits"), use, workers=2)


def test_what_waits_too_long_to_begin_is_given_up_and_what_has_begun_is_not(
    measured_family: Path,
) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        kill(fleet.workers[0], signal.SIGSTOP)
        fleet.queues[0].batch_limit = lambda kind, model: 1
        at = time.monotonic() + 0.5
        patient = [Request(deadline_s=at, begin_by_s=at, work_steps=1e6) for _ in range(2)]
        begun, waits = (asyncio.create_task(fleet.run(one, JOB, 0, 0)) for one in patient)
        with pytest.raises(TooLate):
            await waits
        kill(fleet.workers[0], signal.SIGCONT)
        assert isinstance(await begun, Finished)

    with_fleet(measured_family, ("fits", "fits"), use)


def test_who_waits_for_a_model_can_be_cancelled_as_it_comes(measured_family: Path) -> None:
    async def use(fleet: Fleet, plans: list[int]) -> None:
        waiting = asyncio.create_task(fleet.holding(1, 60.0))
        await asyncio.sleep(0)
        fleet._tell()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    with_fleet(measured_family, ("fits", "slow"), use)
