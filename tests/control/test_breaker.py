from __future__ import annotations

import pytest

from argus.control.breaker import FIRST_PAUSE_S, SHUT_AT, Breaker


def test_nobody_asks_a_dead_store_but_for_one_try_at_a_time_until_it_answers() -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now)
    for _ in range(SHUT_AT):
        assert not breaker.open
        breaker.failure(breaker.begin())
    assert breaker.open
    assert breaker.usable == 0
    now = FIRST_PAUSE_S
    assert not breaker.open
    trial = breaker.begin()
    assert breaker.open  # somebody is trying
    breaker.failure(trial)
    assert breaker.open
    now += 1.5 * FIRST_PAUSE_S
    assert breaker.open  # the pause has doubled
    now += FIRST_PAUSE_S
    breaker.begin()
    breaker.success()
    assert not breaker.open
    for _ in range(100):
        breaker.begin()
        breaker.success()
    assert breaker.usable == pytest.approx(1.0, abs=0.01)


def test_rare_failures_only_lower_the_share_of_usable_latents() -> None:
    breaker = Breaker(clock=lambda: 0.0)
    for _ in range(200):
        breaker.failure(breaker.begin())
        breaker.begin()
        breaker.success()
    assert not breaker.open
    assert breaker.usable == pytest.approx(0.5, abs=0.05)


def test_who_gives_up_asking_leaves_the_try_to_another() -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now)
    for _ in range(SHUT_AT):
        breaker.failure(breaker.begin())
    now = FIRST_PAUSE_S
    breaker.abandon(breaker.begin())
    assert not breaker.open


def test_fetches_that_were_under_way_when_it_opened_do_not_lengthen_the_pause() -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now)
    under_way = [breaker.begin() for _ in range(20)]
    for trial in under_way:
        breaker.failure(trial)
    assert breaker.open
    now = FIRST_PAUSE_S
    assert not breaker.open


def test_a_fetch_that_was_under_way_is_not_taken_for_the_one_try() -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now)
    under_way = [breaker.begin() for _ in range(SHUT_AT + 2)]
    for trial in under_way[2:]:
        breaker.failure(trial)
    now = FIRST_PAUSE_S
    trial = breaker.begin()
    breaker.failure(under_way[0])
    breaker.abandon(under_way[1])
    assert breaker.open  # the one try is still under way
    breaker.failure(trial)
    now += 2 * FIRST_PAUSE_S
    assert not breaker.open  # one try failed: the pause has doubled once


def test_a_store_that_failed_is_doubted_until_it_was_good_for_a_while() -> None:
    now = 0.0
    breaker = Breaker(clock=lambda: now)
    assert not breaker.doubted
    for _ in range(SHUT_AT):
        breaker.failure(breaker.begin())
    assert breaker.usable == 0
    now = FIRST_PAUSE_S
    breaker.begin()
    breaker.success()
    assert breaker.doubted
    assert not breaker.open
    for _ in range(100):
        breaker.success()
    assert not breaker.doubted
