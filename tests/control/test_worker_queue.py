"""The books of a worker, live and simulated."""

from __future__ import annotations

import pytest

from argus.control.batching import AdditiveIncrease, StepBatching
from argus.control.request import Request
from argus.control.worker_queue import WorkerQueue


def asked(deadline_s: float, work_steps: float = 10.0, grace_s: float = 0.0) -> Request:
    """A request that expires `grace_s` after its deadline."""
    return Request(deadline_s=deadline_s, expires_s=deadline_s + grace_s, work_steps=work_steps)


def queue(batching: StepBatching | AdditiveIncrease | None = None) -> WorkerQueue[Request]:
    """A step takes a tenth of a second, half of it by model 1, and as much more as there are more
    than four."""
    return WorkerQueue(
        number=0, kind=0, model=0,
        step_s=lambda kind, model, size: 0.1 / (1 + model) * max(1.0, size / 4),
        batching=batching or StepBatching(), batch_limit=lambda kind, model: 4, largest_batch=4,
    )  # fmt: skip


def busy(deadline_s: float) -> WorkerQueue[Request]:
    """A queue that makes four and has room for four more."""
    one = queue()
    one.batch_limit = lambda kind, model: 8
    for _ in range(4):
        one.enqueue(asked(deadline_s), 0.0)
    assert len(one.begin(0.0)[0]) == 4
    return one


def test_a_full_batch_makes_others_wait_as_long_as_the_first_of_it_takes() -> None:
    one = queue()
    for _ in range(4):
        one.enqueue(asked(10.0), 0.0)
    begun, dropped = one.begin(0.0)
    assert (len(begun), dropped) == (4, [])
    one.next_s(0.0)
    assert one.free_at_s == pytest.approx(1.0)
    one.enqueue(asked(10.0), 0.0)
    assert one.begin(0.0) == ([], [])


def test_who_has_no_time_left_is_dropped_and_the_next_begun() -> None:
    one = queue()
    late, early = asked(0.5), asked(5.0)
    for request in (late, early):
        one.enqueue(request, 0.0)
    assert one.begin(0.0) == ([early], [late])


def test_nobody_joins_who_would_make_another_late() -> None:
    one = busy(1.05)
    one.enqueue(asked(20.0), 0.0)
    assert one.begin(0.0) == ([], [])  # a fifth would make every step a quarter longer


def test_who_would_be_in_time_alone_waits_for_that() -> None:
    one = busy(20.0)
    one.advance(0.9)
    alone = asked(2.1)  # joining would take until 2.15, the others are done at 1.0
    one.enqueue(alone, 0.9)
    assert one.begin(0.9) == ([], [])
    one.advance(1.0)
    assert len(one.pop_done()) == 4
    assert one.begin(1.0) == ([alone], [])


def test_those_who_are_late_anyway_are_made_together() -> None:
    one = queue()
    late = [asked(0.5, grace_s=2.0) for _ in range(4)]
    for request in late:
        one.enqueue(request, 0.0)
    assert one.begin(0.0) == (late, [])


def test_who_can_neither_join_in_time_nor_wait_is_dropped_at_once() -> None:
    one = busy(20.0)
    hopeless = asked(1.2)  # ten steps of a batch of five take 1.25 s, and of one after it 2 s
    one.enqueue(hopeless, 0.0)
    assert one.begin(0.0) == ([], [hopeless])


def test_a_worker_that_is_slower_than_foretold_is_believed_to_be_slow() -> None:
    one = queue()
    for _ in range(60):
        begin = one.at_s
        request = asked(begin + 100)
        one.enqueue(request, begin)
        one.begin(begin)
        one.remove(request, begin + 2.0)  # predicted: one second
    assert one.slowness == pytest.approx(2.0, rel=0.1)


def test_nothing_is_learnt_from_what_runs_while_another_model_is_taken_up() -> None:
    one = queue()
    guest, beside, after = (asked(99.0, work_steps) for work_steps in (10.0, 20.0, 10.0))
    one.enqueue(guest, 0.0)
    one.begin(0.0)
    assert one.drain() == []
    one.advance(0.5)
    end_s = one.next_s(0.5)
    one.take_up(1, 0.5)
    assert one.serving == 1 and one.next_s(0.5) == pytest.approx(end_s)
    one.enqueue(beside, 0.5)
    assert one.begin(0.5) == ([beside], [])
    assert one.next_s(0.5) == pytest.approx(0.5 + 5 * (0.1 + 0.05))  # a step of each in turn
    one.remove(guest, 3.0)
    one.enqueue(after, 3.0)
    assert one.begin(3.0) == ([after], [])
    one.remove(beside, 9.0)
    assert one.slowness == 1.0
    one.remove(after, 9.0)
    assert one.slowness > 1.0


def test_slowness_is_believed_sooner_than_speed() -> None:
    slow, fast = queue(), queue()
    for one, took in ((slow, 1.25), (fast, 0.8)):
        request = asked(100.0)
        one.enqueue(request, 0.0)
        one.begin(0.0)
        one.remove(request, took)
    assert slow.slowness - 1 > 1.5 * (1 - fast.slowness) > 0


def test_request_batches_end_together_and_teach_their_size() -> None:
    one = queue(AdditiveIncrease())
    first = asked(10.0)
    one.enqueue(first, 0.0)
    assert one.begin(0.0) == ([first], [])
    others = [asked(10.0) for _ in range(3)]
    for request in others:
        one.enqueue(request, 0.0)
    assert one.begin(0.1) == ([], [])  # nobody joins
    one.remove(first, 1.0)
    assert len(one.begin(1.0)[0]) == 2
    assert one.limit == 2


def test_calm_does_not_raise_the_limit_of_a_batch_and_one_late_batch_lowers_it() -> None:
    one = queue(AdditiveIncrease())
    one.limit = 4.0
    now = 0.0
    for _ in range(50):  # alone, and in time
        request = asked(now + 10.0)
        one.enqueue(request, now)
        assert one.begin(now) == ([request], [])
        now += 1.0
        one.remove(request, now)
    late = [asked(now + 1.5) for _ in range(4)]
    for request in late:
        one.enqueue(request, now)
    assert len(one.begin(now)[0]) == 4
    now += 5.0
    for request in late:
        one.remove(request, now)
    waiting = [asked(now + 100.0) for _ in range(4)]
    for request in waiting:
        one.enqueue(request, now)
    assert len(one.begin(now)[0]) == 3


def test_who_was_counted_slow_and_left_fast_leaves_nothing_behind() -> None:
    one = queue()
    one.slowness = 3.0
    waiting = [asked(10.0) for _ in range(3)]
    for request in waiting:
        one.reserve(request, 0.0)
    for request in waiting[:2]:
        one.enqueue(request, 0.0)
    one.slowness = 0.3
    one.release(waiting[2])
    assert len(one.begin(0.0)[0]) == 2
    assert one.queued_s == 0


def test_where_handing_over_takes_a_moment_a_batch_is_handed_over_before_the_last_is_done() -> None:
    one = queue(AdditiveIncrease())
    one.handover_steps = 1.0
    for _ in range(2):
        one.enqueue(asked(10.0), 0.0)
    assert len(one.begin(0.0)[0]) == 1
    one.advance(0.85)
    assert one.begin(0.85)[0] == []
    one.advance(0.95)
    assert len(one.begin(0.95)[0]) == 1
    assert len(one.running) == 2


def test_nothing_advances_while_a_worker_is_dead_and_it_is_not_taken_for_slow() -> None:
    one = queue()
    request = asked(100.0)
    one.enqueue(request, 0.0)
    one.begin(0.0)
    one.advance(0.5)
    one.alive = False
    one.advance(30.0)
    assert one.progress == pytest.approx(5.0)
    assert one.busy_s == pytest.approx(0.5)
    one.restart_at(30.0)  # from its first step, since the process that was at it is gone
    one.next_s(30.0)
    assert one.pop_done() == []
    one.remove(request, 31.0)
    assert one.slowness == pytest.approx(1.0)


def test_a_worker_that_only_loaded_goes_on_with_what_it_is_at() -> None:
    one = queue()
    request = asked(100.0)
    one.enqueue(request, 0.0)
    one.begin(0.0)
    one.advance(0.5)
    one.restart_at(0.5)
    one.advance(1.0)
    assert one.pop_done() == [request]


def test_a_batch_takes_who_may_be_late_after_those_who_are_in_time() -> None:
    one = queue(AdditiveIncrease())
    one.limit = 2.0
    late, last = asked(0.5, grace_s=10.0), asked(0.6, grace_s=10.0)
    first = asked(20.0)
    for request in (late, last, first):
        one.enqueue(request, 0.0)
    assert one.begin(0.0) == ([first, late], [])


def test_who_may_be_late_is_made_by_an_idle_worker_however_late_it_is() -> None:
    one = queue(AdditiveIncrease())
    patient, expired = asked(-5.0, grace_s=100.0), asked(-5.0, grace_s=5.0)
    one.enqueue(patient, 0.0)
    one.enqueue(expired, 0.0)
    assert one.begin(0.0) == ([patient], [expired])


def test_who_would_be_late_in_a_batch_but_need_not_be_in_time_comes_last_in_it() -> None:
    one = queue(AdditiveIncrease())
    one.step_s = lambda kind, model, size: 0.1 * size
    one.limit = 2.0
    hurried = asked(1.5, grace_s=10.0)  # alone it takes a second, in a batch of two two
    others = [asked(20.0), asked(20.0)]
    for request in (hurried, *others):
        one.enqueue(request, 0.0)
    assert one.begin(0.0) == (others, [])
    assert [work for _, _, work in one.queued] == [hurried]


def test_another_rule_for_batches_begins_once_the_running_ones_are_done() -> None:
    one = queue()
    running, waiting = asked(20.0), asked(20.0)
    one.enqueue(running, 0.0)
    assert one.begin(0.0) == ([running], [])
    one.limit = 3.0
    one.rebatch(AdditiveIncrease(), 1.0)
    one.enqueue(waiting, 0.1)
    assert one.begin(0.1) == ([], [])  # a batch that has begun is joined by none
    one.advance(1.0)
    assert one.pop_done() == [running]
    assert one.begin(1.0) == ([waiting], [])
    assert one.limit == 1.0  # nothing was learnt from what another rule began

    one.rebatch(StepBatching(), 2.0)
    joining = asked(20.0)
    one.enqueue(joining, 1.1)
    assert one.begin(1.1) == ([joining], [])
