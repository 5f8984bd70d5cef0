"""A request as policies route it and worker queues order it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Request:
    """A request for one picture, filled in on its way. The server and the simulator extend it.

    `quality` (v,) is predicted and `allowed` (v,) says which variants can serve it: without a
    neighbour none that skips. `similarity` is that of the neighbour, None without one. `slo` is the
    index of its SLO class. `size_factor` is the work of its picture as a multiple of the variant
    table's: 4 where both sides are doubled. It multiplies steps and costs, not waits. `exact_share`
    is the share of the exact variant's work that it takes for this request, where that limits its
    steps.

    Times are seconds of the driver's clock. `deadline_s` is when the picture should be done; the
    request is dropped when it cannot be done by `expires_s`, or does not run by `begin_by_s`.
    `slack_s` is the time to the deadline in seconds of the table, set whenever it is routed.

    `variant` is the one decided on, `work_steps` the steps that it takes, and `reserved_s` the
    seconds by which the request lengthens its worker's queue. `too_late_for` is the variant
    for which no time was left, because of which it was routed again (-1: none); `deaths` counts the
    workers that died while running it, and `failed_at` are the numbers of those that failed at it,
    one for each failure: it goes to others first. One that `yields` is handed back when its worker
    is needed for others.
    """

    quality: Sequence[float] = ()
    allowed: Sequence[bool] = ()
    slack_s: float = math.inf
    similarity: float | None = None
    slo: int = 0
    size_factor: float = 1.0
    exact_share: float = 1.0
    deadline_s: float = math.inf
    expires_s: float = math.inf
    begin_by_s: float = math.inf
    variant: int = -1
    work_steps: float = 0.0
    reserved_s: float = 0.0
    too_late_for: int = -1
    deaths: int = 0
    yields: bool = False
    failed_at: tuple[int, ...] = ()
