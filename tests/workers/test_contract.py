"""What every kind of worker does, wherever its engine lives. A new kind is one more in `KINDS`.

An upstream holds one model, returns no latents and shows no unfinished pictures, since the API that
it speaks has none of these: the tests of them are for engines that Argus runs itself.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
import torch

from argus.config import Upstream as Settings
from argus.core.errors import BadRequest, ModelError
from argus.core.job import Job
from argus.engine.engine import Engine
from argus.workers.local import LocalWorker
from argus.workers.packing import pack, unpack
from argus.workers.upstream import UpstreamWorker
from argus.workers.worker import Model, State, Unanswered, Worker, WorkerError
from tests.workers.clusters import ray_nodes
from tests.workers.pictures import alike
from tests.workers.upstreams import Upstream, upstream


@dataclass(frozen=True)
class Kind:
    """A kind of worker: how one is built, and killed from outside; whether Argus runs its engine,
    and a number of steps that last until the test ends them."""

    new: Callable[[Model], Worker]
    kill: Callable[[Worker], None]
    own_engine: bool = True
    long: int = 900


@contextmanager
def local() -> Iterator[Kind]:
    def kill(worker: Worker) -> None:
        assert isinstance(worker, LocalWorker) and worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    yield Kind(LocalWorker, kill)


@contextmanager
def on_ray() -> Iterator[Kind]:
    with ray_nodes(num_cpus=4) as nodes:
        import ray

        from argus.config import WorkerType
        from argus.workers.ray import RayCluster, RayWorker

        cluster = RayCluster(nodes.address, {"cpu": WorkerType(cpus=1)})
        slots = itertools.cycle(cluster.slots())

        def kill(worker: Worker) -> None:
            assert isinstance(worker, RayWorker)
            pid = ray.get(worker.actor.__ray_call__.remote(lambda actor: os.getpid()))
            os.kill(pid, signal.SIGKILL)

        yield Kind(lambda model: cluster.worker(next(slots), 0, model), kill)
        cluster.close()


BY_URL: dict[str, Upstream] = {}  # the servers of upstream workers


@contextmanager
def at_upstreams() -> Iterator[Kind]:
    with ExitStack() as servers:

        def new(model: Model) -> UpstreamWorker:
            server = servers.enter_context(upstream("vllm-omni", batch=4))
            BY_URL[server.url] = server
            return UpstreamWorker(Settings(url=server.url, concurrency=4), model)

        def kill(worker: Worker) -> None:
            assert isinstance(worker, UpstreamWorker)
            server = BY_URL[worker.upstream.url]
            server.kill()
            Thread(target=server.start_again).start()  # meanwhile it is noticed

        yield Kind(new, kill, own_engine=False, long=200)


KINDS = {"local": local, "ray": on_ray, "upstream": at_upstreams}


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(
    scope="module", params=["local", pytest.param("ray", marks=pytest.mark.cluster), "upstream"]
)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    with KINDS[request.param]() as kind:
        yield kind


@pytest.fixture
def own_engine(kind: Kind) -> None:
    if not kind.own_engine:
        pytest.skip("an upstream holds one model, returns no latents and shows no previews")


@pytest.fixture(scope="module")
def worker(runner: asyncio.Runner, kind: Kind, tiny_sd: Path) -> Iterator[Worker]:
    """One for all tests but those that stop theirs, because a worker takes seconds to start."""
    worker = runner.run(started(kind, tiny_sd))
    yield worker
    runner.run(worker.stop(grace_s=0.0))


async def started(kind: Kind, folder: Path) -> Worker:
    worker = kind.new(Model(str(folder)))
    worker.start()
    await worker.ready()
    return worker


async def running(worker: Worker, job: Job) -> asyncio.Task[object]:
    """A job that is being denoised: its first unfinished picture has come, or the server has it."""
    seen = asyncio.Event()
    task = asyncio.create_task(worker.run(job, previews=3, on_preview=lambda *_: seen.set()))
    if isinstance(worker, UpstreamWorker):
        server = BY_URL[worker.upstream.url]
        while not any(one["prompt"] == job.prompt for one in server.report()["seen"]):
            await asyncio.sleep(0.01)
    else:
        await seen.wait()
    return task


def test_it_makes_the_engine_s_picture_and_hands_up_latents(
    runner: asyncio.Runner, worker: Worker, own_engine: None, tiny_sd: Path
) -> None:
    job = Job("a red fish", seed=1, steps=4, guidance=3.0)
    expected = Engine.load(str(tiny_sd)).run(job, keep=[2])

    async def use() -> None:
        whole = await worker.run(job, keep=(2,))
        assert alike(whole.image, expected.image)
        assert {"encode", "denoise", "decode"} <= set(whole.timings_ms)
        assert torch.allclose(unpack(whole.kept[2]), expected.kept[2], atol=1e-3)
        resumed = Job("a red fish", seed=1, steps=4, guidance=3.0, skip=2)
        again = await worker.run(resumed, start=pack(expected.kept[2]))
        assert alike(again.image, expected.image)

    runner.run(use())


def test_it_shows_unfinished_pictures_in_order(
    runner: asyncio.Runner, worker: Worker, own_engine: None
) -> None:
    async def use() -> None:
        shown: list[int] = []
        await worker.run(
            Job("a red fish", steps=8), previews=3, on_preview=lambda index, _: shown.append(index)
        )
        assert shown == [0, 1, 2]

    runner.run(use())


IMPOSSIBLE = [  # by our own engines, and by an upstream
    (True, Job("a fish", steps=2, width=33), None, BadRequest, "multiple of 2"),
    (True, Job("a fish", steps=4, skip=2), b"no", WorkerError, "failed on this picture"),
    (False, Job("a fish", guidance=21.0), None, BadRequest, "Input should be from 0 to 20"),
    (False, Job("a fish", steps=4, skip=2), b"no", WorkerError, "cannot resume"),
]


def test_a_job_that_cannot_be_done_fails_alone(
    runner: asyncio.Runner, worker: Worker, kind: Kind
) -> None:
    async def use() -> None:
        restarts = worker.restarts
        for own_engine, job, start, error, says in IMPOSSIBLE:
            if own_engine == kind.own_engine:
                with pytest.raises(error, match=says):
                    await worker.run(job, start=start)
        assert (await worker.run(Job("a red fish", steps=2))).image.size == (32, 32)
        assert worker.restarts == restarts

    runner.run(use())


def test_cancelling_frees_the_work(runner: asyncio.Runner, worker: Worker, kind: Kind) -> None:
    async def use() -> None:
        endless = await running(worker, Job("a long fish", steps=kind.long))
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        assert (await worker.run(Job("a cup", steps=2))).image.size == (32, 32)

    runner.run(use())


def test_one_that_dies_is_replaced_and_no_job_is_lost(
    runner: asyncio.Runner, worker: Worker, kind: Kind
) -> None:
    async def use() -> None:
        restarts = worker.restarts
        jobs = [await running(worker, Job(f"{n} fish", steps=60)) for n in range(2)]
        kind.kill(worker)
        await asyncio.gather(*jobs)
        assert worker.restarts == restarts + 1

    runner.run(use())


def test_it_holds_another_model_once_its_jobs_are_done(
    runner: asyncio.Runner, kind: Kind, own_engine: None, tiny_sd: Path
) -> None:
    async def use() -> None:
        changes: list[str] = []
        held = kind.new(Model(str(tiny_sd)))
        held.on_change = lambda: changes.append(held.state.value)
        held.start()
        await held.ready()
        before = asyncio.create_task(held.run(Job("a red fish", steps=4)))
        await asyncio.sleep(0)
        held.load(Model(str(tiny_sd), sampler="euler"))
        assert held.state is State.STARTING
        await held.ready()
        assert before.done() and held.model.sampler == "euler" and held.restarts == 0
        assert changes[0] == changes[-1] == "ready"
        await held.stop(grace_s=0.0)

    runner.run(use())


def test_jobs_go_on_while_it_takes_up_a_model_at_hand_and_are_handed_back_if_it_dies(
    runner: asyncio.Runner, kind: Kind, own_engine: None, room: None, tiny_sd: Path
) -> None:
    async def use() -> None:
        first, other = Model(str(tiny_sd)), Model(str(tiny_sd), sampler="lcm")
        worker = kind.new(first)
        worker.start()
        await worker.ready()
        assert not worker.at_hand(other)
        await worker.keep([other], 60.0)
        assert worker.at_hand(other)
        before = await running(worker, Job("a red fish", steps=kind.long))
        worker.load(other)
        assert worker.state is State.READY and worker.model == other
        job = Job("a red fish", seed=1, steps=3)
        expected = Engine.load(str(tiny_sd), sampler="lcm").run(job).image
        assert not alike(expected, Engine.load(str(tiny_sd)).run(job).image)
        assert alike((await worker.run(job)).image, expected)
        assert not before.done()
        kind.kill(worker)
        with pytest.raises(Unanswered):
            await before
        assert alike((await worker.run(job)).image, expected)
        await worker.stop(grace_s=0.0)

    runner.run(use())


def test_a_model_that_cannot_be_loaded_is_said_and_another_can_take_its_place(
    runner: asyncio.Runner, kind: Kind, own_engine: None, tiny_sd: Path
) -> None:
    async def use() -> None:
        worker = kind.new(Model("./nowhere"))
        worker.start()
        with pytest.raises(ModelError, match="no folder"):
            await worker.ready()
        assert worker.state.value == "unusable" and worker.problem is not None
        with pytest.raises(WorkerError, match="unusable"):
            await worker.run(Job("a red fish"))
        worker.restart(Model(str(tiny_sd)))
        await worker.ready()
        assert (await worker.run(Job("a red fish", steps=2))).image.size == (32, 32)
        await worker.stop(grace_s=1.0)
        assert worker.state.value == "stopped"

    runner.run(use())


def test_stopping_finishes_running_jobs_within_the_grace(
    runner: asyncio.Runner, kind: Kind, tiny_sd: Path
) -> None:
    async def use() -> None:
        worker = await started(kind, tiny_sd)
        short = asyncio.create_task(worker.run(Job("a red fish", steps=5)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(worker.stop(grace_s=60.0))
        assert (await short).image.size == (32, 32)
        await stopping
        with pytest.raises(WorkerError, match="stopped"):
            await worker.run(Job("a red fish"))

    runner.run(use())


def test_a_stop_that_takes_too_long_ends_the_job_with_a_reason(
    runner: asyncio.Runner, kind: Kind, tiny_sd: Path
) -> None:
    async def use() -> None:
        worker = await started(kind, tiny_sd)
        run = await running(worker, Job("a fish", steps=kind.long))
        await worker.stop(grace_s=0.0)
        with pytest.raises(WorkerError, match="was stopped"):
            await run

    runner.run(use())
