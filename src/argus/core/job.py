"""A job: one picture to make, with all settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from argus.core.errors import BadRequest

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Job:
    """A picture to make. `width` and `height` are pixels; None is the model's own size.

    `skip` is K: how many of the first of `steps` denoising steps given latents replace.
    `guidance` of 1 or less runs without classifier-free guidance. `extra` are fields that an
    upstream gets beside these; our own engines ignore them.
    Raises BadRequest for values out of range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 50
    guidance: float = 7.5
    skip: int = 0
    width: int | None = None
    height: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise BadRequest("The prompt is empty. Say what the picture shows.")
        if not 1 <= self.steps <= MAX_STEPS:
            raise BadRequest(f"steps is {self.steps}; it must be from 1 to {MAX_STEPS}.")
        if not 0 <= self.skip < self.steps:
            raise BadRequest(
                f"skip is {self.skip}; it must be at least 0 and less than steps ({self.steps})."
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise BadRequest(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}.")
        if not 0 <= self.guidance <= 100:
            raise BadRequest(f"guidance is {self.guidance}; it must be from 0 to 100.")
        if self.negative_prompt and not self.guided:
            raise BadRequest(
                f"The negative prompt has no effect at guidance {self.guidance:g}: give a guidance "
                "above 1, or leave it out."
            )
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side < 1:
                raise BadRequest(f"{name} is {side}; it must be a positive number of pixels.")

    @property
    def steps_run(self) -> int:
        return self.steps - self.skip

    @property
    def guided(self) -> bool:
        return self.guidance > 1
