"""Requests of a run: when they came, what they asked, how they ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from argus.control.variants import Numbers, Whole

ON_TIME, LATE, SHED, DROPPED, FAILED = range(5)
OUTCOMES = ("on time", "late", "shed", "dropped", "failed")
UNSERVED = -1


@dataclass
class Requests:
    """By request: `arrived_s`, `prompt`, `topic`; and, once it ended, `outcome`, `ended_s`,
    `variant` (-1 when no picture was made) and the picture's true `quality`."""

    arrived_s: Numbers
    prompt: Whole
    topic: Whole
    outcome: np.ndarray[tuple[int], np.dtype[np.int8]]
    ended_s: Numbers
    variant: np.ndarray[tuple[int], np.dtype[np.int16]]
    quality: np.ndarray[tuple[int], np.dtype[np.float32]]

    @classmethod
    def new(cls, arrived_s: Numbers, prompt: Whole, topic: Whole) -> Requests:
        count = len(arrived_s)
        return cls(
            arrived_s,
            prompt,
            topic,
            np.full(count, FAILED, dtype=np.int8),
            np.full(count, np.nan),
            np.full(count, UNSERVED, dtype=np.int16),
            np.zeros(count, dtype=np.float32),
        )


@dataclass
class Job:
    """A request on its way to a picture. Policies know `deadline_s`, a margin before `expires_s`,
    the SLO's. `near` ones have a neighbour whose latents may be there. `work_steps` are the
    steps it takes, `first` the variant of a picture that was made before and did not do,
    `reserved_s` the seconds that a worker counts on for it. `hopeless` ones had no time left for
    another variant."""

    number: int
    deadline_s: float
    expires_s: float
    near: bool
    variant: int = 0
    work_steps: float = 0.0
    first: int | None = None
    reserved_s: float = 0.0
    hopeless: bool = False
