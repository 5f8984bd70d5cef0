from __future__ import annotations

import numpy as np
import pytest

from argus.quality.predictor import Numbers, Predictor, hats, similarities

D, KNOTS = 6, np.array([0.5, 0.9, 1.0], np.float32)


@pytest.fixture
def predictor() -> Predictor:
    """Two random networks of four variants, of which two skip."""
    rng = np.random.default_rng(0)
    shapes = {
        "w1": (2, 2 * D + len(KNOTS), 5), "b1": (2, 5), "w2": (2, 5, 5), "b2": (2, 5),
        "w3": (2, 5, 4), "b3": (2, 4), "usual": (4,),
    }  # fmt: skip
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights |= {
        "knots": KNOTS, "trust": np.ones(4, np.float32), "widening": np.full(4, 0.1, np.float32)
    }  # fmt: skip
    return Predictor(
        ["exact", "skip", "skip-more", "quick"], [False, True, True, False], "", weights
    )


def vectors(n: int, seed: int) -> Numbers:
    found: Numbers = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return found


def test_hats_interpolate_between_knots_and_hold_the_last_ones_beyond() -> None:
    at = np.array([0.1, 0.5, 0.6, 0.9, 0.95, 1.0, 1.2, np.nan], np.float32)
    heights = np.array([3.0, -1.0, 7.0])
    np.testing.assert_allclose(hats(KNOTS, at) @ heights, np.interp(at, KNOTS, heights), atol=1e-5)


def test_one_knot_has_all_the_weight() -> None:
    at = np.array([0.1, 2.0, np.nan], np.float32)
    np.testing.assert_array_equal(hats(np.zeros(1, np.float32), at), [[1], [1], [np.nan]])


def test_similarities_are_cosines() -> None:
    one = np.array([[3, 4], [0, 2], [0, 0], [1, 1]], np.float32)
    other = np.array([[4, 3], [0, -1], [1, 0], [np.nan, np.nan]], np.float32)
    np.testing.assert_allclose(similarities(one, other), [0.96, -1, 0, np.nan], atol=1e-6)


def test_several_prompts_are_predicted_as_each_alone(predictor: Predictor) -> None:
    prompts, near = vectors(5, seed=1), vectors(5, seed=2)
    near[3] = np.nan
    mean, low = predictor.predict_all(prompts, near)
    for i, vector in enumerate(prompts):
        alone = predictor.predict(vector, None if i == 3 else near[i])
        np.testing.assert_allclose(mean[i], alone.mean, atol=1e-5)
        np.testing.assert_allclose(low[i], alone.low, atol=1e-5)


def test_a_neighbour_matters_to_what_skips_alone(predictor: Predictor) -> None:
    prompts = vectors(5, seed=1)
    mean, _ = predictor.predict_all(prompts)
    beside, _ = predictor.predict_all(prompts, vectors(5, seed=2))
    other, _ = predictor.predict_all(prompts, vectors(5, seed=3))
    skips = np.array(predictor.skips)
    assert np.isnan(mean[:, skips]).all() and (beside[:, skips] != other[:, skips]).any()
    for one in (beside, other):
        np.testing.assert_allclose(one[:, ~skips], mean[:, ~skips], atol=1e-5)
