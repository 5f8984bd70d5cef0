"""The predictor in force, with its variants in the table's order; it may be replaced at any
time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from argus.cache.cache import Neighbour
from argus.cache.index import Vector
from argus.control.variants import VariantTable
from argus.quality.predictor import Prediction, Predictor

BETTER = 0.1  # in predicted quality, than the nearest neighbour's


class Predictions:
    """Predicts nothing without a predictor. `number` counts the predictors so far, and identifies
    the one that made a prediction."""

    def __init__(self, predictor: Predictor | None, table: VariantTable) -> None:
        self._variants, self._skips = table.variants, table.skip.tolist()
        self.number = 0
        self.predictor = predictor

    @property
    def predictor(self) -> Predictor | None:
        return self._predictor

    @predictor.setter
    def predictor(self, predictor: Predictor | None) -> None:
        if predictor is not None:
            self._order = np.array([predictor.variants.index(name) for name in self._variants])
        self._predictor = predictor
        self.number += 1

    def predict(self, vector: Vector, neighbour: Neighbour | None) -> Prediction | None:
        """The prediction for every variant of the table (v,)."""
        if self._predictor is None:
            return None
        found = self._predictor.predict(vector, None if neighbour is None else neighbour.vector)
        return Prediction(found.mean[self._order], found.low[self._order])

    def predict_best_first(
        self, vector: Vector, neighbours: Sequence[Neighbour]
    ) -> dict[Neighbour, Prediction | None]:
        """What `predict` gives beside each neighbour, in the order of what pictures resumed from
        them are predicted to be worth, on average over the variants that skip; 0 for one whose
        latents are not stored. The nearest, which is given first, comes first unless another one is
        better by more than `BETTER`."""
        if self._predictor is None or not neighbours:
            return dict.fromkeys(neighbours)
        near = np.stack([one.vector for one in neighbours])
        mean, low = self._predictor.predict_all(np.repeat(vector[None], len(near), axis=0), near)
        mean, low = mean[:, self._order], low[:, self._order]
        stored = np.array([[k > 0 and k in one.skips for k in self._skips] for one in neighbours])
        worth = np.where(stored, mean, 0.0).sum(axis=1)
        worth[0] += BETTER * stored[0].sum()
        order = np.argsort(-worth, kind="stable")
        return {neighbours[i]: Prediction(mean[i], low[i]) for i in order}
