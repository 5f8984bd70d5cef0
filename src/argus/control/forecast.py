"""Forecasts the rate of requests from counts by window."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Forecast:
    """Holt's linear method over windows of about equal length, with a test for bursts. A shorter
    window counts for as much less.

    A window whose count is more than `burst` standard deviations (of a Poisson count) from the
    forecast is a burst: the level jumps to its rate at once, and the trend is reset. `level` is in
    requests a second, None before the first window.
    """

    window_s: float
    alpha: float = 0.15
    beta: float = 0.05
    damping: float = 0.8
    burst: float = 4.0
    level: float | None = None
    trend: float = 0.0

    def add(self, count: int, elapsed_s: float | None = None) -> None:
        """Add a window of `elapsed_s` seconds (default: `window_s`) in which `count` requests
        arrived."""
        elapsed_s = self.window_s if elapsed_s is None else elapsed_s
        rate = count / elapsed_s
        if self.level is None:
            self.level = rate
        elif self.is_burst(count, elapsed_s):
            self.jump(rate)
        else:
            before, expected = self.level, self.level + self.damping * self.trend
            part = min(1.0, elapsed_s / self.window_s)
            self.level = expected + part * self.alpha * (rate - expected)
            change = self.level - before
            self.trend = self.damping * self.trend + self.beta * (
                change - self.damping * self.trend
            )

    def is_burst(self, count: int, elapsed_s: float) -> bool:
        """Whether `count` requests in `elapsed_s` seconds are far more or fewer than forecast."""
        if self.level is None:
            return False
        expected = max(1.0, self.next() * elapsed_s)
        return abs(count - expected) > self.burst * math.sqrt(expected)

    def jump(self, rate: float) -> None:
        """Set the level to `rate`, in requests a second, and the trend to 0."""
        self.level, self.trend = rate, 0.0

    def next(self) -> float:
        """Forecast requests a second in the next window."""
        if self.level is None:
            return 0.0
        return max(0.0, self.level + self.damping * self.trend)
