"""Worker processes that stop, die, lie or are slow, under load on a real server."""

from __future__ import annotations

import signal

import pytest

from argus.workers import local
from tests.faults.conftest import Serve
from tests.faults.harness import Load, slowed, tell
from tests.server.running import wait_until
from tests.workers import bodies

TRIES = 4  # where other processes slow the fast worker as well


def test_a_worker_that_stops_is_replaced_and_no_request_is_lost(serve: Serve) -> None:
    server = serve()
    assert all(server.generate(f"a boat {n}").status_code == 200 for n in range(8))
    worker = server.service.workers[0]
    with Load(server, 40, per_second=10) as load:
        tell(worker, signal.SIGSTOP)
    assert load.account() == {"on time": 40}
    wait_until(lambda: worker.restarts >= 1 and server.service.fleet.queues[0].serving >= 0)


def test_a_worker_that_dies_is_replaced_and_no_request_is_lost(serve: Serve) -> None:
    server = serve()
    worker = server.service.workers[0]
    with Load(server, 40, per_second=10) as load:
        wait_until(lambda: server.service.fleet.queues[0].running != [])
        tell(worker, signal.SIGKILL)
    assert load.account() == {"on time": 40}
    wait_until(lambda: worker.restarts >= 1 and server.service.fleet.queues[0].serving >= 0)


def test_when_all_workers_die_requests_wait_for_one_that_is_back(serve: Serve) -> None:
    server = serve()
    with Load(server, 30, per_second=10) as load:
        wait_until(lambda: server.service.fleet.backlog > 0)
        for worker in server.service.workers:
            tell(worker, signal.SIGKILL)
    assert load.account() == {"on time": 30}


def test_a_slow_worker_is_believed_to_be_slow_and_no_request_is_lost(serve: Serve) -> None:
    server = serve()
    fast, slow = server.service.fleet.queues
    server.service.workers[1].silence_s = lambda: 60.0
    with slowed(server.service.workers[1]):
        for _ in range(TRIES):
            with Load(server, 60, per_second=15) as load:
                pass
            found = load.account()
            assert found["on time"] + found["late"] == 60
            if slow.slowness > 1.5 * fast.slowness:
                break
    assert slow.slowness > 1.5 * fast.slowness
    assert server.service.workers[1].restarts == 0


def test_answers_nobody_asked_for_and_answers_given_twice_change_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "run_process", bodies.run_lying)
    server = serve()
    with Load(server, 30, per_second=30) as load:
        pass
    assert load.account() == {"on time": 30}
    assert [worker.restarts for worker in server.service.workers] == [0, 0]


def test_a_worker_that_sends_nonsense_costs_no_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setattr(local, "run_process", bodies.run_nonsense)
    worker = server.service.workers[0]
    tell(worker, signal.SIGKILL)  # its next process is one that sends nonsense
    with Load(server, 30, per_second=10) as load:
        wait_until(lambda: worker.restarts >= 2)
    found = load.account()
    assert found["on time"] + found["late"] == 30
