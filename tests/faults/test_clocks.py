"""Clocks that stand or jump: an event loop that is held up, and a wall clock that somebody sets."""

from __future__ import annotations

import time

import pytest

from tests.faults.conftest import Serve
from tests.faults.harness import Load, hold_up
from tests.server.running import wait_until


def test_a_server_that_was_held_up_takes_no_worker_for_hung(serve: Serve) -> None:
    server = serve()
    for worker in server.service.workers:
        worker.silence_s = lambda: 1.0
    with Load(server, 30, per_second=15) as load:
        wait_until(lambda: server.service.fleet.backlog > 0)
        hold_up(server, 4.0)
    assert load.account() == {"on time": 30}
    assert [worker.restarts for worker in server.service.workers] == [0, 0]


def test_deadlines_do_not_depend_on_the_wall_clock(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, now = serve(), time.time()
    with Load(server, 30, per_second=10) as load:
        wait_until(lambda: server.service.fleet.backlog > 0)
        for stands_at in (now, now - 3600, now + 3600):
            monkeypatch.setattr(time, "time", lambda at=stands_at: at)
            time.sleep(1.0)
    assert load.account() == {"on time": 30}
