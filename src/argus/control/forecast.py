"""How many requests a second are to come, from how many came."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Forecast:
    """Holt's linear method over windows of about equal length, with a test for bursts.

    A window whose count is more than `burst` standard deviations (of a Poisson count) above the
    forecast is a burst: the level jumps there at once, and there is no trend from before it.
    """

    window_s: float
    alpha: float = 0.15
    beta: float = 0.05
    damping: float = 0.8
    burst: float = 4.0
    level: float | None = None
    trend: float = 0.0

    def add(self, count: int, elapsed_s: float | None = None) -> None:
        """A window is over in which `count` requests came. It took `elapsed_s` seconds, `window_s`
        if that is not given."""
        elapsed_s = self.window_s if elapsed_s is None else elapsed_s
        rate = count / elapsed_s
        if self.level is None:
            self.level = rate
        elif self.is_burst(count, elapsed_s):
            self.jump(rate)
        else:
            before, expected = self.level, self.level + self.damping * self.trend
            self.level = expected + self.alpha * (rate - expected)
            change = self.level - before
            self.trend = self.damping * self.trend + self.beta * (
                change - self.damping * self.trend
            )

    def is_burst(self, count: int, elapsed_s: float) -> bool:
        """Whether `count` requests in `elapsed_s` are far more or fewer than were expected."""
        if self.level is None:
            return False
        expected = max(1.0, self.next() * elapsed_s)
        return abs(count - expected) > self.burst * math.sqrt(expected)

    def jump(self, rate: float) -> None:
        """The rate is now this, whatever was before."""
        self.level, self.trend = rate, 0.0

    def next(self) -> float:
        """Requests a second in the window to come."""
        if self.level is None:
            return 0.0
        return max(0.0, self.level + self.damping * self.trend)
