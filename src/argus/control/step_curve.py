"""Seconds of a step by the number of pictures in flight, learned from how long pictures took.

For workers whose batching is not ours: what another server makes of many requests at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST = 16.0  # factor of the longest correction
MEMORY = 0.98  # share of the experience with each number that is left after the next picture


class StepCurve:
    """The seconds of a step with 1, 2, … pictures in flight; first those `known`, then corrected.

    They never fall as the number rises, and stay within a factor of `MOST` of the known ones.
    Beyond the last number they rise in proportion.
    """

    def __init__(self, known: Sequence[float]) -> None:
        self._known = list(known)
        self._shift = [0.0] * len(known)  # logarithms of the corrections
        self._weight = [0.0] * len(known)  # experience with each number
        self._step_s = list(known)
        self._settle()

    def step_s(self, size: int) -> float:
        if size <= len(self._step_s):
            return self._step_s[max(1, size) - 1]
        return self._step_s[-1] * size / len(self._step_s)

    def learn(self, size: float, ratio: float, trust: float) -> float:
        """Correct the curve by a picture that took `ratio` times as long as predicted, with `size`
        pictures in flight on average; `trust` is the weight of this one. Numbers near `size` are
        corrected with it.

        Returns the factor by which all seconds were corrected on average: the caller multiplies
        its slowness by it, and the curve keeps only what differs between numbers.
        """
        reach = 1 + size / 2
        for i in range(len(self._known)):
            near = max(0.0, 1 - abs(i + 1 - size) / reach)
            self._weight[i] = MEMORY * self._weight[i] + near
            self._shift[i] += near * trust * math.log(ratio)
        total = sum(self._weight)
        pairs = zip(self._weight, self._shift, strict=True)
        mean = sum(weight * shift for weight, shift in pairs) / total if total else 0.0
        limit = math.log(MOST)
        self._shift = [min(limit, max(-limit, shift - mean)) for shift in self._shift]
        self._settle()
        return math.exp(mean)

    def _settle(self) -> None:
        longest = 0.0
        for i, (known, shift) in enumerate(zip(self._known, self._shift, strict=True)):
            longest = max(longest, known * math.exp(shift))
            self._step_s[i] = longest
