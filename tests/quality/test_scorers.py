from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from argus.core.errors import ModelError
from argus.core.family import ScorerSpec
from argus.quality.scorer import Scores, all_scores, quality, raw_ratio, unrelated_score
from argus.quality.scorers import load_scorer

PROMPTS = ["a red house", "a blue fish at sea", "a much longer prompt than the model reads " * 3]


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


IMAGES = [noise(0), noise(1, (64, 64)), noise(2).convert("L")]


class Redness:
    """A scorer of one's own: how much red a picture holds."""

    @classmethod
    def load(cls, source: str | None, device: str) -> Redness:
        return cls()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
        return np.array([np.asarray(im.convert("RGB"))[..., 0].mean() for im in images], np.float32)


class RedAndBright(Redness):
    """A scorer that values pictures in two ways."""

    def scores(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Scores]:
        red = self.score(prompts, images)
        return {"red enough": (red > 120).astype(np.float32), "red": red}

    @classmethod
    def load(cls, source: str | None, device: str) -> RedAndBright:
        return cls()


def test_a_family_chooses_among_the_scores_of_its_scorer() -> None:
    kind = f"{__name__}:RedAndBright"
    plain = load_scorer(ScorerSpec(kind))
    assert list(all_scores(plain, PROMPTS, IMAGES)) == ["red enough", "red"]
    chosen = load_scorer(ScorerSpec(kind, score="red"))
    assert list(all_scores(chosen, PROMPTS, IMAGES)) == ["red", "red enough"]
    np.testing.assert_array_equal(chosen.score(PROMPTS, IMAGES), Redness().score(PROMPTS, IMAGES))
    with pytest.raises(ModelError, match="no score 'green', but red enough, red"):
        load_scorer(ScorerSpec(kind, score="green")).score(PROMPTS, IMAGES)
    with pytest.raises(ModelError, match="one score only"):
        load_scorer(ScorerSpec(f"{__name__}:Redness", score="red"))
    assert list(all_scores(Redness(), PROMPTS, IMAGES)) == ["score"]


def test_clip_scores_are_cosines_of_the_model_s_own_features(tiny_clip: Path) -> None:
    scores = load_scorer(ScorerSpec("clip", str(tiny_clip))).score(PROMPTS, IMAGES)
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    inputs = CLIPProcessor.from_pretrained(tiny_clip)(
        text=PROMPTS, images=[im.convert("RGB") for im in IMAGES],
        padding=True, truncation=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        out = model(**inputs)
    cosines = (out.text_embeds * out.image_embeds).sum(1)
    np.testing.assert_allclose(scores, 100 * cosines.clamp(min=0), atol=1e-3)
    pick = load_scorer(ScorerSpec("pickscore", str(tiny_clip))).score(PROMPTS, IMAGES)
    np.testing.assert_allclose(pick, out.logits_per_text.diagonal(), atol=1e-3)


def test_a_score_does_not_depend_on_its_batch(tiny_clip: Path) -> None:
    scorer = load_scorer(ScorerSpec("pickscore", str(tiny_clip)))
    alone = [scorer.score([p], [im])[0] for p, im in zip(PROMPTS, IMAGES, strict=True)]
    np.testing.assert_allclose(scorer.score(PROMPTS, IMAGES), alone, atol=1e-4)


def test_a_scorer_of_one_s_own_is_imported() -> None:
    scorer = load_scorer(ScorerSpec(f"{__name__}:Redness"))
    assert scorer.score(PROMPTS[:1], [Image.new("RGB", (8, 8), (200, 0, 0))]) == [200]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ScorerSpec("clip"), "needs a source"),
        (ScorerSpec("clip", "/nowhere"), "cannot be loaded"),
        (ScorerSpec("no.such.module:Scorer"), "cannot be imported"),
        (ScorerSpec(f"{__name__}:Blueness"), "cannot be imported"),
    ],
)
def test_a_scorer_that_is_not_there_is_named(spec: ScorerSpec, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_scorer(spec)


def test_quality_is_1_for_the_exact_picture_and_0_for_an_unrelated_one() -> None:
    exact = np.array([0.8, 0.5, 0.1], np.float32)
    score = np.array([0.8, 0.1, 0.9], np.float32)
    np.testing.assert_allclose(quality(score, exact, 0.1), [1.0, 0.0, np.nan])
    np.testing.assert_allclose(raw_ratio(score, exact), [1.0, 0.2, 9.0], rtol=1e-6)


def test_the_unrelated_score_gives_every_picture_another_prompt() -> None:
    class Same:
        def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
            return np.array(
                [p == im.info["prompt"] for p, im in zip(prompts, images, strict=True)], np.float32
            )

    images = [noise(i) for i in range(5)]
    prompts = [f"prompt {i}" for i in range(5)]
    for image, prompt in zip(images, prompts, strict=True):
        image.info["prompt"] = prompt
    assert np.mean(Same().score(prompts, images)) == 1
    assert unrelated_score(Same(), prompts, images) == 0
    with pytest.raises(ValueError, match="two"):
        unrelated_score(Same(), prompts[:1], images[:1])
