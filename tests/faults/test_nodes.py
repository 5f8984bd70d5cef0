"""A server on a real Ray cluster of two nodes, whose actors and nodes die and come while it
serves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from argus.config import Settings, SloClass, WorkerType
from tests.faults.harness import Load
from tests.server.running import Running, running, wait_until
from tests.workers.clusters import ray_nodes

pytestmark = pytest.mark.cluster


@dataclass(frozen=True)
class Serving:
    """A server, and the cluster that its workers are on; `second` is the node that may go."""

    server: Running
    nodes: Any
    second: Any

    @property
    def workers(self) -> int:
        """Number of workers that serve."""
        return sum(queue.serving >= 0 for queue in self.server.service.fleet.queues)


@pytest.fixture(scope="module")
def serving(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with ray_nodes(num_cpus=2, resources={"one": 1}) as nodes:
        second = nodes.add_node(num_cpus=2, resources={"two": 1})
        settings = Settings(
            family=str(measured_family),
            data=tmp_path_factory.mktemp("nodes"),
            workers="ray",
            ray_address=nodes.address,
            ray_auth="disabled",
            worker_types={
                "one": WorkerType(resources={"one": 1}, cpus=1),
                "two": WorkerType(resources={"two": 1}, cpus=1),
            },
            slo={"default": SloClass(latency="110s")},
            queue_limit=200,
        )
        with running(settings) as server:
            serving = Serving(server, nodes, second)
            wait_until(lambda: serving.workers == 2)
            yield serving


def test_types_have_workers_of_their_own_that_both_serve(serving: Serving) -> None:
    assert serving.server.service.model.table.types == ("one", "two")
    with Load(serving.server, 12, 20, argus={"cache": False}) as load:
        pass
    assert load.account() == {"on time": 12}
    assert {one["argus"][0]["worker"] for one in load.pictures} == {0, 1}


def test_unfinished_pictures_come_from_a_node(serving: Serving) -> None:
    body = {"prompt": "a fish", "stream": True, "partial_images": 2, "argus": {"exact": True}}
    with serving.server.http.stream("POST", "/v1/images/generations", json=body) as answer:
        events = [line for line in answer.iter_lines() if line.startswith("event:")]
    assert events == [
        *["event: image_generation.partial_image"] * 2,
        "event: image_generation.completed",
    ]


def test_an_actor_that_dies_costs_no_request_and_is_replaced(serving: Serving) -> None:
    import ray

    worker: Any = serving.server.service.fleet.workers[0]
    restarts = worker.restarts
    with Load(serving.server, 120, 30, argus={"cache": False}) as load:
        pid = ray.get(worker.actor.__ray_call__.remote(lambda actor: os.getpid()))
        wait_until(lambda: bool(serving.server.service.fleet.queues[0].running))
        os.kill(pid, signal.SIGKILL)
    assert load.account() == {"on time": 120}
    wait_until(lambda: serving.workers == 2)
    assert worker.restarts == restarts + 1


def test_a_node_that_dies_costs_no_request_and_its_worker_leaves(serving: Serving) -> None:
    fleet = serving.server.service.fleet
    with Load(serving.server, 120, 30, argus={"cache": False}) as load:
        wait_until(lambda: bool(fleet.queues[1].running))
        serving.nodes.remove_node(serving.second, allow_graceful=False)
    assert load.account() == {"on time": 120}
    wait_until(lambda: len(fleet.present) == 1)
    assert serving.workers == 1


def test_a_node_that_joins_gets_work(serving: Serving) -> None:
    fleet = serving.server.service.fleet
    serving.nodes.add_node(num_cpus=2, resources={"two": 1})
    wait_until(lambda: len(fleet.present) == 2 and serving.workers == 2)
    assert len(fleet.workers) == 2  # the number of the worker that left is used again
    with Load(serving.server, 12, 20, argus={"cache": False}) as load:
        pass
    assert load.account() == {"on time": 12}
    assert {one["argus"][0]["worker"] for one in load.pictures} == {0, 1}
