"""What a step takes by the number in flight is learned, for servers that batch as they like."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argus.control.batching import StepBatching
from argus.control.request import Request
from argus.control.step_curve import MOST, StepCurve
from argus.control.worker_queue import WorkerQueue

FLAT = [0.1] * 8


def learned(true_s: list[float], known: list[float]) -> list[float]:
    """The seconds of a step by number in flight, after 2000 pictures beside 1 to 8 at once."""
    curve, slowness, rng = StepCurve(known), 1.0, random.Random(0)
    for _ in range(2000):
        size = rng.randint(1, len(known))
        ratio = true_s[size - 1] / (slowness * curve.step_s(size))
        slowness *= ratio**0.05 * curve.learn(size, ratio, 0.05)
    return [slowness * curve.step_s(size) for size in range(1, len(known) + 1)]


@pytest.mark.parametrize(
    "true_s",
    [
        [0.1 * n for n in range(1, 9)],  # one after the other
        [0.1] * 8,  # all at once
        [0.2 + 0.02 * n for n in range(1, 9)],  # slower, and batched
    ],
)
@pytest.mark.parametrize("known", [FLAT, [0.1 * n for n in range(1, 9)]])
def test_the_seconds_come_near_the_true_ones(true_s: list[float], known: list[float]) -> None:
    assert learned(true_s, known) == pytest.approx(true_s, rel=0.25)


@given(st.lists(st.tuples(st.floats(1, 8), st.floats(1e-6, 1e6)), max_size=60))
def test_they_never_fall_as_the_number_rises_and_stay_within_bounds(
    seen: list[tuple[float, float]],
) -> None:
    curve = StepCurve([0.1, 0.12, 0.16, 0.2, 0.2, 0.3, 0.3, 0.4])
    for size, ratio in seen:
        curve.learn(size, ratio, 0.1)
    found = [curve.step_s(size) for size in range(1, 20)]
    assert all(less <= more for less, more in pairwise(found))
    assert found[0] >= 0.1 / MOST
    assert found[7] <= 0.4 * MOST


def test_a_picture_beside_few_says_little_of_many() -> None:
    curve = StepCurve(FLAT)
    for _ in range(200):
        curve.learn(1, 0.1 / curve.step_s(1), 0.1)
    before = curve.step_s(8)
    for _ in range(50):
        curve.learn(8, 2.0 * before / curve.step_s(8), 0.1)
    assert curve.step_s(8) > 1.5 * curve.step_s(1)


def test_a_queue_with_a_curve_predicts_a_server_that_makes_one_after_the_other() -> None:
    one = WorkerQueue[Request](
        number=0, kind=0, model=0, step_s=lambda kind, model, size: 0.1, batching=StepBatching(),
        batch_limit=lambda kind, model: 4, largest_batch=4, curve=StepCurve([0.1] * 4),
    )  # fmt: skip
    for trial in range(300):
        now, size = one.at_s, 1 + 3 * (trial % 2)
        requests = [Request(deadline_s=now + 99, work_steps=10.0) for _ in range(size)]
        for request in requests:
            one.enqueue(request, now)
        one.begin(now)
        for n, request in enumerate(requests, start=1):
            one.remove(request, now + 1.0 * n)
    last = Request(deadline_s=one.at_s + 99, work_steps=10.0)
    one.enqueue(last, one.at_s)
    one.begin(one.at_s)
    assert one.next_s(one.at_s) - one.at_s == pytest.approx(1.0, rel=0.2)  # alone
    for _ in range(3):
        one.enqueue(Request(deadline_s=one.at_s + 99, work_steps=10.0), one.at_s)
    one.begin(one.at_s)
    assert one.next_s(one.at_s) - one.at_s == pytest.approx(2.5, rel=0.3)  # of four, the mean
