"""A request's way to its pictures: what is made again, what is answered, what is counted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from argus.config import Settings, SloClass
from argus.control.policy import Base, Cluster, Decision, first_free
from argus.control.request import Request
from argus.control.variants import EXACT
from argus.core.errors import BadRequest, Expired, ModelError
from argus.quality.drift import Drift
from argus.quality.encoder import PromptEncoder
from argus.server import scoring
from argus.server.dispatcher import Dispatcher
from argus.server.metrics import Metrics
from argus.server.preparation import Preparation
from argus.server.request import Full, ImageRequest, Picture, Shed
from argus.server.service import Service
from argus.server.slo import Classes
from argus.workers.fleet import HandedBack, TooLate, Yielded
from argus.workers.worker import Finished, WorkerError
from tests.conftest import constant_predictor
from tests.server.running import Running, running

T = TypeVar("T")

HASTY = "hasty"  # a class whose deadline passes while a test looks on


@pytest.fixture(scope="module")
def server(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    classes = {"default": SloClass(latency="60s"), HASTY: SloClass(latency="3s")}
    settings = Settings(
        family=str(measured_family), data=tmp_path_factory.mktemp("data"), workers=1,
        slo=classes, truth_share=0.0,
    )  # fmt: skip
    with running(settings) as server:
        yield server


def asked(prompt: str = "a red fish", **fields: Any) -> ImageRequest:
    values: dict[str, Any] = {
        "seed": 1, "width": 32, "height": 32, "size": (32, 32), "guidance": 3.0,
        "namespace": "everyone", "cached": False, **fields,
    }  # fmt: skip
    return ImageRequest(prompt=prompt, **values)


@dataclass
class Counter:
    """A dispatcher of its own over a server's parts, and what it counts."""

    service: Service
    encoder: Future[PromptEncoder] | None = None
    rollout: float = 1.0
    queue_limit: int = 8
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def dispatcher(self) -> Dispatcher:
        of = self.service
        encoder = self.encoder or of._encoder
        preparation = Preparation(
            of.model, encoder, of._router, of.retrieval, of.predictions, self.rollout
        )
        return Dispatcher(
            preparation, of._router, of.retrieval, of.fleet, self.metrics, self.queue_limit
        )

    def serve(self, request: ImageRequest) -> list[Picture]:
        return self.run(self.dispatcher.serve(request))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.service.loop).result(120)

    def counted(self, name: str = "argus_outcomes", label: str = "outcome") -> dict[str, float]:
        """Values of a counter by one of its labels."""
        (metric,) = (one for one in self.metrics.registry.collect() if one.name == name)
        totals = [one for one in metric.samples if one.name.endswith("_total")]
        sums: dict[str, float] = {}
        for one in totals:
            sums[one.labels[label]] = sums.get(one.labels[label], 0.0) + one.value
        return sums


@pytest.fixture
def counter(server: Running) -> Counter:
    return Counter(server.service)


# --- outcomes


def test_who_leaves_before_anything_is_known_of_the_prompt_is_counted(server: Running) -> None:
    counter = Counter(server.service, encoder=Future())

    async def leave() -> None:
        asking = asyncio.create_task(counter.dispatcher.serve(asked(count=2)))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    counter.run(leave())
    assert counter.counted() == {"cancelled": 2}


def test_what_the_encoder_cannot_do_is_counted_as_failed(server: Running) -> None:
    broken: Future[PromptEncoder] = Future()
    broken.set_exception(ModelError("no text encoder"))
    counter = Counter(server.service, encoder=broken)
    with pytest.raises(ModelError):
        counter.serve(asked(count=3))
    assert counter.counted() == {"failed": 3}


class Fickle(Base):
    """Sheds every second picture."""

    routed = 0

    def route(self, request: Request, cluster: Cluster) -> Decision:
        self.routed += 1
        worker = first_free(cluster, 0) if self.routed % 2 else None
        return Decision(EXACT, worker, "every second is shed")


def use(server: Running, policy: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    router = server.service.router
    assert router is not None
    monkeypatch.setattr(router.planning.controller, "policy", policy)


def slos(server: Running) -> tuple[Any, Any]:
    router = server.service.router
    assert router is not None
    return server.service.model.table, router.classes.slos(1.0)


def test_where_one_picture_of_a_request_is_shed_nobody_got_the_others(
    server: Running, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(server, Fickle(*slos(server)), monkeypatch)
    with pytest.raises(Shed):
        counter.serve(asked(count=3))
    assert counter.counted() == {"shed": 3}
    (made,) = counter.serve(asked())
    assert made.on_time
    assert counter.counted() == {"shed": 3, "on time": 1}


# --- pictures that are made again


class Doubting(Base):
    """Makes everything by `quick` and doubts it."""

    reviews = True

    def __init__(self, table: Any, slos: Any) -> None:
        super().__init__(table, slos)
        self.judged: list[float] = []
        self.light = table.variants.index("quick")

    def route(self, request: Request, cluster: Cluster) -> Decision:
        return Decision(self.light, first_free(cluster, 0), "the light one first")

    def review(self, request: Request, variant: int, judged: float) -> int | None:
        self.judged.append(judged)
        return EXACT


@pytest.fixture
def doubting(server: Running, monkeypatch: pytest.MonkeyPatch) -> Doubting:
    policy = Doubting(*slos(server))
    use(server, policy, monkeypatch)
    return policy


def test_a_doubted_picture_is_made_again(counter: Counter, doubting: Doubting) -> None:
    (made,) = counter.serve(asked())
    assert made.variant == "exact"
    assert len(doubting.judged) == 1


def test_a_pinned_picture_is_not_judged(counter: Counter, doubting: Doubting) -> None:
    (made,) = counter.serve(asked(pinned_variant="quick"))
    assert made.variant == "quick"
    assert doubting.judged == []


@pytest.mark.parametrize("why", ["the worker fails", "it hands back too late", "nobody is left"])
def test_a_doubted_picture_is_better_than_none(
    counter: Counter, doubting: Doubting, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    fleet, runs = counter.service.fleet, 0
    make = fleet.run

    async def once(request: Request, *how: Any, **also: Any) -> Finished:
        nonlocal runs
        runs += 1
        if runs == 1:
            return await make(request, *how, **also)
        if why == "the worker fails":
            raise WorkerError("it died three times")
        if why == "it hands back too late":
            await asyncio.sleep(request.expires_s + 0.05 - time.monotonic())
        else:
            fleet.queues[0].ready = False
        raise HandedBack

    monkeypatch.setattr(fleet, "run", once)
    try:
        (made,) = counter.serve(asked(slo_name=HASTY))
    finally:
        fleet.queues[0].ready = True
    assert made.variant == "quick"


def test_a_picture_that_cannot_be_judged_is_final(
    counter: Counter, doubting: Doubting, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weak:
        def score(self, prompts: list[str], images: list[Any]) -> None:
            raise BadRequest("no thing of its world")

    monkeypatch.setattr(counter.service.scorer, "_scorer", Weak())
    (made,) = counter.serve(asked("a photo of my dog"))
    assert made.variant == "quick"
    assert doubting.judged == []


def test_a_scorer_that_hangs_keeps_no_picture(
    counter: Counter, doubting: Doubting, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    class Hanging:
        def score(self, prompts: list[str], images: list[Any]) -> None:
            over.wait(60)

    monkeypatch.setattr(counter.service.scorer, "_scorer", Hanging())
    monkeypatch.setattr(scoring, "LIMIT_S", 0.01)
    (made,) = counter.serve(asked())
    over.set()
    assert made.variant == "quick"
    assert doubting.judged == []


def test_a_picture_is_judged_only_while_its_deadline_leaves_time(
    counter: Counter, doubting: Doubting, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    async def scores(prompt: str, images: list[Any], limit_s: float) -> list[float]:
        limits.append(limit_s)
        raise TimeoutError

    monkeypatch.setattr(counter.service.scorer, "scores", scores)
    (made,) = counter.serve(asked())
    assert made.on_time
    assert 0 < limits[0] <= made.request.deadline_s - made.request.arrived_s


class Stubborn(Base):
    """Routes to `quick` at the second time only, else exactly."""

    routed = 0

    def route(self, request: Request, cluster: Cluster) -> Decision:
        self.routed += 1
        variant = self.table.variants.index("quick") if self.routed == 2 else EXACT
        return Decision(variant, first_free(cluster, 0), "a test")


def test_a_variant_without_time_left_is_never_tried_again(
    server: Running, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, ran = Stubborn(*slos(server)), []
    use(server, policy, monkeypatch)

    async def no_time_then_handed_back(request: Request, *how: Any, **also: Any) -> Finished:
        ran.append(request.variant)
        raise TooLate("no time") if request.variant == EXACT else HandedBack

    monkeypatch.setattr(server.service.fleet, "run", no_time_then_handed_back)
    with pytest.raises(Expired):
        counter.serve(asked())
    assert ran == [EXACT, policy.table.variants.index("quick")]
    assert counter.counted() == {"dropped": 1}


# --- what is recorded of it


def test_a_shadow_picture_that_is_handed_back_is_recorded_once(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter(server.service, rollout=0.0)
    fleet, runs = server.service.fleet, 0
    make = fleet.run

    async def at_the_third_try(request: Request, *how: Any, **also: Any) -> Finished:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise HandedBack
        return await make(request, *how, **also)

    monkeypatch.setattr(fleet, "run", at_the_third_try)
    (made,) = counter.serve(asked())
    assert made.variant == "exact"
    assert counter.counted("argus_shadow_pictures", "variant") == {"exact": 1}


def test_an_error_of_the_last_predictor_says_nothing_of_the_new_one(
    server: Running, counter: Counter
) -> None:
    class Noted(Drift):
        def __init__(self) -> None:
            super().__init__()
            self.noted: list[float] = []

        def saw_error(self, error: float) -> None:
            self.noted.append(error)

    service = server.service
    learning, predictions = service.learning, service.predictions
    noted = learning.drift = Noted()
    made = [counter.serve(asked(pinned_variant="quick"))[0] for _ in range(2)]
    assert counter.run(learning.measure(made[0])) is not None
    assert len(noted.noted) == 1
    before = predictions.predictor
    assert before is not None
    predictions.predictor = constant_predictor(
        before.made_for, dict.fromkeys(before.variants, 0.5)
    )  # fmt: skip
    assert counter.run(learning.measure(made[1])) is not None
    assert len(noted.noted) == 1  # the waiting one was predicted by the predictor that is gone
    again = counter.serve(asked(pinned_variant="quick"))[0]
    assert counter.run(learning.measure(again)) is not None
    assert len(noted.noted) == 2


def test_the_quality_of_a_pinned_picture_says_nothing_of_decisions(
    server: Running, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = server.service.learning
    before = learning.measurements
    (pinned,) = counter.serve(asked(pinned_variant="quick"))
    assert counter.run(learning.measure(pinned)) is not None
    assert learning.measurements == before
    pinned.request.pinned_variant = None
    assert counter.run(learning.measure(pinned)) is not None
    assert learning.measurements == before + 1


# --- no room


@pytest.fixture
def unstarted(measured_family: Path, tmp_path: Path) -> Iterator[Service]:
    """Two workers without processes: the first could serve, and has a queue of 7 s."""
    service = Service(Settings(family=str(measured_family), data=tmp_path, workers=2, window_s=0.3))
    classes = Classes({}, 1.0, measured=True)
    service._router.set_result(service._new_router(classes))
    first, second = service.fleet.queues
    first.ready, second.alive, first.queued_s = True, False, 7.0
    first.next_s(time.monotonic())
    yield service
    service.cache.close()


def test_a_background_picture_whose_latents_were_fetched_makes_room_for_others(
    unstarted: Service,
) -> None:
    dispatcher, queue = Counter(unstarted).dispatcher, unstarted.fleet.queues[0]
    background = asked(background=True, yields=True)

    async def run() -> None:
        unstarted.fleet.reserve(background, 0)
        queue.enqueue(asked(), time.monotonic())
        with pytest.raises(Yielded):
            await dispatcher._run(background, Decision(EXACT, 0, ""), b"")

    before_s = queue.queued_s
    asyncio.run(run())
    assert [request.yields for _, _, request in queue.queued] == [False]
    queue.remove(queue.queued[0][2], time.monotonic(), done=False)
    assert queue.queued_s == pytest.approx(before_s)  # what was reserved is free again


def test_a_full_queue_says_when_a_worker_that_serves_has_room(unstarted: Service) -> None:
    full = Counter(unstarted, queue_limit=1)
    with pytest.raises(Full) as refused:
        asyncio.run(full.dispatcher.serve(asked(count=2)))
    assert refused.value.retry_after_s == 7
    assert full.counted() == {"shed": 2}


def test_refused_pictures_are_demand_too(unstarted: Service) -> None:
    full = Counter(unstarted, queue_limit=1)
    assert unstarted.router is not None
    planning = unstarted.router.planning

    async def refuse() -> None:
        running = asyncio.create_task(planning.run())
        for _ in range(100):
            with pytest.raises(Full):
                await full.dispatcher.serve(asked(count=4))
            await asyncio.sleep(0.005)
        running.cancel()

    asyncio.run(refuse())
    planning.plan()
    rate = unstarted.metrics.registry.get_sample_value("argus_forecast_rate")
    assert rate is not None
    assert rate > 0
