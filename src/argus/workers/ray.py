"""Workers on a Ray cluster: an actor each, on a GPU or some CPUs of a node.

Ray places processes, reserves their devices and notices their deaths; which worker runs a request
is the fleet's decision, as for workers of this machine.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import argus
from argus.config import WorkerType
from argus.core.errors import BadRequest, ModelError
from argus.workers.messages import Answer, Ready, Request, Unusable
from argus.workers.process import run_worker
from argus.workers.supervised import SupervisedWorker
from argus.workers.worker import Model

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger(__name__)

NAMESPACE = "argus"
ACCELERATOR = "accelerator_type:"  # of the resource by which Ray names a node's GPUs
BEAT_S = 0.5  # between two beats of a busy worker: each is a message of Ray
POLL_S = 2.0  # an actor that has nothing to say answers so often
LOST_S = 10.0  # without an answer, beyond `POLL_S`: the actor or its node is lost
START_S = 180.0  # the same until it has loaded a model: it may wait for its device
FIRST_S = 120.0  # for the first node that can work
STARTERS = 8  # actors that are asked for at once


@dataclass(frozen=True)
class Slot:
    """A worker's place: the `number`-th that fits on a node, given by its id."""

    node: str
    number: int


class RayCluster:
    """A connection to a Ray cluster, and the types of worker that its nodes have room for.

    Without `types`, they are what the cluster has: a type for every kind of GPU, a worker for every
    GPU; in a cluster without GPUs the type `cpu`, a worker for every node. A node belongs to the
    first type that fits on it.
    """

    def __init__(self, address: str, types: Mapping[str, WorkerType]) -> None:
        """`address` is `auto`, `HOST:PORT`, or `local` for a new cluster on this machine. Raises
        BadRequest if there is no cluster."""
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=False,
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise BadRequest(
                f"There is no Ray cluster at {address!r} that lets us in ({error}). Start one with "
                "`ray start --head`, give its address with --ray-address, and its token in "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (or, if it was started without one, set "
                "ray_auth to disabled)."
            ) from error
        self._senders = ThreadPoolExecutor(1, "ray-send")  # one, so that messages stay in order
        self._starters = ThreadPoolExecutor(STARTERS, "ray-start")
        self.types = dict(types) or _first_types()
        self._cpus: dict[str, float] = {}  # of nodes, by id
        self._unknown: set[str] = set()

    def slots(self) -> dict[Slot, int]:
        """The type, as an index in `types`, of every worker that fits on the living nodes.

        Raises RayError while the cluster does not answer.
        """
        found: dict[Slot, int] = {}
        for node in _nodes():
            resources = node["Resources"]
            self._cpus[node["NodeID"]] = resources.get("CPU", 0.0)
            for kind, one in enumerate(self.types.values()):
                count = _fitting(one, resources)
                found |= {Slot(node["NodeID"], number): kind for number in range(count)}
                if count:
                    break
            else:
                self._say_unknown(node)
        return found

    def device(self, kind: int) -> str:
        """The device of a type's workers."""
        return "cuda" if self._type(kind).gpus else "cpu"

    def threads(self, kind: int) -> int | None:
        """The CPU threads of a type's workers; None is as many as they have CPUs."""
        one = self._type(kind)
        return one.threads or (int(one.cpus) if one.cpus and one.cpus >= 1 else None)

    def worker(self, slot: Slot, kind: int, model: Model) -> RayWorker:
        """A worker in a slot, not started yet."""
        options = self._options(slot.node, self._type(kind))
        return RayWorker(model, kind, options, self._senders, self._starters)

    def run(self, kind: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that runs on a node of a type, with a worker's resources.

        Raises BadRequest if no node of that type is there, and what the function raises.
        """
        slot = next((one for one, of in self.slots().items() if of == kind), None)
        if slot is None:
            raise BadRequest(f"The cluster has no node for the type {list(self.types)[kind]!r}.")
        remote = ray.remote(max_retries=0, **self._options(slot.node, self._type(kind)))(function)
        return ray.get(remote.remote(*arguments))

    def close(self) -> None:
        """Leave the cluster; actors of this process end."""
        for threads in (self._senders, self._starters):
            threads.shutdown(wait=False, cancel_futures=True)
        ray.shutdown()

    def _type(self, kind: int) -> WorkerType:
        return list(self.types.values())[kind]

    def _options(self, node: str, one: WorkerType) -> dict[str, Any]:
        return {
            "num_cpus": one.cpus or (0 if one.gpus else self._cpus[node]),  # the whole node
            "num_gpus": one.gpus,
            "resources": one.resources,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }

    def _say_unknown(self, node: Mapping[str, Any]) -> None:
        """Say once of a node with GPUs that none of its workers is used."""
        if node["Resources"].get("GPU") and node["NodeID"] not in self._unknown:
            self._unknown.add(node["NodeID"])
            log.warning(
                "No worker type fits on node %s (%s): it stays unused. A restart takes in new "
                "types; worker_types names them.",
                node["NodeManagerAddress"],
                ", ".join(sorted(_accelerators(node["Resources"]))) or "GPU",
            )


def _nodes() -> list[dict[str, Any]]:
    """The living nodes, in a fixed order."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return sorted(alive, key=lambda node: str(node["NodeID"]))


def _accelerators(resources: Iterable[str]) -> list[str]:
    return [one.removeprefix(ACCELERATOR) for one in resources if one.startswith(ACCELERATOR)]


def _first_types() -> dict[str, WorkerType]:
    """The types of the nodes that are there once one can work: the head may be alone at first.

    Raises BadRequest if there is none for `FIRST_S` seconds.
    """
    deadline = time.monotonic() + FIRST_S
    while time.monotonic() < deadline:
        types = _types_of(_nodes())
        if types:
            return types
        time.sleep(1.0)
    raise BadRequest(
        f"No node of the Ray cluster had a CPU or GPU for {FIRST_S:g} s: start one, or name "
        "worker_types, which nodes may join later."
    )


def _types_of(nodes: Sequence[Mapping[str, Any]]) -> dict[str, WorkerType]:
    """The types of worker of a cluster for which none are configured."""
    types: dict[str, WorkerType] = {}
    for node in nodes:
        if node["Resources"].get("GPU"):
            for name in sorted(_accelerators(node["Resources"])) or [""]:
                types[name or "gpu"] = WorkerType(gpus=1, cpus=1, accelerator=name or None)
    if not types and any(_fitting(WorkerType(), node["Resources"]) for node in nodes):
        types["cpu"] = WorkerType()
    return dict(sorted(types.items()))


def _fitting(one: WorkerType, resources: Mapping[str, float]) -> int:
    """How many workers of a type a node has room for."""
    if one.accelerator is not None and ACCELERATOR + one.accelerator not in resources:
        return 0
    if resources.get("GPU") and not (one.gpus or one.resources):
        return 0  # a node with GPUs is for workers with GPUs
    needs = {**one.resources, "CPU": one.cpus or 0, "GPU": one.gpus}
    counts = [resources.get(name, 0) / need for name, need in needs.items() if need]
    if one.cpus is None and not one.gpus:  # the whole node
        counts.append(min(1.0, resources.get("CPU", 0.0)))
    return int(min(counts) + 1e-9)


class RayWorker(SupervisedWorker):
    """Runs jobs in an actor of a Ray cluster; see `SupervisedWorker`."""

    def __init__(
        self,
        model: Model,
        kind: int,
        options: dict[str, Any],
        senders: ThreadPoolExecutor,
        starters: ThreadPoolExecutor,
    ) -> None:
        super().__init__(model, device_type=kind)
        self._options, self._senders, self._starters = options, senders, starters

    async def _launch(self, model: Model) -> _ActorBody:
        """See `SupervisedWorker`. In a thread: the head may take long to answer."""

        def ask() -> Any:
            return _actor_class().options(**self._options).remote(model, argus.__version__)

        try:
            asked = self._starters.submit(ask)
            actor = await asyncio.shield(asyncio.wrap_future(asked))
        except asyncio.CancelledError:
            asked.add_done_callback(lambda done: None if done.exception() else _end(done.result()))
            raise
        except (RayError, RuntimeError, ValueError) as error:
            raise OSError(f"Ray starts no actor: {error}") from error
        return _ActorBody(actor, self._hear, self._senders)

    @property
    def actor(self) -> Any:
        """The present or last actor's handle."""
        return self._body.actor if isinstance(self._body, _ActorBody) else None


class _ActorBody:
    """An actor that has been asked for. `hear` gets its answers, in a thread of its own: a picture
    is unpacked there and not in the asyncio loop. `senders` packs messages."""

    def __init__(
        self, actor: Any, hear: Callable[[Answer], None], senders: ThreadPoolExecutor
    ) -> None:
        self.ended, self.ran, self._senders = asyncio.Event(), False, senders
        self._numbers = itertools.count()
        self.actor = actor
        self.name = self.actor._actor_id.hex()[:8]
        loop = asyncio.get_running_loop()
        Thread(target=self._listen, args=(loop, hear), daemon=True).start()

    def send(self, request: Request) -> None:
        self._submit(lambda: self.actor.tell.remote(next(self._numbers), request))

    def close(self) -> None:
        """Nothing keeps a way open between two messages."""

    def kill(self) -> None:
        self._submit(lambda: _end(self.actor))

    async def release(self) -> None:
        """Ray frees an actor's resources itself."""

    def _submit(self, call: Callable[[], object]) -> None:
        """Call in the thread of messages. An actor that a message cannot be sent to is ended: it
        would wait for it."""

        def quietly() -> None:
            try:
                call()
            except Exception as error:
                log.warning("A message to worker %s fails: %s", self.name, type(error).__name__)
                _end(self.actor)

        with suppress(RuntimeError):  # the connection is closed
            self._senders.submit(quietly)

    def _listen(self, loop: asyncio.AbstractEventLoop, hear: Callable[[Answer], None]) -> None:
        """In a thread: pass on every answer until the actor has ended, or is lost."""
        limit_s = START_S
        with suppress(RuntimeError):  # the loop may be closed already
            try:
                while True:
                    answers = ray.get(self.actor.answers.remote(POLL_S), timeout=limit_s)
                    if answers is None:
                        break
                    self.ran = True
                    for answer in answers:
                        hear(answer)
                        if isinstance(answer, Ready):
                            limit_s = POLL_S + LOST_S
            except GetTimeoutError:
                log.warning("Worker %s has not answered for %g s", self.name, limit_s)
            except RayError as error:
                log.warning("Worker %s is gone: %s", self.name, str(error).splitlines()[0])
            except Exception:
                log.exception("Worker %s sends what cannot be read", self.name)
            finally:
                self.kill()
                loop.call_soon_threadsafe(self.ended.set)


@functools.cache
def _actor_class() -> Any:
    """`Actor` for Ray, which sends it to the head once."""
    return ray.remote(max_restarts=0, max_task_retries=0)(Actor)


def _end(actor: Any) -> None:
    """End an actor at once, if it still runs."""
    with suppress(RayError, RuntimeError, ValueError):
        ray.kill(actor)


class Actor:
    """The actor: runs a worker's engine in a thread, and answers calls meanwhile."""

    def __init__(self, model: Model, version: str) -> None:
        self._inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._early: dict[int, Request] = {}  # by number, those before which one is lacking
        self._expected = 0
        self._outbox: list[Answer] = []
        self._over = False
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        Thread(target=self._run, args=(model, version), daemon=True).start()

    async def tell(self, number: int, request: Request) -> None:
        """Take a message; Ray may pass a large one after those that were sent later."""
        self._early[number] = request
        while self._expected in self._early:
            self._inbox.put(self._early.pop(self._expected))
            self._expected += 1

    async def answers(self, limit_s: float) -> list[Answer] | None:
        """The answers since the last call, once there are any, or after `limit_s` seconds; None if
        there will be none any more."""
        self._loop = asyncio.get_running_loop()
        if not (self._outbox or self._over):
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._changed.wait()
        self._changed.clear()
        over = self._over
        answers, self._outbox = self._outbox, []
        return None if over and not answers else answers

    def poll(self) -> bool:
        return not self._inbox.empty()

    def recv(self) -> Request:
        return self._inbox.get()

    def send(self, answer: Answer) -> None:
        self._outbox.append(answer)
        self._tell()

    def _tell(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    def _run(self, model: Model, version: str) -> None:
        try:
            if version != argus.__version__:
                problem = ModelError(f"The node has argus {argus.__version__}, not {version}.")
                self.send(Unusable(model, problem))
            else:
                run_worker(self, model, BEAT_S)
        finally:
            self._over = True
            self._tell()
