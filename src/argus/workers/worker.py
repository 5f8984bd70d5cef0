"""The interface of workers to the fleet, wherever their engines run.

`workers/local.py` has processes of this machine, `workers/ray.py` actors of a Ray cluster.
`tests/workers/test_contract.py` runs against every kind.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from argus.core.errors import ArgusError
from argus.core.job import Job
from argus.core.profile import MAX_BATCH

OnPreview = Callable[[int, Image.Image], None]


class WorkerError(ArgusError):
    """A worker could not run a valid job."""


class Unanswered(WorkerError):
    """A worker failed on a job this time; another worker may do it. A `busy` worker takes no job
    now, whatever it is."""

    def __init__(self, reason: str, busy: bool = False) -> None:
        super().__init__(reason)
        self.busy = busy


class State(enum.Enum):
    """`STARTING` also while another model is loaded; a `FULL` worker goes on with its jobs and can
    take no other for now; an `UNUSABLE` worker may be restarted with another model, a `STOPPED` one
    may not."""

    STARTING = "starting"
    READY = "ready"
    FULL = "full"
    UNUSABLE = "unusable"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Model:
    """What a worker loads: the model's source (as `model_folder` takes it), its sampler, device and
    precision, the most pictures in a batch, whether torch compiles the UNet first, and the CPU
    threads it may use (None: torch's default). `weights` is the fingerprint that the weights must
    have, None any."""

    source: str
    sampler: str = "default"
    device: str = "cpu"
    dtype: str = "float32"
    max_batch: int = MAX_BATCH
    compiled: bool = False
    threads: int | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Finished:
    """A job's picture. `kept` maps K to packed latents; `timings_ms` as in the engine's result.
    `worker_s` are the worker's seconds that it took, each divided among the jobs that shared it,
    `joules` the device's energy likewise, if it is measured."""

    image: Image.Image
    kept: dict[int, bytes] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    worker_s: float = 0.0
    joules: float | None = None


class Worker(Protocol):
    """Serves with one model at a time and runs jobs, many at once. For use from one asyncio loop.

    `device_type` is the index of its type of device in the variant table. `model` is what it holds
    or loads, `problem` why it is unusable. `restarts` counts its restarts, `busy_s` the seconds in
    which it had jobs in flight, as of the last one that it finished. A worker that has jobs
    and gives no sign of life for longer than `silence_s()` seconds, which the fleet sets, hangs: it
    restarts and runs its jobs again. An `opaque` worker's engine is another server's: its signs of
    life are finished pictures, and it does not go away because of a job.

    It calls `on_change`, which the fleet sets, whenever `state` may have changed.
    """

    device_type: int
    model: Model
    state: State
    problem: Exception | None
    restarts: int
    busy_s: float
    silence_s: Callable[[], float]
    on_change: Callable[[], None]
    opaque: bool

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life of a worker that has jobs, beyond what is usual; 0
        without jobs."""

    def start(self) -> None:
        """Begin to load the model; `ready` waits for it."""

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises the error that prevents it."""

    def load(self, model: Model) -> None:
        """Hold another model, at once if `at_hand` says so; else once earlier jobs are done, and
        the state is `STARTING` until then."""

    def at_hand(self, model: Model) -> bool:
        """Whether a model is loaded, so that it can be held at once: jobs of before go on beside
        those that follow."""

    async def keep(self, models: Sequence[Model], limit_s: float) -> None:
        """Load models beside the one that serves, as far as there is room: they are `at_hand` then.
        For a worker without jobs. Returns when that is done, or cannot be; after `limit_s` seconds
        it is given up, and the worker starts again without them."""

    def restart(self, model: Model) -> None:
        """Start again with another model, after one that could not be loaded."""

    async def run(
        self,
        job: Job,
        start: bytes | None = None,
        keep: tuple[int, ...] = (),
        previews: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Finished:
        """Run a job. `start` are packed latents to resume from, `keep` the K whose latents are
        returned packed; `on_preview` gets up to `previews` unfinished pictures with their index.

        Cancelling the caller cancels the job at the next step. Raises what the engine raises, and
        WorkerError when the worker cannot run it, Unanswered when another may.
        """

    async def stop(self, grace_s: float) -> None:
        """Finish running jobs for up to `grace_s` seconds, then end."""

    def kill(self) -> None:
        """End at once. For the end of the program."""
