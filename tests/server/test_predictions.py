from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argus.cache.cache import Neighbour
from argus.control.variants import DeviceType, variant_table
from argus.families.catalog import find_family
from argus.quality.predictor import Predictor
from argus.server.predictions import Predictions
from tests.conftest import WIDTH, constant_predictor


@pytest.fixture
def predictions(measured_family: Path) -> Predictions:
    """A picture that skips loses what its neighbour has more of the first number of its vector."""
    table = variant_table(find_family(str(measured_family)), [DeviceType("cpu")])
    skips = [name.startswith("skip") for name in table.variants]
    predictor = constant_predictor("", dict.fromkeys(table.variants, 0.9))
    w = dict(predictor.weights)
    w["w1"][0, WIDTH, 0] = w["w2"][0, 0, 0] = 1.0
    w["w3"][0, 0, skips] = -1.0
    return Predictions(Predictor(table.variants, skips, "", w), table)


def neighbour(entry: int, differs: float, skips: tuple[int, ...] = (2, 5)) -> Neighbour:
    vector = np.zeros(WIDTH, np.float32)
    vector[0] = differs
    return Neighbour(entry, f"prompt {entry}", 0.9, skips, vector)


def test_what_skips_is_predicted_from_the_neighbour_s_prompt_too(predictions: Predictions) -> None:
    vector = np.zeros(WIDTH, np.float32)
    far, near, none = (
        predictions.predict(vector, one) for one in (neighbour(1, 0.5), neighbour(2, 0.1), None)
    )
    assert far is not None and near is not None and none is not None
    skips = np.isnan(none.mean)
    assert skips.any() and not skips.all()
    np.testing.assert_allclose(near.mean[skips], 0.8, atol=1e-6)
    np.testing.assert_allclose(far.mean[skips], 0.4, atol=1e-6)
    np.testing.assert_array_equal(near.mean[~skips], none.mean[~skips])


def test_the_neighbour_from_which_pictures_are_worth_most_comes_first(
    predictions: Predictions,
) -> None:
    vector = np.zeros(WIDTH, np.float32)
    nearest, best, empty = neighbour(1, 0.5), neighbour(2, 0.1), neighbour(3, 0.0, ())
    assert predictions.best_first(vector, [nearest, best, empty]) == [best, nearest, empty]
    predictions.predictor = None
    assert predictions.best_first(vector, [nearest, best]) == [nearest, best]
