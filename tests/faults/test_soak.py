"""Minutes of load with faults at random: `make faults`, outside `make test`."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.faults.conftest import Serve
from tests.faults.harness import Load, slowed, tell
from tests.server.running import wait_until

MINUTES = float(os.environ.get("FAULT_MINUTES", "5"))


@pytest.mark.soak
def test_whatever_happens_to_workers_every_request_has_one_answer_and_one_outcome(
    serve: Serve,
) -> None:
    server, chance = serve(slo={"default": {"latency": "2s"}}), random.Random(1)
    workers, until_s = server.service.workers, time.monotonic() + 60 * MINUTES
    sent = answered = 0
    while time.monotonic() < until_s:
        with Load(server, 100, per_second=chance.choice((5, 10, 20, 40))) as load:
            for _ in range(chance.randrange(3)):
                time.sleep(2 * chance.random())
                worker = chance.choice(workers)
                if worker.pid is None:
                    continue
                fault = chance.choice(("stop", "die", "pause", "slow"))
                if fault == "slow":
                    with slowed(worker):
                        time.sleep(2 * chance.random())
                    continue
                tell(worker, signal.SIGKILL if fault == "die" else signal.SIGSTOP)
                if fault == "pause":
                    time.sleep(3 * chance.random())
                    tell(worker, signal.SIGCONT)
        found = load.account()
        print(dict(found))
        sent, answered = sent + 100, answered + found["on time"] + found["late"]
        wait_until(lambda: all(one.serving >= 0 for one in server.service.fleet.queues))
        wait_until(lambda: server.service.fleet.idle)
    assert server.generate("a boat").status_code == 200
    print(f"{answered} of {sent} answered")
