"""The judge's network, as shipped: what it finds in pictures that code drew."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from argus.families.pictogram.captions import caption
from argus.families.pictogram.draw import draw_scene
from argus.families.pictogram.ideas import changed
from argus.families.pictogram.scene.scorer import SceneScorer
from argus.families.pictogram.world import Group, Scene, sample_scene

COUNT = 120


@pytest.fixture(scope="module")
def scorer() -> SceneScorer:
    return SceneScorer.load()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("judged")
    return [sample_scene(rng) for _ in range(COUNT)]


def words(scene: Scene, seed: int = 0) -> str:
    return caption(scene, random.Random(seed))


def test_rendered_scenes_score_nearly_1(scorer: SceneScorer, scenes: list[Scene]) -> None:
    scores = scorer.scores([words(s) for s in scenes], [draw_scene(s) for s in scenes])
    assert scores["right"].mean() > 0.93
    assert scores["parts"].mean() > 0.99


@pytest.mark.parametrize("change", ["kind", "colour", "fill", "size", "background"])
def test_one_changed_look_costs_its_atom(scorer: SceneScorer, change: str) -> None:
    """A prompt that names everything, and a picture with one look changed."""
    rng = random.Random(change)
    asked = Scene("sea", 0, (Group("boat", "red", "striped", "large", ((32, 32),)),))
    prompt = "a large striped red boat at sea"
    drawn = [draw_scene(changed(rng, asked, change)) for _ in range(12)]
    assert scorer.score([prompt], [draw_scene(asked)])[0] == 1
    judged = scorer.judge([prompt] * len(drawn), drawn)
    failed = [[atom.part for atom in atoms if not atom.satisfied] for atoms in judged]
    assert np.mean([change in parts for parts in failed]) > 0.9
    assert scorer.score([prompt] * len(drawn), drawn).max() < 1


def test_unrelated_and_random_pictures_score_nearly_nothing(
    scorer: SceneScorer, scenes: list[Scene]
) -> None:
    prompts, drawn = [words(scene) for scene in scenes], [draw_scene(scene) for scene in scenes]
    assert scorer.score([*prompts[7:], *prompts[:7]], drawn).mean() < 0.15
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 64, 64, 3), np.uint8)
    assert scorer.score(prompts, [Image.fromarray(one) for one in noise]).mean() < 0.15
    empty = [draw_scene(replace(scene, groups=(), relation=None)) for scene in scenes]
    assert scorer.score(prompts, empty).mean() < 0.02
