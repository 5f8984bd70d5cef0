"""What a plan is made for, and the runs that it is made from."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from argus.control.batching import StepBatching
from argus.control.clipper import ClipperHA
from argus.control.variants import Numbers
from argus.core.errors import BadRequest
from argus.simulator.report import figures
from argus.simulator.requests import ON_TIME
from argus.simulator.runs import Scenario, Target, kinds_of, simulate
from argus.simulator.traces import Trace
from argus.simulator.world import World

ALONE = "exact"  # the name of `Exact`
LEAST_MINUTES, LEAD_MINUTES = 20, 5
FEWEST = 100  # requests of a run that is judged
REQUESTS = 8000  # of a run that is judged, if the trace has as many


class Exact(ClipperHA):
    """The exact variant serves every prompt, on workers that batch step by step as Argus' own do:
    what the policies are compared with. Clipper's batches begin together and carry less."""

    batching = StepBatching()


@dataclass(frozen=True)
class Workload:
    """The load of a plan, before its height is given: the trace, of which the busiest `minutes` are
    judged, after up to `LEAD_MINUTES` that are not."""

    trace: Trace
    minutes: int

    def at(self, peak_qpm: float) -> tuple[Trace, int]:
        """The minutes to simulate with that many requests in the trace's highest one, and the
        number of those that are not judged."""
        return self.trace.at_peak(peak_qpm).busiest(self.minutes, LEAD_MINUTES)


@dataclass(frozen=True)
class Setting:
    """What all runs of a plan share. `deadline` is a multiple of the exact variant's latency."""

    world: World
    workload: Workload
    deadline: float
    target: Target

    @property
    def deadline_s(self) -> float:
        return self.deadline * self.world.table.slo_s

    def scenario(self, kinds: Sequence[int], peak_qpm: float, seed: int) -> tuple[Scenario, int]:
        """A run's scenario, and the number of its first minutes that are not judged."""
        trace, lead = self.workload.at(peak_qpm)
        scenario = Scenario(
            self.world, tuple(kinds), trace.rates, self.deadline, seed,
            own=True, at_s=trace.at_s, topics=trace.topics,
        )  # fmt: skip
        return scenario, lead


@dataclass(frozen=True)
class Job:
    """One run: a policy on workers of types `counts` (d,) at a peak load."""

    policy: str
    counts: tuple[int, ...]
    peak_qpm: float
    seed: int


@dataclass(frozen=True)
class Run:
    """The figures of the judged minutes of one run: requests `offered`, those `on_time`, the sum
    of their quality, the 99th percentile of latencies, answers by variant and the mean number of
    workers by model."""

    offered: int
    on_time: int
    quality: float
    p99_s: float
    variants: tuple[int, ...]
    holds: tuple[float, ...]


def run(setting: Setting, job: Job) -> Run:
    """Simulate one job."""
    scenario, lead = setting.scenario(kinds_of(job.counts), job.peak_qpm, job.seed)
    table = setting.world.table
    policy = Exact(table, [scenario.slo]) if job.policy == ALONE else None
    _, done = simulate(scenario, job.policy, policy=policy)
    requests = done.requests
    judged = requests.arrived_s >= 60 * lead
    found = figures(requests, judged, len(scenario.rates) - lead)
    answered = requests.variant[judged & (requests.outcome == ON_TIME)]
    offered = int(judged.sum())
    return Run(
        offered,
        found.outcomes["on time"],
        found.effective_quality * offered,
        found.p99_s,
        tuple(np.bincount(answered, minlength=len(table.variants)).tolist()),
        _held(done.ledger.placements, 60.0 * lead, 60.0 * len(scenario.rates)),
    )


def _held(
    placements: Sequence[tuple[float, list[int]]], from_s: float, to_s: float
) -> tuple[float, ...]:
    """Mean workers by model between two times."""
    at = np.clip([at for at, _ in placements] + [to_s], from_s, to_s)
    held = np.diff(at) @ np.array([models for _, models in placements], float)
    return tuple((held / max(to_s - from_s, 1e-9)).tolist())


@dataclass(frozen=True)
class Spread:
    """A figure over several runs: of all requests together, and of the least and the most run."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """Several runs of the same policy, workers and load, which differ by seed."""

    runs: tuple[Run, ...]

    @property
    def requests(self) -> int:
        return sum(one.offered for one in self.runs)

    @cached_property
    def violations(self) -> Spread:
        each = [1 - one.on_time / max(1, one.offered) for one in self.runs]
        kept = sum(one.on_time for one in self.runs)
        return Spread(1 - kept / max(1, self.requests), min(each), max(each))

    @cached_property
    def quality(self) -> Spread:
        """Effective quality: a request without a picture in time counts as 0."""
        each = [one.quality / max(1, one.offered) for one in self.runs]
        total = sum(one.quality for one in self.runs)
        return Spread(total / max(1, self.requests), min(each), max(each))

    @property
    def p99_s(self) -> float:
        return float(np.mean([one.p99_s for one in self.runs]))

    def shares(self) -> Numbers:
        """Shares (v,) of the variants in the pictures in time."""
        counts = np.sum([one.variants for one in self.runs], axis=0)
        shares: Numbers = counts / max(1, counts.sum())
        return shares

    def holds(self) -> Numbers:
        """Mean number of workers (m,) that hold each model."""
        held: Numbers = np.mean([one.holds for one in self.runs], axis=0)
        return held

    def keeps(self, target: Target) -> bool:
        """Whether all requests together meet the target."""
        return self.violations.value <= target.violations and self.quality.value >= target.quality


Runs = Callable[[Sequence[Job]], Iterable[Run]]  # runs jobs, in their order


@contextmanager
def runner(
    setting: Setting, processes: int, on_run: Callable[[Job], None] = lambda job: None
) -> Iterator[Runs]:
    """Runs jobs in so many processes, or in this one for 1; `on_run` is called after each, by any
    thread."""

    def counted(job: Job, found: Run) -> Run:
        on_run(job)
        return found

    if processes == 1:
        yield lambda jobs: [counted(job, run(setting, job)) for job in jobs]
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (setting,)) as pool:
        try:
            yield lambda jobs: list(map(counted, jobs, pool.map(_run, jobs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_setting: Setting | None = None  # of a process of a `runner`


def _begin(setting: Setting) -> None:
    global _setting
    _setting = setting


def _run(job: Job) -> Run:
    assert _setting is not None
    return run(_setting, job)


def check(setting: Setting, peak_qpm: float) -> None:
    """Raises BadRequest for a promise that no number of workers keeps, and for a load of too few
    requests to say so."""
    world, target = setting.world, setting.target
    cut, lead = setting.workload.at(peak_qpm)
    expected = cut.rates[lead:].sum()
    if expected < FEWEST:
        raise BadRequest(
            f"About {expected:.0f} requests come in the minutes that are judged, which are "
            f"{len(cut.rates) - lead}; it takes {FEWEST} to judge a promise: give a longer trace, "
            "more --minutes or a higher --peak-qpm."
        )
    fastest_s = float(world.table.alone_s.min())
    if fastest_s > setting.deadline_s:
        raise BadRequest(
            f"The deadline of {setting.deadline_s:.3g} s is less than the {fastest_s:.3g} s that "
            "the fastest variant takes on an idle worker: give a longer --slo."
        )
    drawn = world.truth if world.pictures is None else world.pictures.quality
    best = float(drawn.max(axis=1).mean())
    if target.quality > best:
        raise BadRequest(
            f"The least quality is {target.quality:g}, but the best variant of every prompt gives "
            f"a mean of {best:.3f} in the world {world.name}: ask for less."
        )


def default_minutes(peak_qpm: float) -> int:
    """Minutes that are judged: as many as have about `REQUESTS` requests at the peak."""
    return max(LEAST_MINUTES, math.ceil(REQUESTS / peak_qpm))
