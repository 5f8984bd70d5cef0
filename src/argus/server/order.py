"""What the dispatcher takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from argus.cache.cache import Neighbour
from argus.server.slo import DEFAULT


@dataclass(frozen=True)
class Order:
    """A checked request. `width` and `height` are pixels; the first picture has `seed`.

    `variant` pins a variant by name, `steps` a number of steps that is not the exact variant's.
    With `own_guidance` the request chose the guidance itself. `slo` names its class, `least` is the
    quality its pictures must have by the lower bound.
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
    slo: str = DEFAULT
    least: float = 0.0
    own_guidance: bool = False

    @property
    def pinned(self) -> bool:
        """Whether the request itself says how its pictures are made."""
        return self.variant is not None or self.steps is not None


@dataclass(frozen=True)
class Served:
    """A picture and how it was made; the neighbour is set if the picture was resumed from it.

    `quality` and `low` were predicted, by the predictor that was in force as `Foresight.number`
    `foretold_by`; `price` is what a second of the worker cost, `saved_s` the
    worker-seconds saved beside an exact picture; `on_time` says whether the promise of `deadline_s`
    from arrival was kept, where there was one.
    """

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
    decision_ms: dict[str, float]
    worker: int
    slo: str
    deadline_s: float
    on_time: bool
    quality: float | None = None
    low: float | None = None
    price: float | None = None
    saved_s: float = 0.0
    foretold_by: int = 0


class Shed(Exception):
    """Nobody can keep the promise; `retry_after_s` is when somebody should."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(f"This request was shed: {reason}.")
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """The server ends, and with it whatever it had not answered."""


class Full(Exception):
    """No room for more pictures; `retry_after_s` is when there should be."""

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} pictures are waiting or running, and {limit} may.")
        self.retry_after_s = retry_after_s
