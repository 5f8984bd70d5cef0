"""Requests of a run: arrivals, prompts and outcomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from argus.control.request import Request
from argus.control.variants import Numbers, Whole

ON_TIME, LATE, SHED, DROPPED, FAILED = range(5)
OUTCOMES = ("on time", "late", "shed", "dropped", "failed")
UNSERVED = -1


@dataclass
class Requests:
    """Arrays (n,) by request: `arrived_s`, `prompt`, `topic`; and, once it ended, `outcome`,
    `ended_s`, `variant` (-1 without a picture) and the picture's true `quality`."""

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


@dataclass(eq=False, kw_only=True)
class SimulatedRequest(Request):
    """Request `number` of a run, for the world's prompt `prompt`. `near` says whether it has a
    neighbour whose latents may come in time. `first` is the variant of a doubted picture."""

    number: int
    prompt: int
    near: bool
    first: int | None = None
