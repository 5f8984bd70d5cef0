"""Numbers of workers and loads that are found by simulation, on a world small enough to reckon."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argus.core.errors import BadRequest
from argus.simulator.plan_report import Planned, Row, prices_of
from argus.simulator.plan_search import (
    Answer,
    Ladder,
    Search,
    least,
    load_ladder,
    seeds_of,
    solve,
    workers_ladder,
)
from argus.simulator.planning import (
    Job,
    Judgement,
    Run,
    Setting,
    Workload,
    check,
    default_minutes,
    run,
    runner,
)
from argus.simulator.runs import Target
from argus.simulator.traces import Trace
from argus.simulator.world import World
from tests.simulator.test_cluster import world

LOOSE = Target(0.02, 0.9)


def setting(target: Target = LOOSE, here: World | None = None, minutes: int = 8) -> Setting:
    return Setting(here or world(), Workload(Trace(np.ones(minutes)), minutes), 3.0, target)


def one_at_a_time() -> World:
    """The small world without batches: an exact picture occupies its worker for 2 s."""
    here = world()
    table = replace(here.table, batches=here.table.batches[:1], step_s=here.table.step_s[:, :, :1])
    return replace(here, table=table)


def answer(
    of: Setting, policy: str, peak_qpm: float, seed: int = 0, kind: int = 0
) -> tuple[Ladder, Answer]:
    ladder = workers_ladder(of, policy, kind, peak_qpm, seed)
    with runner(of, 1) as runs:
        found = Search(policy, ladder, of.target, runs, *seeds_of(seed, 2)).answer()
    return ladder, found


def dropped_share(rate: float, workers: int, deadline_s: float) -> float:
    """Of a queue with Poisson arrivals, a service of 2 s and customers who leave when they would be
    late (M/D/c with impatience), without the simulator."""
    rng, count = np.random.default_rng(5), 60_000
    free_s, dropped = [0.0] * workers, 0
    for at in np.cumsum(rng.exponential(1 / rate, count)).tolist():
        end = max(at, free_s[0]) + 2.0
        if end > at + deadline_s:
            dropped += 1
        else:
            heapq.heapreplace(free_s, end)
    return dropped / count


def test_exact_alone_needs_what_queueing_theory_says() -> None:
    peak_qpm, allowed = 150.0, 0.02
    of = setting(Target(allowed, 0.9), one_at_a_time(), minutes=12)
    _, found = answer(of, "exact", peak_qpm)
    theory = next(
        n for n in range(1, 99) if dropped_share(peak_qpm / 60, n, of.deadline_s) <= allowed
    )
    assert found.rung is not None
    assert found.low <= theory <= found.high
    assert abs(found.rung - theory) <= 1
    assert found.rung >= peak_qpm / 60 * 2.0  # no fewer than the work takes


@pytest.mark.parametrize("policy", ["price", "exact"])
def test_the_answer_keeps_the_promise_in_fresh_runs_and_one_fewer_does_not(policy: str) -> None:
    of = setting(Target(0.02, 0.93))
    _, found = answer(of, policy, 100.0)
    assert found.rung is not None and found.rung > 1

    def fresh(workers: int) -> Judgement:
        return Judgement(
            tuple(run(of, Job(policy, (workers,), 100.0, seed)) for seed in range(70, 74))
        )

    assert fresh(max(found.rung, found.high)).keeps(of.target)
    assert not fresh(min(found.rung, found.low) - 1).keeps(of.target)


@pytest.mark.parametrize("policy", ["price", "exact"])
def test_more_workers_never_serve_less(policy: str) -> None:
    of = setting()
    before = 0.0
    for workers in range(1, 7):
        made = run(of, Job(policy, (workers,), 100.0, 1))
        assert made.offered == pytest.approx(8 * 100, rel=0.1)
        worth = made.quality / made.offered
        assert worth > before - 0.01
        before = max(before, worth)
    assert before > 0.97


def test_a_policy_that_chooses_variants_needs_fewer_workers_than_exact_alone() -> None:
    of = setting()
    (_, price), (_, exact) = (answer(of, policy, 120.0) for policy in ("price", "exact"))
    assert price.rung is not None and exact.rung is not None
    assert price.high < exact.low


def test_workers_carry_the_load_that_needs_so_many() -> None:
    of = setting()
    ladder = load_ladder(of, "exact", (3,))
    with runner(of, 1) as runs:
        found = Search("exact", ladder, of.target, runs, *seeds_of(0, 2)).answer()
    assert found.rung is not None
    _, load = ladder.at(found.rung)
    _, fewer = answer(of, "exact", 0.93 * load)
    _, more = answer(of, "exact", 1.15 * load)
    assert fewer.rung is not None and more.rung is not None
    assert fewer.rung <= 3 < more.rung


@given(st.integers(1, 300), st.integers(-5, 400), st.data())
def test_the_least_that_holds_is_found(most: int, guess: int, data: st.DataObject) -> None:
    edge = data.draw(st.integers(1, most + 1))
    tried = []

    def holds(number: int) -> bool:
        assert 1 <= number <= most
        tried.append(number)
        return number >= edge

    assert least(holds, guess, most) == (edge if edge <= most else None)
    assert len(tried) <= 3 + np.log2(most)
    assert len(set(tried)) == len(tried)


def needing(by_seed: dict[int, int]) -> Search:
    """A search over runs that keep the promise from a number of workers on, which differs by
    seed."""

    def runs(jobs: Sequence[Job]) -> list[Run]:
        return [
            Run(100, on_time := 100 if job.counts[0] >= by_seed[job.seed] else 50, on_time,
                1.0, (on_time,), (float(job.counts[0]),))
            for job in jobs
        ]  # fmt: skip

    begin, judge = [s for s in by_seed if s < 100], [s for s in by_seed if s >= 100]
    ladder = Ladder(lambda rung: ((rung,), 60.0), 3, 20)
    return Search("any", ladder, Target(0.1, 0.9), runs, begin, judge)


def test_runs_that_did_not_choose_may_ask_for_more_workers_but_not_for_fewer() -> None:
    raised = needing({0: 3, 1: 3, 100: 5, 101: 4, 102: 6}).answer()
    assert (raised.rung, raised.low, raised.high) == (6, 4, 6)
    kept = needing({0: 8, 1: 7, 100: 5, 101: 9, 102: 6}).answer()
    assert kept.rung == 9
    kept = needing({0: 8, 1: 7, 100: 5, 101: 7, 102: 6}).answer()
    assert (kept.rung, kept.low, kept.high) == (8, 5, 7)
    assert kept.below is not None and kept.below.keeps(Target(0.1, 0.9))


def test_what_no_number_of_workers_keeps_is_said() -> None:
    never = needing({0: 99, 100: 99}).answer()
    assert never.rung is None
    assert never.judged.violations.value == 0.5


def test_processes_make_the_runs_that_one_does() -> None:
    of = setting(minutes=3)
    jobs = [Job(policy, (3,), 120.0, seed) for policy in ("price", "exact") for seed in range(2)]
    made = []
    for processes in (1, 2):
        with runner(of, processes) as runs:
            made.append(list(runs(jobs)))
    assert made[0] == made[1]
    assert made[0][0] != made[0][1]


def planned(of: Setting, policies: Sequence[str], prices: tuple[float, ...] | None) -> Planned:
    ladders = {
        (policy, kind): workers_ladder(of, policy, kind, 150.0, 0)
        for policy in (*policies, "exact")
        for kind in range(len(of.world.table.types))
    }
    begin, judge = seeds_of(0, 2)
    with runner(of, 1) as runs:
        answers = solve(
            [
                Search(policy, ladder, of.target, runs, begin, judge)
                for (policy, _), ladder in ladders.items()
            ]
        )
    rows = [
        Row(of.world.table.types[kind], one, ladder, False, prices)
        for ((_, kind), ladder), one in zip(ladders.items(), answers, strict=True)
    ]
    return Planned(of, rows, policies[0], "a test", 150.0, judge)


def test_of_two_types_the_cheapest_is_named() -> None:
    """type-1 takes twice as long as type-0."""
    of = setting(Target(0.02, 0.7), world(types=2))
    dear = planned(of, ["clipper-ht"], (2.0, 1.5))
    cheap = replace(dear, rows=[replace(row, prices=(2.0, 0.5)) for row in dear.rows])
    needs = {
        row.device: row.found.value for row in dear.rows if row.policy == "clipper-ht" and row.found
    }
    assert needs["type-0"] < needs["type-1"]
    assert f"{needs['type-0']:.0f} GPUs" in dear.sentence()
    assert f"{needs['type-1']:.0f} GPUs" in cheap.sentence()
    assert "of type type-1 with clipper-ht where exact needs" in cheap.sentence()
    best = cheap.best(["clipper-ht"])
    assert best is not None and best.hourly == 0.5 * needs["type-1"]
    told = cheap.to_json()
    assert told["sentence"] == cheap.sentence()
    one = next(one for one in told["answers"] if one["type"] == "type-1")
    assert one["cost_per_year"] == 8760 * one["cost_per_hour"]
    assert sum(one["holds"].values()) == pytest.approx(one["workers"]["value"], abs=0.2)
    assert sum(one["variants"].values()) == pytest.approx(1)


def test_a_promise_that_nobody_keeps_is_refused_with_what_comes_closest() -> None:
    of = setting(Target(0.0001, 0.9999))
    made = planned(of, ["clipper-ht"], None)
    assert "clipper-ht does not keep this promise; exact needs" in made.sentence()
    none = replace(made, rows=[row for row in made.rows if row.policy == "clipper-ht"])
    with pytest.raises(
        BadRequest, match=r"No policy keeps this promise\. clipper-ht comes closest"
    ):
        none.sentence()


@pytest.mark.parametrize(
    ("changed", "peak_qpm", "message"),
    [
        ({"target": Target(0.01, 1.5)}, 60.0, "least quality is 1.5"),
        ({"deadline": 0.1}, 60.0, "0.2 s is less than the 0.8 s"),
        ({}, 0.5, "it takes 100 to judge"),
    ],
)
def test_what_cannot_be_promised_is_refused(
    changed: dict[str, object], peak_qpm: float, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        check(replace(setting(), **changed), peak_qpm)  # type: ignore[arg-type]


def test_more_workers_than_can_be_simulated_are_refused_at_once() -> None:
    with pytest.raises(BadRequest, match="more than the 1000 that are simulated"):
        workers_ladder(setting(), "price", 0, 1e6, 0)


def test_prices_are_by_type() -> None:
    assert prices_of([], ["a100"]) is None
    assert prices_of(["2.5"], ["a100"]) == (2.5,)
    assert prices_of(["h100=4", "a100=2.5"], ["a100", "h100"]) == (2.5, 4.0)
    for given_, message in ((["2.5"], "as a100=2.5, not '2.5'"), (["a100=2"], "missing for h100"),
                            (["a100=-1", "h100=1"], "-1"), (["t4=1"], "a100, h100")):  # fmt: skip
        with pytest.raises(BadRequest, match=message):
            prices_of(given_, ["a100", "h100"])


def test_small_loads_are_judged_over_more_minutes() -> None:
    assert default_minutes(4000) == 20
    assert default_minutes(80) == 100
