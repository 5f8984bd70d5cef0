"""Builds a server's parts from its settings, and starts and stops them."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import statistics
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING

from PIL import Image

from argus.config import Settings
from argus.control.batching import StepBatching
from argus.control.breaker import FETCH_SHARE
from argus.control.controller import Controller
from argus.control.policy import Slo
from argus.core.errors import BadRequest
from argus.core.family import Variant
from argus.core.job import Job
from argus.server.bursts import Bursts
from argus.server.cluster import ClusterWatch, open_cluster
from argus.server.dispatcher import Dispatcher
from argus.server.errors import ApiError
from argus.server.health import StorageHealth
from argus.server.jobs import Jobs
from argus.server.keys import KeyRing
from argus.server.learning import SAMPLES, Learning
from argus.server.live import Live
from argus.server.metrics import Metrics
from argus.server.model import ServedFamily
from argus.server.pictures import Pictures, encode_picture
from argus.server.planning import Planning
from argus.server.predictions import Predictions
from argus.server.preparation import Preparation
from argus.server.request import Picture
from argus.server.retrieval import LATENTS, Retrieval
from argus.server.router import Router, check_policy, live_policy
from argus.server.scoring import ScoringThread
from argus.server.slo import DEFAULT, MARGIN, Classes
from argus.server.storage import catalogue_url, open_cache, open_pictures
from argus.server.threads import loaded
from argus.server.tracing import Tracing
from argus.server.usage import Usage
from argus.server.words import Words
from argus.workers.fleet import Fleet
from argus.workers.local import LocalWorker
from argus.workers.upstream import UpstreamWorker
from argus.workers.worker import WorkerError

if TYPE_CHECKING:
    from argus.quality.encoder import PromptEncoder

log = logging.getLogger(__name__)

DEFAULT_POLICY, UNMEASURED_POLICY = "price", "nirvana"
TRIALS = 7
TRIAL = "a picture to see how long one takes"
STOP_S = 10.0  # for the workers' processes to end
LOADING_S = 5.0  # for the prompt encoder, if it is still being loaded
SETTLE_S = 5.0  # to store the last pictures' latents; dropping them costs only cache hits
TRACES_S = 2.0  # to send the last traces
RETRY_S = "5"
CALIBRATE_AGAIN_S = 5.0  # after no worker made a picture


class Service:
    """The parts of a server. Raises BadRequest and ModelError for settings that cannot be
    served."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.keys = None if settings.api_key_file is None else KeyRing(settings.api_key_file)
        self.cluster = open_cluster(settings)
        self.model = model = ServedFamily.of(settings, self.cluster)
        self.family = model.family
        self._check_names()
        self.policy = _policy_name(settings, model)
        batching = live_policy(self.policy, model.table, [Slo(math.inf)]).batching
        if settings.policy is None:  # a paper's own batching only where its policy is set
            batching = StepBatching()
        self._at_start = self.policy, batching
        self._encoder: Future[PromptEncoder] = Future()
        self._router: Future[Router] = Future()
        grows = self.cluster is not None
        self.fleet = Fleet(model.table, model.models, [], batching, self._replan, grows)
        self.nodes = None
        if self.cluster is not None:
            self.nodes = ClusterWatch(self.cluster, self.fleet, model.table, model.models)
        home = model.models[0][model.table.home(0)]
        self.workers = [LocalWorker(replace(home, device=device)) for device in model.devices]
        for worker in self.workers:
            self.fleet.add(worker)
        for one, kind in model.upstreams:
            held = model.models[kind][model.table.home(kind)]
            self.fleet.add(UpstreamWorker(one, held, device_type=kind))
        self.metrics = Metrics(self.family.name, settings.router_metrics)
        self.metrics.expect({DEFAULT, *settings.slo}, model.table.variants)
        self.tracing = Tracing.of(settings)
        self.cache = open_cache(settings, serving=True)
        self.health = StorageHealth()
        self.retrieval = Retrieval(self.cache, self.health)
        self.predictions = Predictions(model.predictor, model.table)
        folder = settings.data / "pictures"
        self.pictures = Pictures(open_pictures(folder, settings.url_ttl_s), self.health)
        self.scorer = ScoringThread(model)
        self.words = Words(model.family)
        self.learning = Learning(
            settings, model, self.fleet, self.predictions, self.scorer, self.metrics, self.health
        )
        self.health.add(SAMPLES, self.cache.probe_catalogue)  # both are in one database
        share = 1.0 if settings.rollout is None else settings.rollout
        self.rollout = 0.0 if settings.shadow and settings.rollout is None else share
        self.usage = Usage(catalogue_url(settings), self.family.name, self.health)
        preparation = Preparation(
            model, self._encoder, self._router, self.retrieval, self.predictions, self.rollout,
            settings.timeout_s,
        )  # fmt: skip
        self.dispatcher = Dispatcher(
            preparation, self._router, self.retrieval, self.fleet, self.metrics,
            settings.queue_limit, settings.metrics_by_key, self._saw,
        )  # fmt: skip
        self.jobs = Jobs(self)
        self.live, self.bursts = Live(self), Bursts(self)
        self._tasks: list[asyncio.Task[None]] = []
        self.leaving = self.draining = False
        self.accepted = 0  # requests that are not answered in full; `Leaving` counts them

    def _check_names(self) -> None:
        own = self._own_names
        for name in self.settings.served_model_names:
            if name in own:
                raise BadRequest(
                    f"served_model_names has {name!r}, which the family's own names have already: "
                    "leave it out."
                )

    @property
    def model_names(self) -> list[str]:
        """The names that a request's `model` may have: the family and its variants, and the
        `served_model_names`."""
        return list(dict.fromkeys([*self._own_names, *self.settings.served_model_names]))

    @property
    def _own_names(self) -> list[str]:
        name = self.family.name
        return [name, *(f"{name}/{variant}" for variant in self.model.variants)]

    def variant_of(self, model: str) -> str | None:
        """The variant that a request's `model` pins, None if it names the family as a whole.

        Raises ApiError for a name that is not in `model_names`.
        """
        if model not in self.model_names:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"There is no model {model!r}; the models are {', '.join(self.model_names)}.",
                "model_not_found",
                "model",
            )
        if model in self.settings.served_model_names:
            return None
        return model.removeprefix(self.family.name).removeprefix("/") or None

    def unavailable(self) -> ApiError:
        """The error that says why no picture can be made now."""
        if self.leaving:
            return ApiError(
                503, "The server is shutting down: ask again.", "shutting_down",
                headers={"Retry-After": RETRY_S},
            )  # fmt: skip
        problem = self.problem
        if problem is not None:
            return ApiError(503, f"This server can make no pictures: {problem}", "worker_unusable")
        return ApiError(503, "The model is loading.", "loading", headers={"Retry-After": RETRY_S})

    @property
    def problem(self) -> Exception | None:
        """The error that keeps this server from ever making a picture, or None."""
        for loading in (self._encoder, self._router):
            failed = loading.exception() if loading.done() else None
            if isinstance(failed, Exception):
                return failed
        return self.fleet.problem or (None if self.nodes is None else self.nodes.problem)

    @property
    def ready(self) -> bool:
        loaded = self._encoder.done() and self._router.done() and self.fleet.ready
        return loaded and not self.leaving and self.problem is None

    @property
    def degraded(self) -> list[str]:
        """The kinds of state that cannot be stored now, or not be read (latents)."""
        unread = {LATENTS} if self.retrieval.failing else set()
        return sorted(unread.union(self.health.degraded))

    @property
    def router(self) -> Router | None:
        """The router, once workers are ready."""
        done = self._router.done() and self._router.exception() is None
        return self._router.result() if done else None

    def start(self) -> None:
        """Load the model in the workers and, at the same time, the prompt encoder here."""
        self.loop = asyncio.get_running_loop()
        self.fleet.start()
        if self.nodes is not None:
            self._tasks.append(asyncio.create_task(self.nodes.run()))
        Thread(target=self._load_encoder, daemon=True).start()
        self._tasks.append(asyncio.create_task(self._start()))
        self._tasks.append(asyncio.create_task(self.usage.run()))
        self._tasks.append(asyncio.create_task(self.live.run()))
        self._tasks.append(asyncio.create_task(self.retrieval.follow()))
        self.jobs.runner.start()
        if self.settings.cache_latents is not None:  # an object store was not asked yet
            self._tasks.append(asyncio.create_task(self.health.check(LATENTS)))

    def _load_encoder(self) -> None:
        try:
            from argus.quality import encoder  # here, because it takes seconds to import

            self._encoder.set_result(encoder.PromptEncoder.load(self.model.encoder))
        except Exception as error:
            self._encoder.set_exception(error)

    async def _start(self) -> None:
        """Once workers are ready: measure how fast they are, and start the policy."""
        loading = asyncio.create_task(self.retrieval.load())
        self._tasks.append(loading)
        try:
            ready = (worker.ready() for worker in self.fleet.present)
            await asyncio.gather(*ready, return_exceptions=True)
            if self.fleet.problem is not None:
                return
            encoder = await loaded(self._encoder)
            await loading
            exact = self.family.exact
            exact_s = await self._calibrated()
            exact_s += await asyncio.to_thread(_way_s, encoder, exact, TRIAL)
            classes = Classes(self.settings.slo, exact_s, self.model.profiled)
            router = self._new_router(classes)
            log.info("An exact picture takes %.2f s here; deadlines: %s", exact_s, classes)
            self._router.set_result(router)
            gc.collect()
            gc.freeze()  # what is loaded by now stays: looking through it holds up requests
        except Exception as error:
            self._router.set_exception(error)
            return
        limit_s = FETCH_SHARE * (1 - MARGIN) * classes[DEFAULT].deadline_s
        await asyncio.gather(
            router.planning.run(), self.learning.run(), self.retrieval.watch(limit_s),
            self.retrieval.keep_saved(),
        )  # fmt: skip

    async def _calibrated(self) -> float:
        """Seconds of an exact picture on the fastest worker. Raises WorkerError if no worker makes
        one, and none may join that does."""
        while True:
            try:
                return await self.fleet.calibrate(self._trials())
            except WorkerError as error:
                if self.nodes is None:
                    raise
                log.warning("%s; tried again", error)
                await asyncio.sleep(CALIBRATE_AGAIN_S)

    def _trials(self) -> list[tuple[Job, float]]:
        """For each model a job by its best variant, and its work steps."""
        table = self.model.table
        first: dict[int, tuple[Job, float]] = {}
        for v, name in enumerate(table.variants):
            if not table.skip[v]:
                job = self.model.variants[name].job(TRIAL, 0)
                first.setdefault(int(table.model[v]), (job, float(table.steps[v])))
        return [first[m] for m in range(len(table.models))]

    def _new_router(self, classes: Classes) -> Router:
        """The router for workers that are as fast as they are now."""
        slowness = self.fleet.scale
        policy = live_policy(self.policy, self.model.table, classes.slos(slowness))
        controller = Controller(
            policy, classes.slos, self.settings.window_s, slowness, time.monotonic()
        )
        planning = Planning(
            controller, self.fleet, self.model.table, self.metrics,
            lambda: self.retrieval.usable, self.rollout > 0,
        )  # fmt: skip
        return Router(
            self.model, planning, classes, self.fleet, self.retrieval, self.predictions,
            self.scorer,
        )  # fmt: skip

    def _saw(self, picture: Picture) -> None:
        self.usage.saw(picture)
        self.learning.saw(picture)
        self.live.saw(picture)

    def switch(self, name: str) -> None:
        """Have another policy decide from now on, and plan at once; the setting does not change.
        Requests that were decided on keep their variants and workers.

        Raises BadRequest and ModelError for a policy that cannot be used, ApiError while the
        server starts or stops.
        """
        check_policy(name, self.model)
        router = self.router
        if router is None or self.leaving:
            raise self.unavailable()
        if name == self.policy:
            return
        policy = live_policy(name, self.model.table, router.classes.slos(self.fleet.scale))
        router.planning.adopt(policy)
        if not self.settings.shadow:
            first, batching = self._at_start
            self.fleet.rebatch(batching if name == first else policy.batching)
        log.info("The policy is now %s; it was %s", name, self.policy)
        self.policy = name

    def is_admin(self, tenant: str) -> bool:
        """Whether a tenant may see and change what concerns all: one of `admin_keys`, or anyone
        where there are no keys."""
        return self.keys is None or tenant in self.settings.admin_keys

    @property
    def operable(self) -> bool:
        """Whether the API may switch the policy and start bursts: with keys, or where only this
        machine reaches the server."""
        return self.keys is not None or self.settings.only_local

    def _replan(self) -> None:
        if self.router is not None:
            self.router.planning.changed.set()

    def leave(self) -> None:
        """Answer 503 to `/ready`; requests are still served. Bursts and streams of samples end."""
        self.leaving = True
        self.bursts.cancel()
        self.live.end()

    def drain(self) -> None:
        """Refuse new requests; accepted ones are still served."""
        self.leave()
        self.draining = True

    async def close(self) -> None:
        """Fail unanswered requests and end the workers. May be called twice.

        Takes at most `STOP_S` and `LOADING_S`, whatever hangs.
        """
        self.drain()
        self.dispatcher.close()
        for task in self._tasks:
            task.cancel()
        self.learning.close()
        self.health.close()
        settled = asyncio.gather(
            self.retrieval.close(SETTLE_S),
            self.usage.close(SETTLE_S),
            self.jobs.runner.close(SETTLE_S),
            *([] if self.tracing is None else [self.tracing.close(TRACES_S)]),
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.fleet.stop(grace_s=0.0)
                if self.cluster is not None:
                    await asyncio.to_thread(self.cluster.close)
        await settled
        with suppress(Exception, TimeoutError):  # a thread that loads must not outlive Python
            async with asyncio.timeout(LOADING_S):
                await loaded(self._encoder)

    def kill(self) -> None:
        """End every process of this server at once. May be called from any thread."""
        self.fleet.kill()
        self.learning.kill()


def _way_s(encoder: PromptEncoder, exact: Variant, prompt: str) -> float:
    """Seconds that a request spends in the server itself: embedding the prompt, encoding the
    picture."""
    image = Image.new("RGB", (exact.width, exact.height))
    times = []
    for _ in range(TRIALS):
        begun = time.perf_counter()
        encoder.embed(prompt)
        encode_picture(image, "png")
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _policy_name(settings: Settings, model: ServedFamily) -> str:
    """The policy's name. Raises BadRequest and ModelError for one that cannot be used."""
    if settings.policy is None:
        if model.predictor is not None and model.profiled:
            return DEFAULT_POLICY
        lacking = "predictor" if model.profiled else "profile on this device"
        log.warning(
            "%s has no %s: the policy is %s. `argus profile`, `calibrate` and `train` measure it.",
            model.family.name, lacking, UNMEASURED_POLICY,
        )  # fmt: skip
        return UNMEASURED_POLICY
    check_policy(settings.policy, model)
    return settings.policy
