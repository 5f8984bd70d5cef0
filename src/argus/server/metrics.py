"""The server's counters, gauges and histograms, for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from argus.config import Signal
from argus.core.errors import BadRequest

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_QUALITY = (-0.5, 0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.25, 1.5)


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


class Metrics:
    """One registry for each server, so that a process can have several. `names` are the operator's
    for `SIGNALS`, of the model `family`. Raises BadRequest for names that are no metric's, or
    taken."""

    def __init__(self, family: str = "", names: Mapping[Signal, str] = {}) -> None:
        self.registry = registry = CollectorRegistry()
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
        self.in_flight = Gauge(
            "argus_pictures_in_flight", "Pictures queued or running.", registry=registry
        )
        self.lookups = Counter(
            "argus_cache_lookups",
            "Prompts looked up in the cache: hit (resumed), miss, or broken (latents unusable).",
            ["result"],
            registry=registry,
        )
        self.cache_entries = Gauge("argus_cache_entries", "Cached prompts.", registry=registry)
        self.cache_bytes = Gauge("argus_cache_bytes", "Bytes of cached latents.", registry=registry)
        self.worker_ready = Gauge(
            "argus_worker_ready", "1 when the worker is ready.", ["worker"], registry=registry
        )
        self.worker_restarts = Gauge(
            "argus_worker_restarts",
            "Times a worker process was replaced.",
            ["worker"],
            registry=registry,
        )
        self.worker_holds = Gauge(
            "argus_worker_holds",
            "1 for the model that a worker holds.",
            ["worker", "model"],
            registry=registry,
        )
        self.upstream_requests = Gauge(
            "argus_upstream_requests",
            "Requests running and waiting at an upstream that says so, other clients' included.",
            ["worker", "state"],
            registry=registry,
        )
        self.model_loads = Gauge(
            "argus_model_loads", "Times a worker loaded another model.", registry=registry
        )
        self.slowness = Gauge(
            "argus_slowness",
            "The workers' time as a multiple of the profile's.",
            registry=registry,
        )
        self.outcomes = Counter(
            "argus_outcomes",
            "Pictures requested: on time, late, shed, dropped, failed or cancelled.",
            ["slo", "outcome"],
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
            "argus_price", "Price of a worker's second, in quality, at the last decision.",
            registry=registry,
        )  # fmt: skip
        self.figures = Gauge(
            "argus_plan", "Figures of the policy's last plan.", ["figure"], registry=registry
        )
        self.rate = Gauge(
            "argus_forecast_rate", "Forecast of pictures requested a second.", registry=registry
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
        self.worker_busy = Gauge(
            "argus_worker_busy_seconds",
            "Seconds in which the worker had pictures in flight, as of the last finished one.",
            ["worker"],
            registry=registry,
        )
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
        self._signals = {
            signal: self._signal(names.get(signal, usual), meaning).labels(family)
            for signal, (usual, meaning) in SIGNALS.items()
        }

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
