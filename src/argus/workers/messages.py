"""The messages between a server and a worker process, over their pipe."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from argus.core.job import Job
from argus.workers.worker import Finished, Model

BEAT_S = 0.1  # between two beats of a busy process of this machine


@dataclass(frozen=True)
class Task:
    """A job, the latents it starts from if it skips, and the K whose latents to return.

    `alone` jobs share no batch, because a process died of them or of a job in the same batch.
    `progress` asks for a `Progress` after every step, `previews` for that many unfinished pictures.
    """

    number: int
    job: Job
    start: bytes | None = None
    keep: tuple[int, ...] = ()
    alone: bool = False
    progress: bool = False
    previews: int = 0


@dataclass(frozen=True)
class Cancel:
    """Drop a task, queued or running; there will be no answer to it."""

    number: int


@dataclass(frozen=True)
class Load:
    """Make the tasks that follow with another model: at once if it is here, else once those sent so
    far are answered."""

    model: Model


@dataclass(frozen=True)
class Keep:
    """Load models beside the one that serves, as far as there is room, once the tasks sent so far
    are answered: they can then be taken up at once. Answered by `Held`."""

    models: tuple[Model, ...]


@dataclass(frozen=True)
class Stop:
    """Exit once the tasks sent so far are answered."""


@dataclass(frozen=True)
class Ready:
    """A model is taken up, the first or another. `held` are all that are here."""

    model: Model
    held: tuple[Model, ...]


@dataclass(frozen=True)
class Held:
    """All models that are here after a `Keep`."""

    models: tuple[Model, ...]


@dataclass(frozen=True)
class Unusable:
    """A model cannot be loaded; the process ends."""

    model: Model
    error: Exception


@dataclass(frozen=True)
class Beat:
    """The process is between two steps; sent now and then while it is busy."""


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
class Done:
    """A task's picture; the process has been busy for `busy_s` seconds in all."""

    number: int
    finished: Finished
    busy_s: float


@dataclass(frozen=True)
class Failed:
    """A task could not be done; the worker goes on."""

    number: int
    error: Exception


Request = Task | Cancel | Load | Keep | Stop
Answer = Ready | Held | Unusable | Beat | Begun | Progress | Preview | Done | Failed
