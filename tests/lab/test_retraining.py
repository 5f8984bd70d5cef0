"""The theme shifts: predictions go wrong, that is noticed, and a new predictor mends it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from argus.core.errors import BadRequest
from argus.core.family import Family, Sizes, Variant
from argus.lab import training
from argus.lab.retraining import is_held_out, retrain
from argus.lab.training import Examples
from argus.quality.drift import Drift
from argus.quality.encoder import Embedding
from argus.quality.predictor import Predictor

WIDTH, COSTS, PRICE = 12, np.array([1.0, 0.4]), 0.6
FAMILY = Family(
    name="two",
    description="",
    models={"large": "owner/large", "small": "owner/small"},
    exact=Variant("large", "ddim", 64, 64, 50, 7.5),
    skips={},
    sizes=Sizes(((64, 64),)),
    cheaper={"small": Variant("small", "ddim", 64, 64, 50, 7.5)},
)


class Encoder:
    """A prompt is "theme number"; its vector points where its theme does, more or less."""

    def embed(self, prompt: str) -> Embedding:
        theme, number = prompt.split()
        vector = 0.3 * np.random.default_rng(int(number)).standard_normal(WIDTH)
        vector[0 if theme == "old" else 1] += 1.5
        return Embedding((vector / np.linalg.norm(vector)).astype(np.float32), False)


def truth(prompt: str) -> float:
    """The small model knows the old theme."""
    noise = 0.1 * np.random.default_rng(hash(prompt) % 2**32).standard_normal()
    return (1.0 if prompt.startswith("old") else 0.3) + float(noise)


def vectors_of(prompts: list[str]) -> NDArray[np.float32]:
    return np.stack([Encoder().embed(prompt).vector for prompt in prompts])


@pytest.fixture(scope="module")
def table() -> Examples:
    prompts = [f"old {n}" for n in range(300)]
    small = np.array([truth(prompt) for prompt in prompts])
    quality = np.stack([np.ones(300), small], axis=1)[:, :, None]
    near = np.full((300, WIDTH), np.nan, np.float32)
    return Examples(
        tuple(prompts), ("exact", "small"), (False, False), vectors_of(prompts), near, quality
    )


@pytest.fixture(scope="module")
def old(table: Examples) -> Predictor:
    return training.train(table, "two").predictor


def samples_of(prompts: list[str], predictor: Predictor) -> pd.DataFrame:
    """What a server measures that made all of them with the small model."""
    mean, low = predictor.predict_all(vectors_of(prompts))
    return pd.DataFrame(
        {
            "prompt": prompts,
            "variant": "small",
            "near": None,
            "quality": [truth(prompt) for prompt in prompts],
            "predicted": mean[:, 1],
            "low": low[:, 1],
        }
    )


def served_quality(predictor: Predictor, prompts: list[str]) -> float:
    """The mean quality of what is worth most at a price."""
    mean, _ = predictor.predict_all(vectors_of(prompts))
    chosen = (mean - PRICE * COSTS).argmax(axis=1)
    return float(np.mean([truth(p) if v else 1.0 for p, v in zip(prompts, chosen, strict=True)]))


def test_when_the_theme_shifts_quality_recovers(table: Examples, old: Predictor) -> None:
    later = [f"new {n}" for n in range(1000, 1200)]
    assert served_quality(old, later) < 0.4  # it takes the new theme for the old one
    seen = samples_of([f"new {n}" for n in range(90)], old)
    drift = Drift(old.weights["centre"], old.weights["spread"])
    for error in seen["quality"] - seen["predicted"]:
        drift.saw_error(float(error))
    for vector in vectors_of([f"new {n}" for n in range(300)]):
        drift.saw_prompt(vector)
    assert drift.errors
    assert drift.prompts
    found = retrain(seen, FAMILY, Encoder(), old, table)  # type: ignore[arg-type]
    assert found.better
    assert 20 <= found.judged_on <= 40  # about a third
    assert found.new_error < 0.5 * found.old_error
    assert served_quality(found.predictor, later) > 0.9
    before = [f"old {n}" for n in range(2000, 2100)]
    assert served_quality(found.predictor, before) > 0.9  # nor is the old theme forgotten


def test_nothing_new_makes_no_better_predictor_by_much(table: Examples, old: Predictor) -> None:
    seen = samples_of([f"old {n}" for n in range(500, 620)], old)
    found = retrain(seen, FAMILY, Encoder(), old, table)  # type: ignore[arg-type]
    assert found.new_error == pytest.approx(found.old_error, rel=0.2)


def test_samples_that_were_pruned_do_not_change_which_ones_judge(
    table: Examples, old: Predictor
) -> None:
    """Else the old predictor would be judged by samples that it was trained on."""
    seen = samples_of([f"old {n}" for n in range(120)], old)
    whole = retrain(seen, FAMILY, Encoder(), old, table, epochs=1)  # type: ignore[arg-type]
    pruned = retrain(seen[1:], FAMILY, Encoder(), old, table, epochs=1)  # type: ignore[arg-type]
    assert whole.judged_on - pruned.judged_on == is_held_out("old 0")


def test_samples_of_one_prompt_are_refused(table: Examples, old: Predictor) -> None:
    seen = samples_of(["old 1"] * 60, old)
    with pytest.raises(BadRequest, match="samples of more prompts are needed"):
        retrain(seen, FAMILY, Encoder(), old, table)  # type: ignore[arg-type]


def test_samples_of_resumed_pictures_teach_beside_which_neighbour(table: Examples) -> None:
    resumed = replace(FAMILY, skips={5: 0.9}, cheaper={})
    prompts = [f"old {n}" for n in range(300)]
    vectors = vectors_of(prompts)
    rng = np.random.default_rng(0)
    far = rng.random(300) < 0.5
    near = np.where(far[:, None], vectors_of([f"new {n}" for n in range(300)]), vectors)
    quality = np.stack([np.ones(300), np.where(far, 0.2, 1.0)], axis=1)[:, :, None]
    known = Examples(
        tuple(prompts), ("exact", "skip-5"), (False, True), vectors,
        near.astype(np.float32), quality,
    )  # fmt: skip
    old = training.train(known, "two").predictor
    seen = pd.DataFrame(
        {
            "prompt": [f"old {n}" for n in range(1000, 1200)],
            "variant": "skip-5",
            "near": [vectors[n].astype(np.float16).tobytes() for n in range(200)],
            "quality": 0.5,  # what was as good as exact no longer is
        }
    )
    found = retrain(seen, resumed, Encoder(), old, known)  # type: ignore[arg-type]
    assert found.better
    assert found.new_error < 0.7 * found.old_error
    with pytest.raises(BadRequest, match="There are 0 samples"):  # of before they said so
        retrain(seen.assign(near=None), resumed, Encoder(), old, known)  # type: ignore[arg-type]


def test_few_samples_are_refused(table: Examples, old: Predictor) -> None:
    seen = samples_of([f"old {n}" for n in range(10)], old)
    with pytest.raises(BadRequest, match="There are 10 samples; training needs 40"):
        retrain(seen, FAMILY, Encoder(), old, table)  # type: ignore[arg-type]
