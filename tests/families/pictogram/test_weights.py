"""The shipped weights: an ordinary folder that makes pictures of what prompts say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import argus
from argus.core.job import Job
from argus.engine.engine import Engine
from argus.engine.samplers import SAMPLERS
from argus.families.catalog import default_family
from argus.families.pictogram import BASE


@pytest.fixture(scope="module")
def studio() -> argus.Studio:
    return argus.load(default_family().name, device="cpu")


def test_the_folder_is_small_and_safe() -> None:
    files = [path for path in BASE.parent.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 30e6
    own = [path for path in files if not path.is_symlink()]  # what models share is there once
    assert sum(path.stat().st_size for path in own) <= 80e6
    contents = Counter(path.read_bytes() for path in own if path.suffix == ".safetensors")
    assert max(contents.values()) == 1
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_stock_diffusers_makes_the_same_picture(studio: argus.Studio) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    pipeline.set_progress_bar_config(disable=True)
    prompt, exact = "a red house in the snow", studio.settings
    expected = pipeline(
        prompt,
        num_inference_steps=exact.steps,
        guidance_scale=exact.guidance,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    ours = studio.generate(prompt, seed=1).image
    assert np.abs(np.asarray(ours, int) - np.asarray(expected, int)).max() <= 1  # as it rounds


def test_words_it_never_saw_still_give_a_picture(studio: argus.Studio) -> None:
    picture = studio.generate("Zebras 🦓 spielen Geige", seed=1, steps=4)
    assert len(picture.image.getcolors(10_000) or []) > 100


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_can_walk_the_noise_schedule(sampler: str) -> None:
    engine = Engine.load(str(BASE), sampler=sampler)
    result = engine.run(Job("a red house in the snow", steps=8, guidance=2.0))
    assert result.final.isfinite().all()
    assert 0.3 < result.final.std() < 3.0  # latents of pictures have deviation 1
