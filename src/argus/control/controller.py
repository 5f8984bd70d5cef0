"""One policy in charge of a cluster, live or simulated. Pure: every time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from argus.control.forecast import Forecast
from argus.control.policy import Cluster, Decision, Plan, PlanningInput, Policy, Slo
from argus.control.request import Request
from argus.control.slowness import LOOKS, SlownessTracker

RECENT = 1000  # requests that a plan is made for


class Controller:
    """Counts requests, watches the load, asks the policy for plans and decisions.

    A driver calls `look` every `look_s` seconds and before every `LOOKS`th of them `end_window`;
    it plans after each `end_window`, whenever `look` says so, and when a worker comes or goes.
    `slos` gives the SLO classes in seconds of the variant table, for workers that take so many
    times as long as it says. `known_rate` gives the requests a second to come, for policies
    that know the future.
    """

    def __init__(
        self,
        policy: Policy,
        slos: Callable[[float], Sequence[Slo]],
        window_s: float,
        slowness: float = 1.0,
        now: float = 0.0,
        known_rate: Callable[[float], float] | None = None,
    ) -> None:
        self.policy = policy
        self.look_s = window_s / LOOKS
        self._slos, self._known_rate = slos, known_rate
        self._forecast = Forecast(window_s)
        self._slowness = SlownessTracker(slowness)
        self._recent: deque[tuple[Sequence[float], Sequence[bool], int]] = deque(maxlen=RECENT)
        self._count = self._counted = self._seen = 0  # in all, till the last window, the last look
        self._looked_s = self._added_s = now  # of the last look, of the end of the last window

    def rate(self, now: float) -> float:
        """Requests a second to come."""
        return self._forecast.next() if self._known_rate is None else self._known_rate(now)

    def arrived(self, request: Request) -> None:
        """Count a request into what plans are made for."""
        self._count += 1
        self._recent.append((request.quality, request.allowed, request.slo))

    def refused(self, count: int) -> None:
        """Count requests into the rate that were refused before anything was known of them."""
        self._count += count

    def end_window(self, now: float) -> None:
        """Add the window's count to the forecast."""
        self._forecast.add(self._count - self._counted, now - self._added_s)
        self._counted, self._added_s = self._count, now

    def look(self, now: float, slowness: float) -> bool:
        """Whether the last plan is outdated: far more or fewer requests came since the last look
        than were expected, or workers are slower or faster than it took them for."""
        count, elapsed_s = self._count - self._seen, now - self._looked_s
        self._seen, self._looked_s = self._count, now
        self._slowness.saw(slowness)
        if self._forecast.level is None and not count:
            return self._slowness.outdated
        if self._forecast.level is None or self._forecast.is_burst(count, elapsed_s):
            self._forecast.jump(count / elapsed_s)
            return True
        return self._slowness.outdated

    def plan(
        self, cluster: Cluster, models: Sequence[int], alive: Sequence[bool], usable: float
    ) -> Plan:
        """Ask the policy what the workers are to hold.

        `models` (w,) is what they hold or load now, `alive` (w,) whether they live, `usable` the
        share of cached latents that come in time.
        """
        if self._slowness.outdated:
            self._slowness.planned()
            self.policy.set_slos(self._slos(self._slowness.slowness))
        recent = list(self._recent)
        shape = (len(recent), -1) if recent else (0, 0)
        return self.policy.plan(
            PlanningInput(
                now_s=cluster.now_s,
                rate=self.rate(cluster.now_s) * self._slowness.slowness,
                quality=np.array([row for row, _, _ in recent], float).reshape(shape),
                allowed=np.array([row for _, row, _ in recent], bool).reshape(shape),
                slo=np.array([index for _, _, index in recent], np.int64),
                kinds=np.array(cluster.kinds),
                models=np.array(models),
                alive=np.array(alive),
                wait_s=np.array(cluster.wait_s),
                usable=usable,
            )
        )

    def route(self, request: Request, cluster: Cluster) -> Decision:
        """The policy's decision for a request."""
        request.slack_s = (request.deadline_s - cluster.now_s) / cluster.slowness
        return self.policy.route(request, cluster)

    def faster(self, request: Request, cluster: Cluster) -> Decision | None:
        """The decision for a request that waited until there is no time left for its variant. None
        if it is dropped: there is no other, or it was routed anew for this reason before."""
        decision = self.route(request, cluster)
        if request.too_late or decision.worker is None or decision.variant == request.variant:
            return None
        request.too_late = True
        return decision
