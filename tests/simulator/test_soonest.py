"""The index of workers finds what looking at all of them finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from argus.control.policy import Cluster
from argus.simulator.soonest import SoonestWorkers, Waits

WORKERS = 5
CHANGES = st.tuples(
    st.integers(0, WORKERS - 1), st.integers(-1, 2), st.integers(0, 3), st.sampled_from([0, 1, 4])
)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 2.0]), st.lists(CHANGES, max_size=6))))
def test_it_finds_what_looking_at_all_finds(
    course: list[tuple[float, list[tuple[int, int, int, int]]]],
) -> None:
    kinds, models, running = [0, 1, 0, 0, 1], [0] * WORKERS, [0] * WORKERS
    free_at_s, now, slowness = [0.0] * WORKERS, 0.0, 2.0
    index = SoonestWorkers(kinds, models, running, free_at_s)
    waits = Waits(lambda: [max(0.0, free - now) / slowness for free in free_at_s])
    for passed_s, changes in course:
        now += passed_s
        for worker, model, count, busy_s in changes:
            models[worker], running[worker], free_at_s[worker] = model, count, now + busy_s
            index.update(worker)
        waits.forget()
        looked = Cluster(now, kinds, models, waits, running, slowness).soonest()
        assert index.at(now, slowness) == looked
