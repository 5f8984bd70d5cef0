"""One policy in charge of a cluster, live or simulated. Pure: every time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from argus.control.forecast import Forecast
from argus.control.policy import Cluster, Decision, Plan, PlanningInput, Policy, Slo
from argus.control.request import Request
from argus.control.slowness import LOOKS, SlownessTracker

RECENT = 1000  # latest requests that a plan is made for
DOUBT_WEIGHT = 0.05  # of a window, in the mean error of the forecast
MOST_ERROR = 3.0  # of a forecast, relative to it, that a window counts for


class Controller:
    """Counts requests, watches the load, asks the policy for plans and decisions.

    Its driver, the server or the simulator, calls `look` every `look_s` seconds and `end_window`
    before every `LOOKS`th look; it plans after each `end_window`, whenever `look` returns True, and
    when a worker comes or goes. `slos` gives the SLO classes in seconds of the variant table for a
    slowness of the workers. `known_rate` gives the future requests a second, for policies that are
    told them.
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
        self._doubt = 0.0  # mean error of forecasts, relative to them
        self._slowness = SlownessTracker(slowness, window_s)
        self._recent: deque[tuple[Sequence[float], Sequence[bool], int, float]] = deque(
            maxlen=RECENT
        )
        self._count = self._counted = self._seen = 0  # in total, by last window, by last look
        self._looked_s = self._added_s = now  # last look, end of the last window
        self._fresh, self._fresh_s = 0, now  # count and time from which the forecast is behind
        self._unplanned = False  # whether the policy has made no plan for recent requests yet

    def rate(self, now: float) -> float:
        """Forecast requests a second, or the known ones."""
        return self._forecast.next() if self._known_rate is None else self._known_rate(now)

    def arrived(self, request: Request) -> None:
        """Count a request, and make the next plans for it too."""
        self._count += 1
        self._recent.append((request.quality, request.allowed, request.slo, request.exact_share))

    def adopt(self, policy: Policy) -> None:
        """Put another policy in charge; a plan is due. The forecast stays. Recent requests are
        forgotten if their quality is not what this policy gets (`informed`): then it also plans at
        the first look after new ones."""
        policy.set_slos(self._slos(self._slowness.slowness))
        self._slowness.planned()
        if policy.informed != self.policy.informed:
            self._recent.clear()
        self.policy, self._unplanned = policy, True

    def refused(self, count: int) -> None:
        """Count requests in the rate that were refused before they were prepared."""
        self._count += count

    def end_window(self, now: float) -> None:
        """Add the window's count to the forecast, after a jump what came since. Doubt is about the
        whole window: a plan was made for all of it."""
        count, elapsed_s = self._count - self._counted, now - self._added_s
        expected = self._forecast.next() * elapsed_s
        if expected > 0 and (count or expected >= 1):  # nothing is learnt while nobody asks
            error = min(MOST_ERROR, abs(count - expected) / expected)
            self._doubt += DOUBT_WEIGHT * (error - self._doubt)
        self._forecast.add(self._count - self._fresh, now - self._fresh_s)
        self._counted, self._added_s = self._fresh, self._fresh_s = self._count, now

    def look(self, now: float, slowness: float) -> bool:
        """Whether the last plan is outdated: far more or fewer requests arrived since the last look
        than forecast, the workers' slowness has changed since that plan, or it was another
        policy's."""
        count, elapsed_s = self._count - self._seen, now - self._looked_s
        self._seen, self._looked_s = self._count, now
        self._slowness.saw(slowness, elapsed_s)
        outdated = self._slowness.outdated or (self._unplanned and len(self._recent) > 0)
        if self._forecast.level is None and not count:
            return outdated
        if self._forecast.level is None or self._forecast.is_burst(count, elapsed_s):
            self._forecast.jump(count / elapsed_s)
            self._fresh, self._fresh_s = self._count, now
            return True
        return outdated

    def plan(
        self, cluster: Cluster, models: Sequence[int], alive: Sequence[bool], usable: float
    ) -> Plan:
        """The policy's plan.

        `models` (w,) are what the workers are to hold by the last plan, `alive` (w,) which of them
        are alive, `usable` is the share of cached latents that come in time.
        """
        if self._slowness.outdated:
            self._slowness.planned()
            self.policy.set_slos(self._slos(self._slowness.slowness))
        self._unplanned &= not self._recent
        quality, allowed, slo, shares = (
            zip(*self._recent, strict=True) if self._recent else [()] * 4
        )
        shape = (len(quality), -1) if quality else (0, 0)
        return self.policy.plan(
            PlanningInput(
                now_s=cluster.now_s,
                rate=self.rate(cluster.now_s) * self._slowness.slowness,
                quality=np.array(quality, float).reshape(shape),
                allowed=np.array(allowed, bool).reshape(shape),
                slo=np.array(slo, np.int64),
                kinds=np.array(cluster.kinds),
                models=np.array(models),
                alive=np.array(alive),
                wait_s=np.array(cluster.wait_s),
                usable=usable,
                doubt=0.0 if self._known_rate is not None else self._doubt,
                exact_share=float(np.mean(shares)) if shares else 1.0,
            )
        )

    def route(self, request: Request, cluster: Cluster) -> Decision:
        """The policy's decision for a request, whose `slack_s` it sets."""
        request.slack_s = (request.deadline_s - cluster.now_s) / cluster.slowness
        return self.policy.route(request, cluster)

    def faster(self, request: Request, cluster: Cluster) -> Decision | None:
        """The decision for a request that was queued until no time was left for its variant. None
        if it is to be dropped: there is no other variant, or this happened to it before."""
        decision = self.route(request, cluster)
        before, request.too_late_for = request.too_late_for, request.variant
        if before >= 0 or decision.worker is None or decision.variant == request.variant:
            return None
        return decision
