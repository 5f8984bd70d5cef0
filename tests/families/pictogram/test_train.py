"""Training runs, stops, goes on, and leaves a folder that works. Tiny runs; nothing is learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from typer.testing import CliRunner

from argus.families.pictogram import BASE
from argus.families.pictogram.networks import LATENT_CHANNELS, new_scheduler, new_unet
from argus.families.pictogram.train.__main__ import app
from argus.families.pictogram.train.components import PATCH, Components, find_components
from argus.families.pictogram.train.drawing import pictures, training_scenes
from argus.families.pictogram.train.lessons import cells_of_things
from argus.families.pictogram.train.losses import Denoising, Leaps, Teacher
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


@pytest.mark.slow
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


@pytest.mark.parametrize(("model", "steps"), [("small", 12), ("tiny", 12), ("turbo", 4)])
def test_the_shipped_base_teaches_the_other_models(model: str, steps: int, tmp_path: Path) -> None:
    train(tmp_path, "--model", model, "--steps", "1", "--closeups", "0", "--sheet-every", "0")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    picture = pipeline("a red house", num_inference_steps=steps, guidance_scale=1.0)
    assert picture.images[0].size == (64, 64)
    configs = [path.read_text() for path in (tmp_path / "weights").rglob("*.json")]
    assert not [text for text in configs if str(BASE.parent) in text]


def test_going_on_keeps_to_the_noise_schedule_of_the_training(tmp_path: Path) -> None:
    more = ("--vae-steps", "0", "--reader-steps", "0", "--sheet-every", "0")
    train(tmp_path, "--go-on", "--steps", "1", "--closeups", "0", *more)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, new_scheduler().alphas_cumprod)
    configs = [path.read_text() for path in (tmp_path / "weights").rglob("*.json")]
    assert not [text for text in configs if str(BASE.parent) in text]


class Pointer(torch.nn.Module):
    """A perfect model of a world with one picture: whatever it is shown, that is what it sees."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self._picture = picture

    def forward(self, noisy: Tensor, times: Tensor, states: Tensor) -> UNet2DConditionOutput:
        alpha = new_scheduler().alphas_cumprod[times][:, None, None, None]
        velocity = (alpha.sqrt() * noisy - self._picture) / (1 - alpha).sqrt()
        return UNet2DConditionOutput(sample=velocity)


def test_a_leap_is_to_end_where_the_steps_of_the_teacher_do() -> None:
    picture, nothing = torch.randn(32, 8, 8), torch.zeros(1, 40, 128)
    teacher = Teacher(Pointer(picture), nothing, guidance=4.0)
    loss = Leaps(new_scheduler().alphas_cumprod, teacher)
    example = torch.randn(500, 32, 8, 8), torch.zeros(500, 8, 8), torch.zeros(500, 40, 128)
    assert loss(Pointer(picture), *example) < 1e-4
    assert loss(Pointer(0.5 * picture), *example) > 1e-3


def test_a_pupil_that_guesses_as_its_teacher_has_nothing_to_learn() -> None:
    teacher, pupil = new_unet("tiny"), new_unet("tiny")
    alphas, nothing = new_scheduler().alphas_cumprod, torch.randn(1, 40, 128)
    loss = Denoising(alphas, Teacher(teacher, nothing, guidance=1.0))
    example = (
        torch.randn(4, 32, 8, 8),
        torch.zeros(4, 8, 8, dtype=torch.bool),
        torch.randn(4, 40, 128),
    )
    assert loss(pupil, *example) > 0
    pupil.load_state_dict(teacher.state_dict())
    assert loss(pupil, *example) < 1e-9
    assert Denoising(alphas, Teacher(teacher, nothing, guidance=2.5))(pupil, *example) > 0


def test_turbo_begins_as_a_copy_of_base(tmp_path: Path) -> None:
    train(tmp_path, "--model", "turbo", "--steps", "0", "--sheet-every", "0")
    base, turbo = (
        StableDiffusionPipeline.from_pretrained(folder).unet.state_dict()
        for folder in (BASE, tmp_path / "weights")
    )
    assert all(torch.equal(base[name], value) for name, value in turbo.items())


def test_latents_are_linear_in_the_picture_and_nearly_hold_it() -> None:
    components = find_components(scenes=40)
    both = pictures(training_scenes(0, 2))
    one, other = both[:1], both[1:]
    mixed = components.encode(0.3 * one + 0.7 * other)
    expected = 0.3 * components.encode(one) + 0.7 * components.encode(other)
    assert torch.allclose(mixed, expected, atol=1e-4)
    drawn = pictures(training_scenes(1, 40))
    latents = components.encode(drawn)
    assert latents.shape == (40, LATENT_CHANNELS, 8, 8)
    assert 0.8 < latents.square().mean() < 1.2
    back = torch.einsum(
        "nchw,pc->nphw", latents / components.scale.view(-1, 1, 1), components.basis
    )
    back = F.pixel_shuffle(back + components.mean.view(-1, 1, 1), PATCH)
    assert (back - drawn).square().mean() < 0.02


def test_components_are_kept_and_are_the_same_every_time(tmp_path: Path) -> None:
    components = find_components(count=4, scenes=20)
    components.save(tmp_path / "components.safetensors")
    kept = Components.load(tmp_path / "components.safetensors")
    again = find_components(count=4, scenes=20)
    for name, value in vars(components).items():
        assert torch.equal(getattr(kept, name), value)
        assert torch.allclose(getattr(again, name), value, atol=1e-3)


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
