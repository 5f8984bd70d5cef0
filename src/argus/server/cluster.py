"""Keeps a fleet's workers in step with the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from argus.config import Settings
from argus.control.variants import VariantTable
from argus.core.errors import BadRequest, named
from argus.server.threads import Threads
from argus.workers.fleet import Fleet
from argus.workers.worker import Model, WorkerError

if TYPE_CHECKING:
    from argus.workers.ray import RayCluster, Slot

log = logging.getLogger(__name__)

LOOK_S = 1.0
LIMIT_S = 10.0  # for the cluster to say what nodes it has
LOST_S = 20.0  # without that: the head is gone, and Ray ends the process soon
GRACE_S = 2.0  # for the process of a worker whose node has left


def open_cluster(settings: Settings) -> RayCluster | None:
    """The cluster that the settings name; None for workers on this machine.

    Raises BadRequest if Ray is not installed or there is no such cluster.
    """
    if settings.workers != "ray":
        return None
    if settings.ray_auth == "token" and settings.ray_address != "local" and not _has_token():
        raise BadRequest(
            "There is no token for the Ray cluster. `ray get-auth-token --generate` makes one, for "
            "`RAY_AUTH_MODE=token ray start` on every node: in ~/.ray/auth_token, RAY_AUTH_TOKEN "
            "or the file RAY_AUTH_TOKEN_PATH. If the cluster was started without one, set "
            "ray_auth to disabled."
        )
    os.environ["RAY_AUTH_MODE"] = settings.ray_auth  # read when Ray is imported
    try:
        from argus.workers.ray import RayCluster
    except ImportError as error:
        raise BadRequest(
            f"Workers on a Ray cluster need Ray ({error}): pip install 'argus-t2i[ray]'."
        ) from error
    return RayCluster(settings.ray_address, settings.worker_types)


def _has_token() -> bool:
    """Whether Ray finds a token. Without one it ends the process."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(file).is_file()


class ClusterWatch:
    """Adds a worker for every slot of the living nodes, and retires those of nodes that left.

    `models` (d, m) as for `Fleet`. For use from one asyncio loop.
    """

    def __init__(
        self,
        cluster: RayCluster,
        fleet: Fleet,
        table: VariantTable,
        models: Sequence[Sequence[Model]],
    ) -> None:
        self._cluster, self._fleet, self._table, self._models = cluster, fleet, table, models
        self._numbers: dict[Slot, int] = {}  # of workers, by slot
        self._threads = Threads("ray-nodes", 1)
        self._stopping: set[asyncio.Task[None]] = set()
        self.problem: Exception | None = None  # why this server cannot go on

    async def run(self) -> None:
        """Follow the cluster; does not return."""
        answered_s = time.monotonic()
        while True:
            try:
                self._follow(await self._threads.run(self._cluster.slots, LIMIT_S))
                answered_s = time.monotonic()
            except Exception as error:
                log.warning("The Ray cluster does not say what nodes it has: %s", named(error))
                if time.monotonic() - answered_s > LOST_S:
                    self.problem = WorkerError("The head of the Ray cluster does not answer.")
            await asyncio.sleep(LOOK_S)

    def _follow(self, slots: dict[Slot, int]) -> None:
        left = [slot for slot in self._numbers if slot not in slots]
        new = [slot for slot in slots if slot not in self._numbers]
        for slot in left:
            worker = self._fleet.retire(self._numbers.pop(slot))
            task = asyncio.create_task(worker.stop(GRACE_S))
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        for slot in new:
            kind = slots[slot]
            model = self._models[kind][self._table.home(kind)]
            worker = self._cluster.worker(slot, kind, model)
            self._numbers[slot] = self._fleet.add(worker)
            worker.start()
        if left or new:
            log.info("The cluster has %d workers: %d left, %d new", len(slots), len(left), len(new))
