"""What a server and a worker process say to each other over their pipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image

from argus.core.errors import ArgusError
from argus.core.job import Job
from argus.core.profile import MAX_BATCH

BEAT_S = 0.1  # seconds between two beats of a worker at work


class WorkerError(ArgusError):
    """A worker could not do a job, though there is nothing wrong with what was asked."""


@dataclass(frozen=True)
class Model:
    """Which model a worker loads, with which sampler, where, in what precision, how many pictures
    at most it makes at once, whether torch compiles the UNet first, and how many CPU threads it may
    use (None: torch's default)."""

    source: str
    sampler: str = "default"
    device: str = "cpu"
    dtype: str = "float32"
    max_batch: int = MAX_BATCH
    compiled: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Task:
    """A job, the latents it starts from if it skips, and the K whose latents to hand up.

    `alone` jobs share no batch, because a process died of them or of what was beside them.
    `progress` asks for word of every step, `previews` for so many unfinished pictures. A task that
    has not begun by `deadline_s` of `time.monotonic` on this machine is dropped.
    """

    number: int
    job: Job
    start: bytes | None = None
    keep: tuple[int, ...] = ()
    alone: bool = False
    progress: bool = False
    previews: int = 0
    deadline_s: float = math.inf


@dataclass(frozen=True)
class Cancel:
    """Drop a task, waiting or running; there will be no answer to it."""

    number: int


@dataclass(frozen=True)
class Load:
    """Hold another model instead, once the tasks sent so far are answered."""

    model: Model


@dataclass(frozen=True)
class Stop:
    """Leave once the tasks sent so far are answered."""


@dataclass(frozen=True)
class Ready:
    """A model is loaded, the first or another."""

    model: Model


@dataclass(frozen=True)
class Unusable:
    """A model cannot be loaded; the process ends."""

    model: Model
    error: Exception


@dataclass(frozen=True)
class Beat:
    """The process is at work, between two steps; sent at most every `BEAT_S` seconds."""


@dataclass(frozen=True)
class Begun:
    """Tasks are in flight from now on."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """A step of a task is done."""

    number: int
    done: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """An unfinished picture of a task, the `index`-th of those asked for."""

    number: int
    index: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """A task's picture. `kept` maps K to packed latents; `timings_ms` as in the engine's result."""

    number: int
    image: Image.Image
    kept: dict[int, bytes] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A task could not be done; the worker goes on."""

    number: int
    error: Exception


Request = Task | Cancel | Load | Stop
Answer = Ready | Unusable | Beat | Begun | Progress | Preview | Finished | Failed
