"""What the dispatcher takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from argus.cache.cache import Neighbour


@dataclass(frozen=True)
class Order:
    """A checked request. `width` and `height` are pixels; the first picture has `seed`.

    `variant` pins a variant by name, `steps` a number of steps that is not the exact variant's.
    `namespace` is the tenant's; `cached` says whether the cache may serve and keep it. `previews`
    is how many unfinished pictures are to be shown on the way.
    """

    prompt: str
    negative_prompt: str
    count: int
    seed: int
    width: int
    height: int
    guidance: float
    namespace: str
    cached: bool = True
    variant: str | None = None
    steps: int | None = None
    previews: int = 0


@dataclass(frozen=True)
class Served:
    """A picture and how it was made; the neighbour is set if the picture was resumed from it."""

    image: Image.Image
    variant: str
    model: str
    reason: str
    steps_run: int
    steps_skipped: int
    seed: int
    neighbour: Neighbour | None
    similarity: float | None
    prompt_truncated: bool
    negative_truncated: bool
    timings_ms: dict[str, float]


class Full(Exception):
    """No room for more pictures; `retry_after_s` is when there should be."""

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} pictures are waiting or running, and {limit} may.")
        self.retry_after_s = retry_after_s
