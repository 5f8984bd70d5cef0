"""The workers' slowness over a window: the time they take as a multiple of the variant table's."""

from __future__ import annotations

import math

LOOKS = 6  # a window, at the load and at the workers' slowness
STEADY_S = 10.0  # the least that slowness is a mean over: workers of a busy machine falter
SLOWER = 0.1  # change of the logarithm that makes a plan outdated


class SlownessTracker:
    """The workers' slowness as a moving logarithmic mean over about a window, at least `STEADY_S`
    seconds."""

    def __init__(self, slowness: float, window_s: float) -> None:
        self._mean = self._planned = math.log(slowness)
        self._over_s = max(window_s, STEADY_S)

    @property
    def slowness(self) -> float:
        return math.exp(self._mean)

    @property
    def outdated(self) -> bool:
        """Whether the slowness has changed since the last plan."""
        return abs(self._mean - self._planned) > SLOWER

    def saw(self, slowness: float, elapsed_s: float) -> None:
        """Add the slowness at a look, so many seconds after the last."""
        weight = min(1.0, elapsed_s / self._over_s)
        self._mean += weight * (math.log(slowness) - self._mean)

    def planned(self) -> None:
        """A plan is made with the present slowness."""
        self._planned = self._mean
