from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from argus.cache.cache import Neighbour
from argus.config import Settings
from argus.quality.encoder import Embedding
from argus.server.model import ServedFamily
from argus.server.predictions import Predictions
from argus.server.preparation import OTHERS, Preparation
from argus.server.request import ImageRequest
from argus.server.slo import Classes
from tests.conftest import WIDTH
from tests.server.test_predictions import losing, neighbour

SKIP = 1  # the first variant that skips


class Found:
    """In place of `Retrieval`: always finds the same neighbours, and may do something meanwhile."""

    def __init__(self, *neighbours: Neighbour, meanwhile: Callable[[], None] | None = None) -> None:
        self._neighbours, self._meanwhile = neighbours, meanwhile

    async def find(
        self, scope: object, vector: object, count: int, limit_s: float
    ) -> Sequence[Neighbour]:
        if self._meanwhile is not None:
            self._meanwhile()
        return self._neighbours[:count]


@pytest.fixture
def model(measured_family: Path, tmp_path: Path) -> ServedFamily:
    return ServedFamily.of(Settings(family=str(measured_family), data=tmp_path, workers=1))


@pytest.fixture
def predictions(model: ServedFamily) -> Predictions:
    return Predictions(losing(model.table.variants), model.table)


def prepared(
    model: ServedFamily, predictions: Predictions, retrieval: Found, count: int, informed: bool
) -> list[ImageRequest]:
    """The pictures of a request, whose embedding is 0."""

    def embed_all(prompts: Sequence[str]) -> list[Embedding]:
        return [Embedding(np.zeros(WIDTH, np.float32), False) for _ in prompts]

    async def prepare() -> list[ImageRequest]:
        encoder: Future[Any] = Future()
        encoder.set_result(SimpleNamespace(embed_all=embed_all))
        router: Future[Any] = Future()
        router.set_result(SimpleNamespace(informed=informed, classes=Classes({}, 0.1, True)))
        preparation = Preparation(model, encoder, router, retrieval, predictions)  # type: ignore[arg-type]
        try:
            return await preparation.prepare(request)
        finally:
            preparation.close()

    request = ImageRequest(
        prompt="a red fish", count=count, width=32, height=32, size=(32, 32), guidance=3.0,
        namespace="everyone",
    )  # fmt: skip
    return asyncio.run(prepare())


def qualities(pictures: list[ImageRequest]) -> list[float]:
    """Of each picture, if it skips."""
    return [
        float("nan") if one.prediction is None else float(one.prediction.mean[SKIP])
        for one in pictures
    ]


NEAREST, BETTER, BEST = neighbour(1, 0.5), neighbour(2, 0.2), neighbour(3, 0.1)


def test_with_an_informed_policy_pictures_get_the_best_neighbours_and_their_predictions(
    model: ServedFamily, predictions: Predictions
) -> None:
    pictures = prepared(model, predictions, Found(NEAREST, BETTER, BEST), 2, informed=True)
    assert [one.neighbour for one in pictures] == [BEST, BETTER]
    assert qualities(pictures) == pytest.approx([0.8, 0.7])
    assert all({"search", "predict", "fetch"} <= set(one.decision_ms) for one in pictures)


def test_without_one_they_get_the_nearest_neighbours(
    model: ServedFamily, predictions: Predictions
) -> None:
    pictures = prepared(model, predictions, Found(NEAREST, BETTER, BEST), 2, informed=False)
    assert [one.neighbour for one in pictures] == [NEAREST, BETTER]
    assert qualities(pictures) == pytest.approx([0.4, 0.7])


@pytest.mark.parametrize("informed", [True, False])
def test_a_picture_without_a_neighbour_has_a_prediction_too(
    model: ServedFamily, predictions: Predictions, informed: bool
) -> None:
    pictures = prepared(model, predictions, Found(NEAREST), 2, informed)
    assert [one.neighbour for one in pictures] == [NEAREST, None]
    assert qualities(pictures) == pytest.approx([0.4, float("nan")], nan_ok=True)


@pytest.mark.parametrize("informed", [True, False])
def test_predictions_are_of_the_predictor_that_their_number_names(
    model: ServedFamily, predictions: Predictions, informed: bool
) -> None:
    def replace() -> None:
        predictions.predictor = losing(model.table.variants, at_most=0.7)

    found = Found(*[NEAREST] * OTHERS, meanwhile=replace)
    (picture,) = prepared(model, predictions, found, 1, informed)
    assert (picture.predictor, predictions.number) == (2, 2)
    assert qualities([picture]) == pytest.approx([0.2])
