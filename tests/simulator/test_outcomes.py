"""Whatever happens to workers and store, every request of a run has exactly one outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argus.control.policies import POLICIES, new_policy
from argus.control.policy import Slo
from argus.simulator.cluster import Happening, Setup, Simulation
from argus.simulator.requests import LATE, ON_TIME, Requests, SimulatedRequest
from tests.simulator.test_cluster import world

WORLD = world()
WORKERS = 3
# On a grid, so that things happen at the same moment: steps take 0.1 s, an exact picture 2 s.
TIMES = st.integers(0, 240).map(lambda quarters: quarters / 4)
FACTORS = st.sampled_from([0.5, 1.0, 3.0, 40.0])


def _kill(number: int, simulation: Simulation) -> None:
    simulation.kill(number)


def _revive(number: int, simulation: Simulation) -> None:
    simulation.revive(number)


def _slow(number: int, factor: float, simulation: Simulation) -> None:
    simulation.slow(number, factor)


def _slow_store(factor: float, simulation: Simulation) -> None:
    simulation.slow_store(factor)


NUMBERS = st.integers(0, WORKERS - 1)
HAPPENINGS: st.SearchStrategy[Happening] = st.one_of(
    st.builds(partial, st.just(_kill), NUMBERS),
    st.builds(partial, st.just(_revive), NUMBERS),
    st.builds(partial, st.just(_slow), NUMBERS, FACTORS),
    st.builds(partial, st.just(_slow_store), st.sampled_from([1.0, 10_000.0])),
)


class Counted(Simulation):
    """A simulation that counts how often each request ended, and knows who had a picture before."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.ended: Counter[int] = Counter()
        self.doubted: list[int] = []

    def _end(
        self, request: SimulatedRequest, outcome: int, variant: int = -1, quality: float = 0.0
    ) -> None:
        self.ended[request.number] += 1
        if request.first is not None:
            self.doubted.append(request.number)
        super()._end(request, outcome, variant, quality)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    at=st.lists(TIMES, min_size=1, max_size=60).map(sorted),
    events=st.lists(st.tuples(TIMES, HAPPENINGS), max_size=20),
    deadline_s=st.sampled_from([2.0, 6.0, 20.0]),
    seed=st.integers(0, 5),
)
def test_every_request_has_exactly_one_outcome(
    policy: str,
    at: list[float],
    events: list[tuple[float, Callable[[Simulation], None]]],
    deadline_s: float,
    seed: int,
) -> None:
    slo, rng = Slo(deadline_s), np.random.default_rng(seed)
    prompts = rng.integers(len(WORLD.truth), size=len(at))
    requests = Requests.new(np.array(at, dtype=float), prompts, rng.integers(-9, 9, size=len(at)))
    setup = Setup(slo, [0] * WORKERS, seed, events)
    simulation = Counted(WORLD, new_policy(policy, WORLD.table, [slo]), requests, setup)
    simulation.run()

    assert simulation.ended == Counter(range(len(at)))
    assert (requests.ended_s >= requests.arrived_s).all()
    answered = np.isin(requests.outcome, [ON_TIME, LATE])
    assert ((requests.variant >= 0) == answered).all()
    assert answered[simulation.doubted].all()  # a picture that is doubted is better than none
    in_time = requests.ended_s <= requests.arrived_s + deadline_s
    assert (in_time | (requests.outcome != ON_TIME)).all()
    assert (~in_time | (requests.outcome != LATE)).all()
    for worker in simulation.workers:
        assert (worker.queued, worker.running, worker.queued_s) == ([], [], 0.0)
