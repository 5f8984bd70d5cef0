"""Says when predictions or prompts are no longer what the predictor was trained for."""

from __future__ import annotations

from collections import Counter, deque
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]

FEWEST_ERRORS = 20
MATTERS = 0.05  # mean error, in quality, that is put up with
PATIENCE = 18.0  # how much of chance is put up with; chosen by `benchmarks/drift.py`
MEMORY = 1000  # errors by which chance is judged
LEAST_SPREAD = 0.1  # of errors, in quality
WINDOW, FEWEST_PROMPTS = 500, 100
PART = 0.007  # of the training prompts


class Drift:
    """Two tests on the latest served prompts.

    `errors`: the cumulative sum (Page 1954) of measured minus predicted quality, less `MATTERS` a
    picture, has reached a limit, on the one side or the other. The limit is `PATIENCE` times what a
    sum of such errors by chance reaches, so that it grows with their variance.

    `prompts`: among the latest `WINDOW` prompts, the mean embedding of the different ones is
    further from the training prompts' than that of any `PART` of the training prompts can be in
    that direction, taking those for normal. So no wave of fashion among prompts that the predictor
    knows raises it, be it a hundred times as frequent as in training, and no client that repeats
    its prompts.

    `centre` (d,) and `spread` (d, d) are mean and covariance of the training prompts' embeddings;
    without them prompts are not tested.
    """

    def __init__(self, centre: Numbers | None = None, spread: Numbers | None = None) -> None:
        self._centre, self._spread = centre, spread
        self._vectors: deque[bytes] = deque()
        self._often: Counter[bytes] = Counter()
        self._sum = np.zeros(0 if centre is None else len(centre))
        self.errors, self._seen = False, 0
        self._mean = self._variance = self._above = self._below = 0.0

    def saw_error(self, error: float) -> None:
        """A picture was worth so much more than predicted. What is no number is passed over."""
        if not np.isfinite(error):
            return
        self._seen += 1
        weight, off = 1 / min(self._seen, MEMORY), error - self._mean
        self._mean += weight * off
        self._variance += weight * (off * (error - self._mean) - self._variance)
        self._above = max(0.0, self._above + error - MATTERS)
        self._below = max(0.0, self._below - error - MATTERS)
        if self._seen < FEWEST_ERRORS:
            return
        limit = PATIENCE * max(self._variance, LEAST_SPREAD**2) / (2 * MATTERS)
        self._above, self._below = min(self._above, limit), min(self._below, limit)
        if max(self._above, self._below) == limit:
            self.errors = True
        elif max(self._above, self._below) < limit / 2:  # so that it does not flicker
            self.errors = False

    def saw_prompt(self, vector: Numbers) -> None:
        """A prompt with this embedding (d,) was asked for."""
        if self._centre is None:
            return
        key = np.asarray(vector, np.float32).tobytes()
        self._vectors.append(key)
        if not self._often[key]:
            self._sum = self._sum + vector
        self._often[key] += 1
        if len(self._vectors) > WINDOW:
            gone = self._vectors.popleft()
            self._often[gone] -= 1
            if not self._often[gone]:
                del self._often[gone]
                self._sum = self._sum - np.frombuffer(gone, np.float32)

    @property
    def prompts(self) -> bool:
        return self.moved > 1

    @property
    def moved(self) -> float:
        """How far the prompts' mean has moved, as a share of how far it may."""
        if self._centre is None or self._spread is None or len(self._often) < FEWEST_PROMPTS:
            return 0.0
        mean = self._sum / len(self._often)
        return float(moved(mean[None], self._centre, self._spread)[0])


def moved(means: Numbers, centre: Numbers, spread: Numbers) -> Numbers:
    """How far means (n, d) of prompts are from the training prompts' `centre` (d,), as a share (n,)
    of how far the mean of the `PART` of them that lies furthest in the same direction would be, if
    they were normal with covariance `spread` (d, d)."""
    normal = NormalDist()
    furthest = normal.pdf(normal.inv_cdf(1 - PART)) / PART  # standard deviations: 2.79
    gap = means - centre
    length = np.square(gap).sum(1)
    along = np.einsum("nd,de,ne->n", gap, spread, gap, optimize=True)
    share: Numbers = length / (furthest * np.sqrt(np.maximum(along, 1e-30)))
    return share


def moments(vectors: Numbers, weights: Numbers) -> tuple[Numbers, Numbers]:
    """Mean (d,) and covariance (d, d) of embeddings (n, d) that count as much as `weights` (n,)."""
    share = (weights / weights.sum()).astype(np.float64)
    centre = share @ vectors
    off = vectors - centre
    return centre.astype(np.float32), ((off * share[:, None]).T @ off).astype(np.float32)
