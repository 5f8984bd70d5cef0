"""The virtual cluster, on a world small enough to reckon by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from argus.control.policies import POLICIES, new_policy
from argus.control.policy import Slo
from argus.simulator.cluster import Happening, Setup, Simulation
from argus.simulator.requests import DROPPED, FAILED, LATE, ON_TIME, SHED, Requests
from argus.simulator.runs import Scenario, Target, most_load, simulate
from argus.simulator.traces import PAPER_CAPACITY
from argus.simulator.world import Drawing, Neighbourhood, Store, World
from tests.control.tables import inputs, small_table


def world(types: int = 1, **changes: object) -> World:
    rng = np.random.default_rng(0)
    table = small_table(types)
    loss = rng.gamma(1.0, 1.0, (400, 1))
    truth = 1 - loss * (1 - table.mean_quality)
    made = World(
        name="small",
        table=table,
        truth=truth,
        predicted=truth,
        similarity=rng.uniform(0.5, 1.0, 400),
        drawing=Drawing(novel=0.02, alive=100, capacity=200),
        store=Store(median_s=0.01, tail=2.0),
        judging_error=0.05,
        slo=3.0,
        sources={},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def run(
    at: list[float],
    policy: str = "clipper-ha",
    workers: int = 1,
    deadline_s: float = 6.0,
    events: list[tuple[float, Happening]] | None = None,
    at_hand: bool = False,
) -> Simulation:
    here, count = world(), len(at)
    slo = Slo(deadline_s)
    requests = Requests.new(
        np.array(at, dtype=float), np.zeros(count, dtype=np.int64), np.full(count, -1)
    )
    setup = Setup(slo, [0] * workers, events=events or (), at_hand=at_hand)
    simulation = Simulation(here, new_policy(policy, here.table, [slo]), requests, setup)
    simulation.run()
    return simulation


def scenario(rate: float, minutes: int = 6, workers: int = 4, **changes: object) -> Scenario:
    here = world()
    here = replace(here, capacity_qpm=PAPER_CAPACITY)  # so that rates are taken as they are
    made = Scenario(here, (0,) * workers, np.full(minutes, rate * 60), 3.0)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_one_request_takes_what_its_steps_take() -> None:
    requests = run([1.0]).requests
    assert requests.ended_s[0] == pytest.approx(1.0 + 2.0)
    assert requests.outcome[0] == ON_TIME


def test_requests_that_step_together_take_as_long_as_their_batch() -> None:
    """Both from 0: 20 steps of a batch of two, 0.1 · 2 / 1.3 seconds each."""
    requests = run([0.0, 0.0], "price").requests
    np.testing.assert_allclose(requests.ended_s, 20 * 0.1 * 2 / 1.3, rtol=1e-6)


def test_one_that_joins_slows_the_other_only_while_it_is_there() -> None:
    """The first does 10 steps alone in a second; then both step at 0.2 / 1.3."""
    requests = run([0.0, 1.0], "price").requests
    together = 0.2 / 1.3
    assert requests.ended_s[0] == pytest.approx(1.0 + 10 * together)
    assert requests.ended_s[1] == pytest.approx(1.0 + 10 * together + 10 * 0.1)


def test_who_cannot_be_made_in_time_is_dropped_and_not_made() -> None:
    simulation = run([0.0] * 40, deadline_s=6.0)
    outcome = simulation.requests.outcome
    assert set(outcome.tolist()) == {ON_TIME, DROPPED}
    assert (outcome == ON_TIME).sum() >= 3
    assert simulation.requests.ended_s.max() <= 6.0 + 1e-6


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_has_one_outcome_and_ends_after_it_came(policy: str) -> None:
    result, simulation = simulate(scenario(2.0), policy)
    requests = simulation.requests
    assert np.isfinite(requests.ended_s).all()
    assert (requests.ended_s >= requests.arrived_s).all()
    assert (requests.outcome != FAILED).all()
    assert sum(result.whole.outcomes.values()) == len(requests.outcome)
    served = requests.variant >= 0
    truth = simulation.world.truth[requests.prompt[served], requests.variant[served]]
    np.testing.assert_allclose(requests.quality[served], truth, rtol=1e-5)


@pytest.mark.parametrize("policy", ["price", "argus", "cascade"])
def test_a_seed_repeats_a_run_exactly(policy: str) -> None:
    one, other = (simulate(scenario(2.0), policy)[1].requests for _ in range(2))
    np.testing.assert_array_equal(one.ended_s, other.ended_s)
    np.testing.assert_array_equal(one.variant, other.variant)


def test_a_model_at_hand_is_taken_up_without_a_load() -> None:
    """Wanted from the first moment is the small model, the large one is held; a load takes 10 s."""
    simulation = run([1.0], "clipper-ht", at_hand=True)
    assert simulation.requests.ended_s[0] == pytest.approx(1.0 + 20 * 0.04)
    assert simulation.ledger.loads == 1
    assert run([1.0], "clipper-ht").requests.outcome[0] == SHED


def test_who_is_made_when_another_model_is_taken_up_is_made_by_the_first() -> None:
    def take_up(simulation: Simulation) -> None:
        simulation.workers[0].target = 1
        simulation._drain(simulation.workers[0])

    simulation = run([0.0, 1.0], events=[(0.5, take_up)], at_hand=True)
    assert simulation.requests.outcome.tolist() == [ON_TIME, SHED]  # nobody has the large model
    assert simulation.requests.ended_s[0] == pytest.approx(20 * 0.1)
    assert simulation.workers[0].guests == set()


def test_models_at_hand_change_under_load_and_nothing_is_lost_of_it() -> None:
    loaded, _ = simulate(scenario(7.0), "price")
    at_hand, simulation = simulate(scenario(7.0, at_hand=True), "price")
    assert simulation.ledger.loads > 0
    assert np.isfinite(simulation.requests.ended_s).all()
    assert (simulation.requests.outcome != FAILED).all()
    assert at_hand.whole.violation_ratio < loaded.whole.violation_ratio
    assert all(not worker.guests for worker in simulation.workers)


def test_no_worker_makes_more_than_its_profile_allows() -> None:
    """Worker-seconds of what was made, in the best batches, are at most those there were."""
    _, simulation = simulate(scenario(6.0), "price")
    requests, table = simulation.requests, simulation.world.table
    made = requests.variant[requests.variant >= 0]
    best = table.step_s.min(axis=2) * 0 + (table.step_s / table.batches).min(axis=2)
    cost = table.steps * best[0, table.model]
    assert cost[made].sum() <= 4 * requests.ended_s.max()


def test_who_is_made_by_a_worker_that_dies_is_made_elsewhere() -> None:
    simulation = run(
        [0.0, 0.0, 0.0], workers=2, deadline_s=20.0, events=[(1.0, lambda now: now.kill(0))]
    )
    assert (simulation.requests.outcome == ON_TIME).all()
    assert simulation.ledger.rerouted > 0
    assert simulation.requests.ended_s.max() > 4.0


def test_a_worker_that_comes_back_serves_after_its_load() -> None:
    events: list[tuple[float, Happening]] = [
        (0.5, lambda now: now.kill(0)), (1.0, lambda now: now.revive(0)),
    ]  # fmt: skip
    requests = run([0.0], deadline_s=30.0, events=events).requests
    assert requests.ended_s[0] == pytest.approx(1.0 + 10.0 + 2.0, abs=1.5)


def test_who_is_done_at_the_moment_a_worker_dies_is_done() -> None:
    """One begins at 0 and takes two seconds."""
    requests = run([0.0], events=[(2.0, lambda now: now.kill(0))]).requests
    assert requests.outcome[0] == ON_TIME
    assert requests.ended_s[0] == 2.0


def test_who_is_made_when_the_trace_ends_is_late_and_not_failed() -> None:
    """Half a second of two is done when the worker becomes a hundred times slower."""
    requests = run([0.0], events=[(0.5, lambda now: now.slow(0, 100.0))]).requests
    assert requests.outcome[0] == LATE
    assert requests.ended_s[0] == pytest.approx(0.5 + 100 * 1.5)


def test_a_worker_that_lives_is_not_revived_and_one_that_is_dead_not_killed() -> None:
    events: list[tuple[float, Happening]] = [
        (0.5, lambda now: now.revive(0)), (0.6, lambda now: now.kill(1)),
        (0.7, lambda now: now.revive(1)), (5.0, lambda now: now.kill(1)),
        (5.1, lambda now: now.kill(1)), (5.2, lambda now: now.revive(1)),
    ]  # fmt: skip
    simulation = run([0.0, 0.55, 20.0], workers=2, deadline_s=6.0, events=events)
    assert (simulation.requests.outcome == ON_TIME).all()
    assert simulation.ledger.loads == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_when_the_last_worker_dies_requests_are_dropped_or_shed_until_one_is_back(
    policy: str,
) -> None:
    """All are dead from 20 s until one comes back at 40 s, which loads for 10 s."""

    def all_die(simulation: Simulation) -> None:
        for number in (0, 1):
            simulation.kill(number)

    at = np.arange(0.0, 100.0, 2.5)
    events: list[tuple[float, Happening]] = [(20.1, all_die), (40.0, lambda now: now.revive(1))]
    requests = run(list(at), policy, workers=2, events=events).requests
    assert np.isfinite(requests.ended_s).all()
    unserved = {SHED, DROPPED}
    dead = (at > 20.1) & (at < 40.0)
    assert set(requests.outcome[dead].tolist()) <= unserved
    for served in ((at > 10) & (at < 15), at > 60):  # loads have ended, two workers and one
        assert (requests.outcome[served] == ON_TIME).mean() > 0.6
    assert set(requests.outcome.tolist()) <= {ON_TIME, *unserved}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_without_workers_keeps_what_they_are_to_hold(policy: str) -> None:
    table = small_table()
    asked = new_policy(policy, table, [Slo(6.0)])
    seen = inputs(1.0, [[1.0, 0.97, 0.9, 0.8]], [0, 0])
    before = asked.plan(seen).models.tolist()
    dead = replace(seen, models=np.array(before), alive=np.zeros(2, dtype=bool))
    assert asked.plan(dead).models.tolist() == before


def test_a_trace_on_which_nobody_comes_is_a_run_of_nothing() -> None:
    result, simulation = simulate(scenario(0.0), "price")
    assert len(simulation.requests.outcome) == 0
    assert set(result.whole.outcomes.values()) == {0}
    assert result.whole.violation_ratio == 0


def test_a_dead_store_moves_price_away_from_the_cache_and_back() -> None:
    events: list[tuple[float, Happening]] = [
        (240.0, lambda now: now.slow_store(10_000.0)), (600.0, lambda now: now.slow_store(1.0)),
    ]  # fmt: skip
    _, simulation = simulate(scenario(3.4, minutes=20, events=tuple(events)), "price")
    requests, table = simulation.requests, simulation.world.table
    cached = np.isin(requests.variant, np.flatnonzero(table.skip > 0))

    def share(begin: float, end: float) -> float:
        then = (requests.arrived_s >= begin) & (requests.arrived_s < end)
        return float(cached[then & (requests.variant >= 0)].mean())

    before, during, after = share(60, 240), share(360, 600), share(780, 1200)
    assert during < 0.4 * before
    assert after > 0.7 * before


def test_a_burst_served_by_another_model_starves_the_cache() -> None:
    """New topics get no full run from clipper-ht, so that later prompts find no neighbours."""
    drawing = Drawing(novel=0.2, alive=50, capacity=100)
    hits = {}
    for policy in ("clipper-ha", "clipper-ht"):
        made = scenario(0.5, minutes=20)
        made = replace(made, world=replace(made.world, drawing=drawing))
        hits[policy] = simulate(made, policy)[0].hit_ratio
    assert hits["clipper-ha"] > 0.6
    assert hits["clipper-ht"] < 0.5 * hits["clipper-ha"]


def test_in_a_neighbourhood_what_is_made_in_full_is_found_by_later_prompts() -> None:
    """Two prompts alike, of which only the first has nothing like it in the cache."""
    here = world()
    vectors = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    asked: list[float] = []

    def worth(vector: np.ndarray, near: np.ndarray) -> np.ndarray:
        (similarity,) = near @ vector
        asked.append(similarity)
        return np.full((1, len(here.table.variants)), similarity)

    def similarities(policy: str) -> list[float]:
        asked.clear()
        requests = Requests.new(np.array([0.0, 9.0, 18.0]), np.arange(3), np.full(3, -1))
        near = Neighbourhood(vectors, vectors[2:], worth)
        slo = Slo(6.0)
        made = replace(here, neighbourhood=near)
        chosen = new_policy(policy, made.table, [slo])
        Simulation(made, chosen, requests, Setup(slo, [0])).run()
        return list(asked)

    assert similarities("clipper-ha") == pytest.approx([0.0, 0.8, 1.0])
    assert similarities("clipper-ht") == pytest.approx([0.0, 0.6, 1.0])


def test_a_policy_that_looks_at_predictions_takes_the_neighbour_that_is_worth_most() -> None:
    here = world()
    cached = np.array([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])

    def worth(_: np.ndarray, near: np.ndarray) -> np.ndarray:
        return np.repeat(near[:, 1:], len(here.table.variants), axis=1)  # the farther the better

    def similarity(policy: str) -> float:
        near = Neighbourhood(np.array([[1.0, 0.0]]), cached, worth, choice=2)
        made = replace(here, neighbourhood=near)
        chosen = new_policy(policy, made.table, [Slo(6.0)])
        requests = Requests.new(np.zeros(1), np.arange(1), np.full(1, -1))
        simulation = Simulation(made, chosen, requests, Setup(Slo(6.0), [0]))
        simulation.run()
        return float(simulation._similarity[0])

    assert similarity("clipper-ha") == pytest.approx(0.8)
    assert similarity("price") == pytest.approx(0.6)


def test_slower_workers_leave_policies_less_of_the_deadline() -> None:
    def slow(simulation: Simulation) -> None:
        simulation.slow(0, 2.0)

    simulation = run([0.0, 200.0, 400.0], "price", events=[(1.0, slow)])
    (slo,) = simulation.policy.slos  # type: ignore[attr-defined]
    assert 3.0 <= slo.deadline_s < 3.4
    assert simulation.requests.ended_s[1] == pytest.approx(200.0 + 2 * 2.0)


def test_a_worker_that_loads_while_it_becomes_slower_comes_back() -> None:
    def reload(simulation: Simulation) -> None:
        simulation.kill(0)
        simulation.revive(0)

    def slow(simulation: Simulation) -> None:
        simulation.slow(0, 2.0)

    simulation = run([0.0, 40.0], events=[(5.0, reload), (6.0, slow)])
    assert simulation.requests.outcome[1] == ON_TIME


def test_predictions_route_and_the_truth_scores() -> None:
    made = scenario(3.4)
    wrong = replace(made, world=replace(made.world, predicted=1 - made.world.truth))
    right, misled = (simulate(one, "price")[0].whole.quality for one in (made, wrong))
    told = simulate(wrong, "oracle")[0].whole.quality
    assert misled < right
    assert told > misled


def test_more_load_is_found_for_a_looser_promise() -> None:
    made = scenario(3.0, minutes=4)
    tight, loose = (
        most_load(made, "price", Target(0.05, quality), steps=5) for quality in (0.97, 0.8)
    )
    assert 0 < tight < loose
