"""Each policy's defining behaviour, on a table small enough to reckon by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argus.control.batching import Adaptive, AdditiveIncrease, Queue, Switch
from argus.control.policies import POLICIES, new_policy
from argus.control.policy import Policy, Slo, assigned
from argus.core.errors import BadRequest
from tests.control.tables import EXACT, FAR, SKIP, SMALL, asked, cluster, inputs, small_table

PROMISE = Slo(6.0)
GOOD = [1.0, 0.99, 0.98, 0.95]
BAD = [1.0, 0.8, 0.5, 0.2]


def made(name: str) -> Policy:
    return new_policy(name, small_table(), [PROMISE])


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_plans_and_routes(name: str) -> None:
    policy = made(name)
    models = policy.plan(inputs(1.0, [GOOD, BAD], [0, 0, 0])).models.tolist()
    assert len(models) == 3 and set(models) <= {0, 1}
    decision = policy.route(asked(GOOD), cluster(models))
    assert decision.worker is not None
    assert small_table().model[decision.variant] == models[decision.worker]
    assert decision.reason


def test_an_unknown_policy_is_refused_with_what_there_is() -> None:
    with pytest.raises(BadRequest, match=r"price, .*oracle"):
        made("best")


def test_price_is_exact_while_there_is_room() -> None:
    policy = made("price")
    policy.plan(inputs(0.1, [GOOD, BAD], [0, 0]))
    assert policy.route(asked(GOOD), cluster([0, 0])).variant == EXACT


def test_under_load_price_gives_the_exact_variant_to_whom_it_helps() -> None:
    policy = made("price")
    policy.plan(inputs(1.5, [GOOD, BAD] * 50, [0, 0]))
    assert policy.route(asked(BAD), cluster([0, 0])).variant == EXACT
    assert policy.route(asked(GOOD), cluster([0, 0])).variant in (SKIP, FAR)


def test_a_queue_raises_prices_before_the_next_plan() -> None:
    policy = made("price")
    policy.plan(inputs(0.1, [GOOD, BAD] * 50, [0]))
    middling = [1.0, 0.95, 0.9, 0.8]
    chosen = [policy.route(asked(middling), cluster([0], [wait])).variant for wait in (0.0, 2.9)]
    assert chosen == [EXACT, FAR]


def test_in_an_overload_quality_counts_and_workers_keep_their_worth_beside_each_other() -> None:
    policy = made("price")
    plan = policy.plan(inputs(3.0, [GOOD, BAD] * 50, [0, 1]))  # more than both can make
    assert plan.prices is not None and plan.models.tolist() == [0, 1]
    now = policy.prices(cluster([0, 1]))
    assert now[0] < 1 < plan.prices[0, 0]
    assert now[1] / now[0] == pytest.approx(plan.prices[0, 1] / plan.prices[0, 0])
    chosen = [policy.route(asked(one), cluster([0, 1])).worker for one in (GOOD, BAD)]
    assert chosen == [1, 0]


def test_prices_now_are_those_that_decisions_are_made_by() -> None:
    policy = made("price")
    policy.plan(inputs(1.5, [GOOD, BAD] * 50, [0, 1]))
    busy = cluster([0, 1], [2.0, 0.0])
    busy.running = [1, 0]
    prices = policy.prices(busy)
    decision = policy.route(asked(GOOD), busy)
    assert decision.worker is not None
    assert decision.price == prices[decision.worker]  # each holds the model of its number
    assert prices[0] > prices[1] == 0.0  # an idle worker's time costs nothing
    assert policy.prices(cluster([-1, -1])) == {}
    assert made("pac").prices(busy) == {}


def test_price_gives_fewer_steps_where_an_exact_picture_would_only_just_be_in_time() -> None:
    policy, quality = made("price"), [1.0, 0.97, 0.9, 0.8]
    assert policy.route(asked(quality, slack_s=6.2), cluster([0])).variant == EXACT  # takes 3.1 s
    assert policy.route(asked(quality, slack_s=3.2), cluster([0])).variant == SKIP


def test_price_sheds_whom_nobody_can_serve_in_time() -> None:
    policy = made("price")
    policy.plan(inputs(0.1, [GOOD], [0]))
    assert policy.route(asked(GOOD, slack_s=0.5), cluster([0], [3.0])).worker is None


def test_price_keeps_to_the_floor_of_the_class() -> None:
    policy = new_policy("price", small_table(), [Slo(6.0, floor=0.985)])
    policy.plan(inputs(3.0, [GOOD] * 50, [0]))
    assert policy.route(asked(GOOD), cluster([0], [1.0])).variant in (EXACT, SKIP)


def test_price_blind_serves_all_prompts_alike() -> None:
    policy = made("price-blind")
    policy.plan(inputs(2.0, [GOOD, BAD] * 50, [0, 0]))
    waits = [0.7, 0.7]
    chosen = [policy.route(asked(q), cluster([0, 0], list(waits))).variant for q in (GOOD, BAD)]
    shares = dict.fromkeys(range(4), 0)
    for _ in range(200):
        shares[policy.route(asked(BAD), cluster([0, 0], list(waits))).variant] += 1
    assert chosen and shares[SMALL] == 0
    again = dict.fromkeys(range(4), 0)
    for _ in range(200):
        again[policy.route(asked(GOOD), cluster([0, 0], list(waits))).variant] += 1
    assert max(abs(shares[v] - again[v]) for v in shares) <= 2


def test_argus_moves_the_prompts_that_can_bear_it() -> None:
    policy = made("argus")
    policy.plan(inputs(4.0, [GOOD, BAD] * 50, [0, 0, 0]))
    chosen = {name: [0] * 4 for name in ("good", "bad")}
    for _ in range(200):
        chosen["good"][policy.route(asked(GOOD), cluster([0] * 3)).variant] += 1
        chosen["bad"][policy.route(asked(BAD), cluster([0] * 3)).variant] += 1
    speed = np.array([0, 1, 2, 3])
    assert np.dot(speed, chosen["good"]) > np.dot(speed, chosen["bad"])


def test_pac_draws_levels_whatever_the_prompt() -> None:
    policy = made("pac")
    policy.plan(inputs(4.0, [GOOD, BAD] * 50, [0, 0, 0]))
    good = [policy.route(asked(GOOD), cluster([0] * 3)).variant for _ in range(300)]
    bad = [policy.route(asked(BAD), cluster([0] * 3)).variant for _ in range(300)]
    assert abs(np.mean(good) - np.mean(bad)) < 0.25


def test_argus_turns_to_smaller_models_when_the_store_fails() -> None:
    policy = made("argus")
    seen = inputs(3.0, [GOOD] * 50, [0, 0, 0])
    failing = type(seen)(**{**vars(seen), "usable": 0.2})
    assert 1 in policy.plan(failing).models.tolist()
    assert 1 not in made("argus").plan(seen).models.tolist()


def test_nirvana_skips_by_similarity_alone() -> None:
    policy = made("nirvana")
    near = {s: policy.route(asked(BAD, s), cluster([0], [9.0])).variant for s in (0.5, 0.7, 0.9)}
    assert near == {0.5: EXACT, 0.7: SKIP, 0.9: FAR}
    assert policy.route(asked(BAD, None), cluster([0])).variant == EXACT


def test_clipper_serves_one_variant() -> None:
    assert made("clipper-ha").route(asked(GOOD), cluster([0])).variant == EXACT
    fast = made("clipper-ht")
    assert set(fast.plan(inputs(1.0, [GOOD], [0, 0])).models.tolist()) == {1}
    assert fast.route(asked(BAD), cluster([1])).variant == SMALL


def test_proteus_places_smaller_models_as_load_grows() -> None:
    calm = made("proteus").plan(inputs(0.5, [GOOD], [0] * 4)).models.tolist()
    busy = made("proteus").plan(inputs(6.0, [GOOD], [0] * 4)).models.tolist()
    assert calm == [0] * 4
    assert busy.count(1) > 0


def test_sommelier_switches_each_worker_by_its_own_queue() -> None:
    seen = inputs(1.0, [GOOD], [0, 0])
    waiting = type(seen)(**{**vars(seen), "wait_s": np.array([5.0, 0.0])})
    assert made("sommelier").plan(waiting).models.tolist() == [1, 0]


def test_a_cascade_makes_again_what_the_discriminator_doubts() -> None:
    policy = made("cascade")
    policy.plan(inputs(2.0, [GOOD], [0, 1, 1]))
    assert policy.route(asked(BAD), cluster([0, 1, 1])).variant == SMALL
    verdicts = [policy.review(asked(BAD), SMALL, judged) for judged in np.linspace(1, 0, 101)]
    last = [policy.review(asked(BAD), SMALL, judged) for judged in (0.01, 0.99)]
    assert last == [EXACT, None]
    assert policy.review(asked(BAD), EXACT, 0.0) is None
    assert EXACT in verdicts


def test_hadis_sends_hard_prompts_to_the_heavy_model_at_once() -> None:
    policy = made("hadis")
    policy.plan(inputs(1.0, [GOOD], [0, 1, 1]))
    for _ in range(50):
        policy.route(asked(GOOD), cluster([0, 1, 1]))
        policy.route(asked(BAD), cluster([0, 1, 1]))
    assert policy.route(asked([1.0, 0.5, 0.3, 0.1]), cluster([0, 1, 1])).variant == EXACT
    assert policy.route(asked(GOOD), cluster([0, 1, 1])).variant == SMALL


def test_modm_refines_hits_and_makes_misses() -> None:
    policy = made("modm")
    assert policy.route(asked(GOOD, 0.9), cluster([0])).variant == FAR
    assert policy.route(asked(GOOD, 0.3), cluster([0])).variant == EXACT
    assert policy.route(asked(GOOD, None), cluster([0])).variant == EXACT


def test_models_are_dealt_with_as_few_loads_as_can_be() -> None:
    assert assigned([2, 2], [0, 0, 0, 1], [True] * 4) == [0, 0, 1, 1]
    assert assigned([1, 2], [0, 0, 0, 1], [True, True, False, True])[2] == 0


def queue(slack_s: list[float], rate: float = 0.0, limit: float = 1.0) -> Queue:
    return Queue(slack_s, most=4, batch_s=lambda n: 1.0 + 0.5 * n, rate=rate, limit=limit)


def test_clippers_batches_grow_by_one_and_shrink_by_a_tenth() -> None:
    batching = AdditiveIncrease()
    assert batching.learn(3.0, size=3, most=4, in_time=True) == 4.0
    assert batching.learn(3.0, size=3, most=4, in_time=False) == pytest.approx(2.7)
    assert batching.choose(queue([9.0] * 6, limit=3.4)) == (0, 3)
    assert batching.choose(queue([0.5, 9.0], limit=1.0)) == (1, 1)
    assert batching.choose(queue([1.5] * 4, limit=4.0)) == (0, 1)  # four are late for all


def test_clippers_limit_stays_while_batches_are_smaller() -> None:
    """A batch in time says nothing about larger ones than itself."""
    batching = AdditiveIncrease()
    assert batching.learn(3.0, size=2, most=4, in_time=True) == 3.0
    assert batching.learn(3.9, size=3, most=4, in_time=True) == 4.0
    assert batching.learn(4.0, size=4, most=4, in_time=True) == 4.0


@given(batches=st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=60))
def test_clippers_limit_is_never_out_of_reach(batches: list[tuple[int, bool]]) -> None:
    """However calm it was before, late batches make the next ones smaller at once."""
    batching, limit = AdditiveIncrease(), 1.0
    for size, in_time in batches:
        limit = batching.learn(limit, min(size, int(limit)), 8, in_time)
        assert 1 <= limit <= 8
    for _ in range(20):
        limit = batching.learn(limit, int(limit), 8, in_time=False)
    assert limit == 1


def test_proteus_waits_for_a_larger_batch_while_it_can() -> None:
    batching = Adaptive()
    assert batching.choose(queue([9.0, 9.5], rate=1.0)) == (0, 0)
    assert batching.choose(queue([2.2, 9.5], rate=1.0)) == (0, 2)
    assert batching.choose(queue([300.0], rate=0.03)) == (0, 1)  # nobody else will come soon
    assert batching.choose(queue([9.0] * 5, rate=1.0)) == (0, 4)
    assert batching.choose(queue([1.6] + [9.0] * 5, rate=1.0)) == (1, 4)


def test_argus_batches_only_when_one_at_a_time_falls_behind() -> None:
    batching = Switch()
    assert batching.choose(queue([9.0], rate=0.1)) == (0, 1)
    assert batching.choose(queue([9.0] * 6, rate=2.0)) == (0, 4)
    assert batching.choose(queue([1.5] * 4, rate=9.0)) == (0, 1)  # a larger one is late for all


def test_price_loads_nothing_for_a_little_where_forecasts_are_often_wrong() -> None:
    """A load that answers one user's burst comes when the burst is over."""
    for doubt, models in ((0.0, [0]), (0.25, [0]), (0.6, [1])):
        policy = made("price")
        told = replace(inputs(0.1, [[1.0, 0.99, 0.98, 0.9]] * 50, [1]), doubt=doubt)
        assert policy.plan(told).models.tolist() == models
    much = replace(inputs(0.1, [[1.0, 0.99, 0.98, 0.4]] * 50, [1]), doubt=3.0)
    assert made("price").plan(much).models.tolist() == [0]


def test_of_two_types_the_one_that_is_done_first_is_chosen() -> None:
    policy = new_policy("price", small_table(2), [Slo(60.0)])
    here = cluster([0, 0])
    here.kinds, here.running = [1, 0], [0, 0]  # the first worker is of the slower type
    decision = policy.route(asked([1.0, 0.97, 0.9, 0.8]), here)
    assert (decision.variant, decision.worker) == (EXACT, 1)


def test_a_type_is_given_no_model_that_it_cannot_hold() -> None:
    """The second type holds the small model alone: what it can do is used, and nothing else."""
    able = np.array([[True, True], [False, True]])
    policy = new_policy("price", replace(small_table(2), able=able), [Slo(60.0)])
    asked_for = replace(
        inputs(0.8, [[1.0, 0.97, 0.9, 0.99]] * 50 + [[1.0, 0.97, 0.9, 0.2]] * 50, [0, 1]),
        kinds=np.array([0, 1]),
    )
    assert policy.plan(asked_for).models.tolist() == [0, 1]
    here = cluster([0, 1], wait_s=[5.0, 0.0])
    here.kinds = [0, 1]
    routed = [policy.route(asked([1.0, 0.97, 0.9, q]), here) for q in (0.99, 0.2)]
    assert [(one.variant == SMALL, one.worker) for one in routed] == [(True, 1), (False, 0)]
