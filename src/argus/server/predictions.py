"""The predictor in force, with its variants in the table's order; it may be replaced at any
time."""

from __future__ import annotations

import numpy as np

from argus.cache.index import Vector
from argus.control.variants import VariantTable
from argus.quality.predictor import Prediction, Predictor


class Predictions:
    """Predicts nothing without a predictor. `number` counts the predictors so far, and identifies
    the one that made a prediction."""

    def __init__(self, predictor: Predictor | None, table: VariantTable) -> None:
        self._variants = table.variants
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

    def predict(self, vector: Vector, similarity: float | None) -> Prediction | None:
        """The prediction for every variant of the table (v,)."""
        if self._predictor is None:
            return None
        found = self._predictor.predict(vector, similarity)
        return Prediction(found.mean[self._order], found.low[self._order])
