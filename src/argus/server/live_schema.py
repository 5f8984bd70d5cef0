"""The bodies of the page's live half: samples of the server's state, the policy and bursts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Sample(BaseModel):
    """About a second of the server, which ended at `at` (seconds since the epoch) and took
    `seconds`.

    Counts are of pictures: those that requests `offered`, and those with each outcome; background
    jobs' are in neither. `variants` counts the finished ones, background jobs' included, in the
    order of `LiveReport.variants`. `predicted` is their mean predicted quality, `predictions` the
    number of those that have one; `measured` the mean quality of the `measurements` that were made
    of pictures whose variant no request pinned.
    `hits` and `misses` count those whose prompt was looked up in the cache, `similarity` is the
    mean of their neighbours'.

    `prices` are those of a worker-second, in quality, in the order of `LiveReport.models`: null for
    models that no worker serves, and without prices. `forecast` is of pictures a second. `waiting`
    pictures are accepted and not running, `running` are. `wait_s` is the expected wait of a picture
    that is requested now, null while no worker serves. `latency_p50_s` and `latency_p95_s` are of
    what was answered in the last `latency_window_s` of the report. `busy` is the mean share of the
    time in which workers had pictures, `serving` the number of those that serve. `usable` is the
    share of cached latents that come in time. `policy` decided at the end, `burst` says whether one
    was running, and `exact_rate` is the number of exact pictures that the workers that are alive
    could make in a second, as fast as they were when the server started; null without a profile.
    """

    at: float
    seconds: float
    policy: str
    burst: bool
    offered: int
    on_time: int
    late: int
    shed: int
    dropped: int
    failed: int
    cancelled: int
    variants: list[int]
    predicted: float | None
    predictions: int
    measured: float | None
    measurements: int
    hits: int
    misses: int
    similarity: float | None
    prices: list[float | None]
    forecast: float
    exact_rate: float | None
    waiting: int
    running: int
    wait_s: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    busy: float
    serving: int
    entries: int
    usable: float


WorkerState = Literal["starting", "leaving", "ready", "full", "unusable", "stopped"]


class WorkerReport(BaseModel):
    """A worker. `state` is `starting` also while it loads its `model`, and `leaving` while it
    finishes what runs before it loads the model `next`. `running` counts the pictures that it
    makes by variant, `queued` those that wait for it, and one more would wait `wait_s`. `busy` is
    the share of the last sample's time in which it had pictures."""

    number: int
    type: str
    state: WorkerState
    model: str
    next: str | None
    running: dict[str, int]
    queued: int
    wait_s: float
    busy: float
    restarts: int


class CacheReport(BaseModel):
    """The cache: prompts, and bytes of their latents; the share of latents that come in time."""

    entries: int
    size_bytes: int
    limit_bytes: int
    usable: float


class BurstReport(BaseModel):
    """A burst: `sent` pictures, and how many of those have each outcome by now. `running` until
    all have one. `rate` is reached after `ramp_s`."""

    rate: float
    seconds: float
    ramp_s: float
    elapsed_s: float
    running: bool
    sent: int
    outcomes: dict[str, int]


class LiveState(BaseModel):
    """The server now. `drifted` names the tests of drift that have found one, null without a
    predictor; `burst` is the last one."""

    policy: str
    workers: list[WorkerReport]
    cache: CacheReport
    drifted: list[str] | None
    burst: BurstReport | None


class LiveEvent(BaseModel):
    """What the event stream sends: a new sample, and the server then."""

    sample: Sample
    state: LiveState


class VariantReport(BaseModel):
    name: str
    model: str
    strategy: str


class PolicyReport(BaseModel):
    """A policy, and why this server cannot use it."""

    name: str
    problem: str | None = None


class SloReport(BaseModel):
    """An SLO class, with the latency that it promises (null: none) and its least quality."""

    name: str
    latency_s: float | None
    quality: float


class BurstDefaults(BaseModel):
    """The rate, seconds and seconds of rise of a burst that does not say, the most that one may
    have, and why this server has no prompts for one."""

    rate: float
    seconds: float
    ramp_s: float
    most_rate: float
    most_seconds: float
    problem: str | None = None


class LiveReport(BaseModel):
    """What the page shows. `history` has the fields of the samples of the last minutes, each as a
    list, oldest first. `exact_s` are the seconds of an exact picture alone. While the model is
    loading there are no `slos`."""

    family: str
    models: list[str]
    variants: list[VariantReport]
    policies: list[PolicyReport]
    slos: list[SloReport]
    exact_s: float | None
    latency_window_s: float
    burst: BurstDefaults
    state: LiveState
    history: dict[str, list[Any]]


class PolicyRequest(BaseModel):
    """`POST /v1/argus/policy`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    policy: str = Field(description="A name of `policies` in `GET /v1/argus/live`.")


class PolicyAnswer(BaseModel):
    """The policy in force. It is not stored: the next start takes the setting's."""

    policy: str
    before: str


class BurstRequest(BaseModel):
    """`POST /v1/argus/burst`. Without `rate`: more than the workers can make exactly."""

    model_config = ConfigDict(extra="forbid")

    rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Requests a second, on average."
    )
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    ramp_s: float | None = Field(
        None, ge=0, allow_inf_nan=False,
        description="Seconds in which the rate rises linearly from 0 to `rate`; 0: at once. By "
        "default a quarter of the burst, at most 10.",
    )  # fmt: skip
