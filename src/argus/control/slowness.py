"""The workers' slowness over a window: the time they take as a multiple of the variant table's."""

from __future__ import annotations

import math

LOOKS = 6  # at the load and at the workers' slowness, a window
SLOWER = 0.1  # logarithm of the change that makes a plan outdated


class SlownessTracker:
    """The workers' slowness, on a logarithmic mean over about the last `LOOKS` looks."""

    def __init__(self, slowness: float = 1.0) -> None:
        self._mean = self._planned = math.log(slowness)

    @property
    def slowness(self) -> float:
        return math.exp(self._mean)

    @property
    def outdated(self) -> bool:
        """Whether workers are no more as fast as the last plan took them for."""
        return abs(self._mean - self._planned) > SLOWER

    def saw(self, slowness: float) -> None:
        """How slow workers are at this look."""
        self._mean += (math.log(slowness) - self._mean) / LOOKS

    def planned(self) -> None:
        """A plan takes them for as slow as they are now."""
        self._planned = self._mean
