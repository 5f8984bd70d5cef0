from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from argus.cache.cache import Neighbour
from argus.control.variants import DeviceType, variant_table
from argus.families.catalog import find_family
from argus.quality.predictor import Predictor
from argus.server.predictions import Predictions
from tests.conftest import WIDTH, constant_predictor


def losing(variants: Sequence[str], at_most: float = 0.9) -> Predictor:
    """A picture that skips loses what its neighbour has more of the first number of its vector."""
    skips = [name.startswith("skip") for name in variants]
    predictor = constant_predictor("", dict.fromkeys(variants, at_most))
    w = dict(predictor.weights)
    w["w1"][0, WIDTH, 0] = w["w2"][0, 0, 0] = 1.0
    w["w3"][0, 0, skips] = -1.0
    return Predictor(variants, skips, "", w)


@pytest.fixture
def predictions(measured_family: Path) -> Predictions:
    table = variant_table(find_family(str(measured_family)), [DeviceType("cpu")])
    return Predictions(losing(table.variants), table)


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
    ordered = predictions.predict_best_first(vector, [nearest, best, empty])
    assert list(ordered) == [best, nearest, empty]
    predictions.predictor = None
    assert list(predictions.predict_best_first(vector, [nearest, best])) == [nearest, best]


def test_what_the_best_is_chosen_by_is_the_prediction_beside_it(predictions: Predictions) -> None:
    vector = np.zeros(WIDTH, np.float32)
    neighbours = [neighbour(1, 0.5), neighbour(2, 0.1), neighbour(3, 0.0, ())]
    found = predictions.predict_best_first(vector, neighbours)
    assert list(found) == [neighbours[1], neighbours[0], neighbours[2]]
    for one, prediction in found.items():
        alone = predictions.predict(vector, one)
        assert alone is not None and prediction is not None
        np.testing.assert_allclose(prediction.mean, alone.mean, atol=1e-6)
        np.testing.assert_allclose(prediction.low, alone.low, atol=1e-6)
    assert predictions.predict_best_first(vector, []) == {}
    predictions.predictor = None
    assert predictions.predict_best_first(vector, neighbours) == dict.fromkeys(neighbours)
