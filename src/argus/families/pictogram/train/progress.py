"""What every stage of training shares: a line of progress, checkpoints, a learning-rate curve."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """A factor that rises for `warmup` steps and then falls from 1 to `floor` on a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def plateau(step: int, steps: int, warmup: int, cooldown: float = 0.25) -> float:
    """A factor that rises for `warmup` steps, stays 1, and falls to 0 over the last share of steps.

    Training that was planned shorter goes on from before its cooldown as if nothing had been.
    """
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, (steps - step) / max(1.0, cooldown * steps))


class Progress:
    """Prints smoothed numbers and the time left, every `every` seconds.

    While the file `pause` exists, `step` waits: the machine is lent to somebody else.
    """

    def __init__(
        self, stage: str, steps: int, begin: int, every: float = 20.0, pause: Path | None = None
    ) -> None:
        self._stage, self._steps, self._begin, self._now = stage, steps, begin, begin
        self._every, self._started, self._printed = every, time.monotonic(), time.monotonic()
        self._pause = pause
        self._means: dict[str, float] = {}
        if begin:
            print(f"{stage}: resuming at step {begin} of {steps}", flush=True)

    def step(self, **numbers: float) -> None:
        self._now += 1
        for name, value in numbers.items():
            self._means[name] = 0.98 * self._means.get(name, value) + 0.02 * value
        now = time.monotonic()
        if now - self._printed >= self._every or self._now >= self._steps:
            self._printed = now
            pace = (now - self._started) / (self._now - self._begin)
            values = "  ".join(f"{name} {value:.4f}" for name, value in self._means.items())
            left = pace * (self._steps - self._now) / 60
            print(
                f"{self._stage}: {self._now}/{self._steps}  {values}  "
                f"{pace:.3f} s/step  {left:.1f} min left",
                flush=True,
            )
        self._hold()

    def _hold(self) -> None:
        began = time.monotonic()
        while self._pause is not None and self._pause.exists():
            time.sleep(1.0)
        self._started += time.monotonic() - began


class Checkpoints:
    """Saves and restores everything with a `state_dict`, whole or not at all."""

    def __init__(self, path: Path, every_s: float = 180.0, **parts: Any) -> None:
        self._path, self._parts, self._every_s = path, parts, every_s
        self._saved = time.monotonic()

    def resume(self) -> int:
        """Restore the parts if a checkpoint exists; the step to go on from."""
        if not self._path.exists():
            return 0
        saved = torch.load(self._path, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(saved[name])
        return int(saved["step"])

    def save_at_times(self, step: int, last: bool) -> None:
        """Save if the last time is `every_s` seconds ago, or `last`."""
        if last or time.monotonic() - self._saved >= self._every_s:
            self.save(step)

    def save(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".new")
        states = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save({"step": step, **states}, aside)
        os.replace(aside, self._path)
        self._saved = time.monotonic()
