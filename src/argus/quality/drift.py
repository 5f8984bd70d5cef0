"""Says when predictions or prompts are no longer what the predictor was trained for."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float32]

ERRORS, FEWEST_ERRORS = 100, 20
SURE, MATTERS = 4.0, 0.05  # standard errors, and quality
VECTORS, FEWEST_VECTORS = 400, 200
FAR = 0.2  # of the prompts' own spread


class Drift:
    """Two tests on the latest served prompts.

    `errors`: the mean of measured minus predicted quality is more than `SURE` standard errors and
    more than `MATTERS` from nothing. `prompts`: the mean embedding is further from the training
    prompts' than the share `FAR` of their spread, |m - c|² > FAR · E|x - c|², beyond what so few
    prompts are off by chance. Users vary one idea for a while, so that prompts are not
    independent: the share is what matters, not a level of significance.

    `centre` (d,) and `scatter`, E|x - c|², are of the training prompts; without them prompts are
    not tested.
    """

    def __init__(self, centre: Numbers | None = None, scatter: float = 0.0) -> None:
        self._centre, self._scatter = centre, scatter
        self._errors: deque[float] = deque(maxlen=ERRORS)
        self._vectors: deque[Numbers] = deque(maxlen=VECTORS)

    def saw_error(self, error: float) -> None:
        """A picture was worth so much more than predicted."""
        self._errors.append(error)

    def saw_prompt(self, vector: Numbers) -> None:
        """A prompt with this embedding (d,) was asked for."""
        self._vectors.append(vector)

    @property
    def errors(self) -> bool:
        count = len(self._errors)
        if count < FEWEST_ERRORS:
            return False
        values = np.array(self._errors)
        off, chance = abs(values.mean()), values.std(ddof=1) / count**0.5
        return bool(off > MATTERS and off > SURE * chance)

    @property
    def prompts(self) -> bool:
        return self.moved > FAR

    @property
    def moved(self) -> float:
        """How far the prompts' mean has moved, as a share of the training prompts' spread."""
        count = len(self._vectors)
        if self._centre is None or count < FEWEST_VECTORS:
            return 0.0
        gap = np.square(np.mean(np.stack(self._vectors), axis=0) - self._centre).sum()
        return max(0.0, float(gap) / self._scatter - 1 / count)

    def forget(self) -> None:
        """A new predictor: what was wrong with the old one does not count."""
        self._errors.clear()
