"""Training runs, stops, goes on, and leaves a folder that works. Tiny runs; nothing is learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from argus.families.pictogram.networks import LATENT_CHANNELS, new_vae
from argus.families.pictogram.train.__main__ import app
from argus.families.pictogram.train.autoencoder import pictures, standardise, training_scenes
from argus.families.pictogram.train.painter import cells_of_things
from argus.families.pictogram.train.reading import GROUPS, facts_of


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def train(work: Path, *options: str) -> str:
    settings = [
        "--vae-steps",
        "2",
        "--reader-steps",
        "2",
        "--scenes",
        "8",
        *options,
    ]
    result = CliRunner().invoke(app, ["--work", str(work), *settings])
    assert result.exit_code == 0, result.output
    return result.output


def test_training_leaves_a_pipeline_and_goes_on_where_it_stopped(work: Path) -> None:
    first = train(work, "--steps", "2", "--sheet-every", "0")
    assert "vae: 2/2" in first
    assert "reader: 2/2" in first
    second = train(work, "--steps", "3")
    assert "vae" not in second
    assert "resuming at step 2 of 3" in second
    pipeline = StableDiffusionPipeline.from_pretrained(work / "weights")
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    assert (work / "sheet_000003.png").exists()
    configs = list((work / "weights").rglob("*.json"))
    assert not [path for path in configs if str(work) in path.read_text()]


@torch.no_grad()
def test_standardising_changes_latents_and_not_pictures() -> None:
    torch.manual_seed(0)
    vae = new_vae()
    batch = pictures(training_scenes(0, 32))
    before = vae.decode(vae.encode(batch).latent_dist.mean).sample
    standardise(vae, batch)
    latents = vae.encode(batch).latent_dist.mean
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(LATENT_CHANNELS), atol=1e-3)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(LATENT_CHANNELS), atol=1e-3)
    assert torch.allclose(vae.decode(latents).sample, before, atol=1e-3)


def test_the_cells_of_things_are_where_they_are_drawn() -> None:
    for scene in training_scenes(0, 50):
        empty = replace(scene, groups=())
        drawn = (pictures([scene]) - pictures([empty])).abs().amax(1)[0] > 0.1
        touched = drawn.reshape(8, 8, 8, 8).any(3).any(1)
        cells = cells_of_things(scene)
        assert not (touched & ~cells).any()
        assert cells.sum() <= 25 * scene.things  # what the largest can touch


def test_the_facts_of_a_scene_have_one_shape() -> None:
    facts = [facts_of(scene) for scene in training_scenes(0, 100)]
    assert {len(row) for row in facts} == {5 * GROUPS + 2}
