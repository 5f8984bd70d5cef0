"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """One registry a server, so that several live in one process."""

    def __init__(self) -> None:
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
            "argus_pictures_in_flight", "Pictures waiting or running.", registry=registry
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
            "argus_worker_ready", "1 when the worker can work.", registry=registry
        )
        self.worker_restarts = Gauge(
            "argus_worker_restarts", "Times a worker process was replaced.", registry=registry
        )
