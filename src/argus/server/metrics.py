"""The server's counters, gauges and histograms, for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from argus.config import Signal
from argus.core.errors import BadRequest

# A counter's time of creation would be a series of its own.
disable_created_metrics()  # type: ignore[no-untyped-call]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# Steps of about 1.6 from 0.1 to 100 s, for pictures that take 0.1 s and those that take a minute.
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.16, 0.25, 0.4, 0.6, 1, 1.6, 2.5, 4, 6, 10, 16,
    25, 40, 60, 100, 160, 300,
)  # fmt: skip
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 4)
_QUALITY = (-0.5, 0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 1, 1.05, 1.25, 1.5)


# What routers in front of servers read: names and meanings of https://llm-d.ai/docs/architecture
# (EPP and model server protocol) where those have some.
SIGNALS: dict[Signal, tuple[str, str]] = {
    "running": ("vllm:num_requests_running", "Pictures that workers make now."),
    "waiting": (
        "vllm:num_requests_waiting",
        "Accepted pictures that no worker has begun, wherever they wait.",
    ),
    "queue_seconds": ("argus_queue_seconds", "Expected wait of a picture that is requested now."),
    "backlog_seconds": (
        "argus_backlog_gpu_seconds",
        "Worker-seconds of the pictures that are queued or running.",
    ),
    "saturation": (
        "vllm:kv_cache_usage_perc",
        "The expected wait as a share of the shortest deadline, at most 1.",
    ),
}


PICTURELESS = ("shed", "dropped", "failed", "cancelled")  # outcomes without a picture
NO_VARIANT = ""  # the variant of an outcome without a picture
DRIFTS = ("errors", "prompts")


class Totals(Collector):
    """A counter whose values are set when `/metrics` is read: other parts count them."""

    def __init__(
        self, name: str, meaning: str, labels: tuple[str, ...], registry: CollectorRegistry
    ) -> None:
        self._name, self._meaning, self._labels = name, meaning, labels
        self._values: dict[tuple[str, ...], float] = {}
        registry.register(self)

    def set(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Replace all values, by the values of the labels."""
        self._values = dict(values)

    def describe(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._meaning, labels=self._labels)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._meaning, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class Metrics:
    """One registry for each server, so that a process can have several. `names` are the operator's
    for `SIGNALS`, of the model `family`. Raises BadRequest for names that are no metric's, or
    taken.

    Labels have values of the settings, the family or the workers, none of clients.
    """

    def __init__(self, family: str = "", names: Mapping[Signal, str] = {}) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.server = Info(
            "argus_server", "Version of Argus, family and policy.", registry=registry
        )
        self.ready = Gauge(
            "argus_ready", "1 while `/ready` answers 200.", registry=registry
        )  # fmt: skip
        self.requests = Counter(
            "argus_requests", "Generation requests answered.", ["status"], registry=registry
        )
        self.pictures = Counter(
            "argus_pictures", "Pictures made.", ["model", "variant"], registry=registry
        )
        self.steps = Counter(
            "argus_steps", "Denoising steps.", ["kind"], registry=registry
        )  # run or skipped
        self.stages = Histogram(
            "argus_stage_seconds",
            "Seconds a picture spent in each stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "argus_request_seconds",
            "Seconds from a request's arrival to its pictures.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.picture_seconds = Histogram(
            "argus_picture_seconds",
            "Seconds from a request's arrival to each of its finished pictures.",
            ["slo"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.deadline_ratio = Histogram(
            "argus_deadline_ratio",
            "The same as a share of the SLO class's latency.",
            ["slo"],
            buckets=_SHARES,
            registry=registry,
        )
        self.deadline = Gauge(
            "argus_slo_deadline_seconds",
            "Latency of an SLO class, for a picture of the family's own size.",
            ["slo"],
            registry=registry,
        )
        self.floor = Gauge(
            "argus_slo_quality_floor", "Least quality of an SLO class.", ["slo"], registry=registry
        )
        self.decision_seconds = Histogram(
            "argus_decision_seconds",
            "Seconds of the parts that lead to a decision: embed, search, predict, route, fetch.",
            ["part"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rerouted = Counter(
            "argus_rerouted",
            "Times a picture was routed again: handed_back by its worker, too_late for its "
            "variant, latents_unusable, or doubted by the policy.",
            ["reason"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "argus_pictures_in_flight", "Pictures queued or running.", registry=registry
        )
        self.lookups = Counter(
            "argus_cache_lookups",
            "Prompts looked up in the cache: hit (resumed), miss, or broken (latents unusable).",
            ["result"],
            registry=registry,
        )
        self.similarity = Histogram(
            "argus_cache_similarity",
            "Similarity of prompts to their neighbours, where there is one.",
            buckets=(0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1),
            registry=registry,
        )
        self.cache_entries = Gauge("argus_cache_entries", "Cached prompts.", registry=registry)
        self.cache_bytes = Gauge("argus_cache_bytes", "Bytes of cached latents.", registry=registry)
        self.cache_limit = Gauge(
            "argus_cache_limit_bytes", "Bytes of latents that the cache may hold.",
            registry=registry,
        )  # fmt: skip
        self.storing = Gauge(
            "argus_latents_storing", "Full runs whose latents are not stored yet.",
            registry=registry,
        )  # fmt: skip
        self.workers = Gauge(
            "argus_workers",
            "Workers by type of device and state: starting (also while they load), ready, full, "
            "unusable or stopped.",
            ["type", "state"],
            registry=registry,
        )
        self.workers_holding = Gauge(
            "argus_workers_holding",
            "Workers that serve with a model.",
            ["type", "model"],
            registry=registry,
        )
        self.workers_planned = Gauge(
            "argus_workers_planned",
            "Workers that are to hold a model.",
            ["type", "model"],
            registry=registry,
        )
        self.worker_ready = Gauge(
            "argus_worker_ready", "1 when the worker is ready.", ["worker"], registry=registry
        )
        self.worker_requests = Gauge(
            "argus_worker_requests",
            "Pictures at a worker, queued or running.",
            ["worker", "state"],
            registry=registry,
        )
        self.worker_restarts = Totals(
            "argus_worker_restarts", "Times a worker process was replaced, or an upstream came "
            "back.", ("worker",), registry,
        )  # fmt: skip
        self.worker_holds = Gauge(
            "argus_worker_holds",
            "1 for the model that a worker holds.",
            ["worker", "model"],
            registry=registry,
        )
        self.upstream_up = Gauge(
            "argus_upstream_up",
            "1 while an upstream takes requests: 0 while it is out, or asked for a pause.",
            ["worker", "upstream"],
            registry=registry,
        )
        self.upstream_requests = Gauge(
            "argus_upstream_requests",
            "Requests running and waiting at an upstream that says so, other clients' included.",
            ["worker", "state"],
            registry=registry,
        )
        self.model_loads = Totals(
            "argus_model_loads", "Times a worker changed its model.", (), registry
        )
        self.slowness = Gauge(
            "argus_slowness",
            "The workers' time as a multiple of the profile's.",
            registry=registry,
        )
        self.outcomes = Counter(
            "argus_outcomes",
            "Pictures requested: on time, late, shed, dropped, failed or cancelled; with their "
            "variant where they were made.",
            ["slo", "outcome", "variant"],
            registry=registry,
        )
        self.predicted = Histogram(
            "argus_predicted_quality",
            "Predicted quality of the pictures that were made.",
            ["variant"],
            buckets=_QUALITY,
            registry=registry,
        )
        self.price = Gauge(
            "argus_price",
            "Price of a worker's second, in quality, at the last decision for the model.",
            ["type", "model"],
            registry=registry,
        )
        self.plan_price = Gauge(
            "argus_plan_price",
            "Price of a worker's second, in quality, by the last plan.",
            ["type", "model"],
            registry=registry,
        )
        self.plans = Counter(
            "argus_plans",
            "Plans by origin: solver, last or greedy (the solver failed or ran out of time), kept "
            "(nothing had changed), policy (of policies without a solver's report), failed.",
            ["source"],
            registry=registry,
        )
        self.plan_seconds = Histogram(
            "argus_plan_seconds",
            "Seconds to make a plan, solver included, without those that were kept.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
            registry=registry,
        )
        self.planned_at = Gauge(
            "argus_plan_timestamp_seconds", "Time of the last plan, kept ones included.",
            registry=registry,
        )  # fmt: skip
        self.figures = Gauge(
            "argus_plan", "Figures of the policy's last plan.", ["figure"], registry=registry
        )
        self.rate = Gauge(
            "argus_forecast_rate", "Forecast of pictures requested a second.", registry=registry
        )
        self.store_open = Gauge(
            "argus_store_open",
            "1 while the latent store is not asked because it failed.",
            registry=registry,
        )
        self.store_usable = Gauge(
            "argus_store_usable", "Share of latents fetched in time.", registry=registry
        )
        self.storage_ok = Gauge(
            "argus_storage_ok",
            "0 while nothing of a kind can be stored, or latents cannot be read.",
            ["what"],
            registry=registry,
        )
        self.saved_seconds = Counter(
            "argus_saved_seconds",
            "Worker-seconds saved against exact pictures: served, or only predicted (shadow).",
            ["kind"],
            registry=registry,
        )
        account = ["family", "variant", "slo", "key"]
        self.gpu_seconds = Counter(
            "argus_gpu_seconds",
            "Worker-seconds that finished pictures took, by share of the batch.",
            account,
            registry=registry,
        )
        self.cost = Counter(
            "argus_cost", "What finished pictures cost, where `cost_per_hour` is set.", account,
            registry=registry,
        )  # fmt: skip
        self.joules = Counter(
            "argus_energy_joules", "Energy that finished pictures took, where it is measured.",
            account, registry=registry,
        )  # fmt: skip
        self.worker_busy = Totals(
            "argus_worker_busy_seconds", "Seconds in which the worker had pictures in flight, as "
            "of the last finished one.", ("worker",), registry,
        )  # fmt: skip
        self.shadow = Counter(
            "argus_shadow_pictures",
            "Exact pictures that Argus would have made by this variant, or shed.",
            ["variant"],
            registry=registry,
        )
        self.jobs = Gauge(
            "argus_jobs",
            "Background jobs of all servers that share the catalogue: queued or in_progress.",
            ["status"],
            registry=registry,
        )
        self.jobs_ended = Counter(
            "argus_jobs_ended",
            "Background jobs that this server ended: completed, failed or cancelled.",
            ["status"],
            registry=registry,
        )
        self.jobs_yielded = Counter(
            "argus_jobs_yielded",
            "Times a background job was queued again to make room for other requests.",
            registry=registry,
        )
        self.webhooks = Counter(
            "argus_webhooks",
            "Calls of background jobs' webhooks: delivered, repeated (later) or given_up.",
            ["result"],
            registry=registry,
        )
        self.measured = Histogram(
            "argus_measured_quality",
            "Quality of served pictures, measured against the exact ones of the same seed.",
            ["variant"],
            buckets=_QUALITY,
            registry=registry,
        )
        self.quality_error = Histogram(
            "argus_quality_error",
            "Measured minus predicted quality.",
            buckets=(-1, -0.5, -0.25, -0.1, -0.05, 0, 0.05, 0.1, 0.25, 0.5, 1),
            registry=registry,
        )
        self.drift = Gauge(
            "argus_drift",
            "1 while prediction errors (errors) or prompt embeddings (prompts) have drifted.",
            ["test"],
            registry=registry,
        )
        self.retrained = Counter(
            "argus_retrainings", "Trainings: accepted, refused or failed.", ["result"],
            registry=registry,
        )  # fmt: skip
        for counter, values in (
            (self.lookups, ("hit", "miss", "broken")),
            (self.steps, ("run", "skipped")),
            (self.saved_seconds, ("served", "shadow")),
            (self.rerouted, ("handed_back", "too_late", "latents_unusable", "doubted")),
            (self.plans, ("solver", "last", "greedy", "kept", "policy", "failed")),
            (self.retrained, ("accepted", "refused", "failed")),
            (self.jobs_ended, ("completed", "failed", "cancelled")),
            (self.webhooks, ("delivered", "repeated", "given_up")),
        ):
            for value in values:
                counter.labels(value)
        for test in DRIFTS:
            self.drift.labels(test)
        self._signals = {
            signal: self._signal(names.get(signal, usual), meaning).labels(family)
            for signal, (usual, meaning) in SIGNALS.items()
        }

    def expect(self, classes: Iterable[str], variants: Iterable[str]) -> None:
        """Begin the series of outcomes at 0: of one that begins with its first event, `rate` does
        not see that event."""
        made = [(outcome, variant) for outcome in ("on time", "late") for variant in variants]
        for slo in classes:
            for outcome, variant in [*made, *((one, NO_VARIANT) for one in PICTURELESS)]:
                self.outcomes.labels(slo, outcome, variant)

    def signal(self, signal: Signal, value: float) -> None:
        """Set one of `SIGNALS`."""
        self._signals[signal].set(value)

    def _signal(self, name: str, meaning: str) -> Gauge:
        try:
            if not _NAME.fullmatch(name):
                raise ValueError("a name has letters, digits, _ and :")
            return Gauge(name, meaning, ["model_name"], registry=self.registry)
        except ValueError as error:
            raise BadRequest(f"router_metrics: {name!r} cannot be used: {error}") from error
