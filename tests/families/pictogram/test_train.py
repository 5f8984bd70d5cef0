"""Training runs, stops, goes on, and leaves a folder that works. Tiny runs; nothing is learnt."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from argus.families.pictogram import BASE
from argus.families.pictogram.networks import (
    LATENT_CHANNELS,
    new_scheduler,
    new_text_encoder,
    new_unet,
)
from argus.families.pictogram.scene.detector import STRIDE, Detector
from argus.families.pictogram.tokenizer import learn_tokenizer
from argus.families.pictogram.train.__main__ import app
from argus.families.pictogram.train.components import PATCH, Components, find_components
from argus.families.pictogram.train.detecting import NEAR_CELLS, detection_loss, targets_of
from argus.families.pictogram.train.drawing import pictures, training_scenes
from argus.families.pictogram.train.everything import app as everything
from argus.families.pictogram.train.growing import grow, grow_text_encoder
from argus.families.pictogram.train.halves import Halves
from argus.families.pictogram.train.lessons import cells_of_things
from argus.families.pictogram.train.losses import Chance, Denoising, Teacher
from argus.families.pictogram.train.painter import Average
from argus.families.pictogram.train.progress import Progress
from argus.families.pictogram.train.reading import GROUPS, NOTHING, cells_of, facts_of
from argus.families.pictogram.train.recorded import Averages, Training
from argus.families.pictogram.world import COLOURS, FILLS, KINDS, Group, Scene


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


def test_the_shipped_base_teaches_the_small_model(tmp_path: Path) -> None:
    train(tmp_path, "--model", "small", "--steps", "1", "--closeups", "0", "--sheet-every", "0")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    picture = pipeline("a red house", num_inference_steps=4, guidance_scale=1.0)
    assert picture.images[0].size == (64, 64)
    configs = [path.read_text() for path in (tmp_path / "weights").rglob("*.json")]
    assert not [text for text in configs if str(BASE.parent) in text]


def test_every_network_of_the_family_is_trained_in_turn(tmp_path: Path) -> None:
    """At the least size there is, from the shipped weights to a small model and a detector."""
    options = ["--share", "0.0001", "--device", "cpu", "--scenes", "40", "--sights", "40"]
    options += ["--batch", "8"]
    result = CliRunner().invoke(everything, ["--work", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    for stage in ("guided", "small"):
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / stage / "weights")
        picture = pipeline("a red house", num_inference_steps=2, guidance_scale=1.0)
        assert picture.images[0].size == (64, 64)
        assert pipeline.unet.config["in_channels"] == LATENT_CHANNELS
    saved = load_file(tmp_path / "detector" / "detector.safetensors")
    assert all(values.isfinite().all() for values in saved.values())
    again = CliRunner().invoke(everything, ["--work", str(tmp_path), *options])
    assert again.exit_code == 0, again.output
    assert "steps" not in again.output  # nothing was trained
    (tmp_path / "detector" / "done").unlink()
    rest = CliRunner().invoke(everything, ["--work", str(tmp_path), *options])
    assert "detector: " in rest.output
    assert "small: " not in rest.output


def test_a_training_leaves_the_average_of_its_last_steps() -> None:
    """Not of where it began: of a short training that would be a good part."""
    network = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(100.0)
    averages = Averages(network)
    with torch.no_grad():
        network.weight.fill_(1.0)
    averages.begin()
    averages.follow()
    with torch.no_grad():
        network.weight.fill_(3.0)
    averages.follow()
    averages.settle()
    assert 1.0 < network.weight.item() < 1.1


def test_a_training_whose_loss_is_no_number_says_so() -> None:
    network = torch.nn.Linear(1, 1)
    groups = [(list(network.parameters()), 1.0)]
    cpu = torch.device("cpu")
    training = Training(network, groups, lambda: network.weight.sum() * torch.nan, 1e-3, cpu)
    with pytest.raises(RuntimeError, match="after 1 steps the loss is nan"):
        training.run("any", 1.0, lambda: None)


def test_pictures_without_things_have_a_loss() -> None:
    """What is asked of things alone is then asked of nothing."""
    scenes = [replace(scene, groups=()) for scene in training_scenes(0, 2)]
    loss = detection_loss(Detector(), pictures(scenes), targets_of(scenes))
    assert loss.isfinite()


def test_targets_say_of_each_thing_what_it_is_near_its_centre() -> None:
    cup = Group("cup", "red", "striped", "small", ((8, 32), (40, 32)), "blue")
    targets = targets_of([Scene("sea", 0, (cup,)), Scene("sky", 0, ())])
    assert (targets.presence[0] == 1).sum() == 2
    assert (targets.presence[1] == 0).all()
    known = targets.facts[..., 0] != NOTHING
    assert known.sum(1).tolist() == [2 * NEAR_CELLS, 0]
    row, column, kind, colour, *_ = targets.facts[0, 0].tolist()
    assert (KINDS[kind], COLOURS[colour]) == ("cup", "red")
    x, y = targets.places[0, 0].tolist()
    assert (STRIDE * (column + x), STRIDE * (row + y)) == (8, 32)


def test_going_on_keeps_to_the_noise_schedule_of_the_training(tmp_path: Path) -> None:
    more = ("--vae-steps", "0", "--reader-steps", "0", "--sheet-every", "0")
    train(tmp_path, "--go-on", "--steps", "1", "--closeups", "0", *more)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, new_scheduler().alphas_cumprod)
    configs = [path.read_text() for path in (tmp_path / "weights").rglob("*.json")]
    assert not [text for text in configs if str(BASE.parent) in text]


def test_a_pupil_that_guesses_as_its_teacher_has_nothing_to_learn() -> None:
    teacher, pupil = new_unet("small"), new_unet("small")
    alphas, nothing = new_scheduler().alphas_cumprod, torch.randn(1, 40, 128)
    loss = Denoising(alphas, Teacher(teacher, nothing, guidance=1.0))
    latents = torch.randn(4, LATENT_CHANNELS, 8, 8)
    example = (
        latents,
        torch.ones(4, 8, 8),
        torch.randn(4, 40, 128),
        Chance.like(latents),
    )
    assert loss(pupil, *example) > 0
    pupil.load_state_dict(teacher.state_dict())
    assert loss(pupil, *example) < 1e-9
    assert Denoising(alphas, Teacher(teacher, nothing, guidance=2.5))(pupil, *example) > 0


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
    assert {len(row) for row in facts} == {6 * GROUPS + 2}


def test_the_cells_of_a_scene_say_what_they_show() -> None:
    cup = Group("cup", "red", "striped", "small", ((8, 32),), "blue")
    fish = Group("fish", "green", "plain", "large", ((48, 32),))
    kinds, colours, fills, seconds = cells_of(Scene("sea", 0, (cup, fish))).view(4, 8, 8)
    assert {KINDS[k] for k in kinds[3:5, 0:2].flatten()} == {"cup"}
    assert {KINDS[k] for k in kinds[3:5, 5:7].flatten()} == {"fish"}
    assert (kinds == len(KINDS)).sum() == 64 - 4 - 16
    assert COLOURS[colours[3, 0]] == "red"
    assert FILLS[fills[3, 0]] == "striped"
    assert COLOURS[seconds[3, 0]] == "blue"
    assert seconds[3, 5] == len(COLOURS)
    assert (colours[kinds == len(KINDS)] == NOTHING).all()


def test_gradients_of_parts_are_those_of_the_whole() -> None:
    """Also laid out as the weights are, which fused optimisers take for granted."""
    unet = new_unet("small").to(memory_format=torch.channels_last)
    latents = torch.randn(4, LATENT_CHANNELS, 8, 8)
    inputs = (
        latents,
        torch.ones(4, 8, 8),
        torch.randn(4, 40, 128),
    )
    loss_of = Denoising(new_scheduler().alphas_cumprod)
    chance = Chance.like(latents)
    whole = loss_of(unet, *inputs, chance)
    whole.backward()  # type: ignore[no-untyped-call]
    expected = {name: x.grad.clone() for name, x in unet.named_parameters() if x.grad is not None}
    chunks = zip(*(x.chunk(2) for x in (*inputs, chance)), strict=True)
    mean = Halves(list(unet.parameters()), 2).backward(
        [partial(loss_of, unet, *chunk) for chunk in chunks]
    )
    assert mean == pytest.approx(whole.item(), rel=1e-5)
    for name, x in unet.named_parameters():
        assert x.grad is not None
        assert x.grad.stride() == x.stride()
        if name in expected:
            assert torch.allclose(x.grad, expected[name], atol=1e-6)


def test_a_network_grows_from_a_smaller_one() -> None:
    """Before it learns, what it was given more of has no say."""
    small, large = torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(4, 6, 1)
    grow(large, small.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.allclose(large(x)[:, :5], small(x[:, :3]), atol=1e-6)


def test_a_word_of_a_new_vocabulary_begins_as_what_it_was_spelt_with() -> None:
    old, new = learn_tokenizer(captions=50), learn_tokenizer(captions=2000)
    kept, grown = new_text_encoder(old), new_text_encoder(new)
    grow_text_encoder(grown, new, kept, old)
    before, after = (x.get_input_embeddings().weight for x in (kept, grown))
    word = next(w for w in new.get_vocab() if w.endswith("</w>") and w not in old.get_vocab())
    ids = old(word.removesuffix("</w>"), add_special_tokens=False).input_ids
    assert torch.allclose(after[new.get_vocab()[word]], before[ids].mean(0))
    assert torch.allclose(after[new.bos_token_id], before[old.bos_token_id])


def test_training_waits_while_it_is_told_to_pause(tmp_path: Path) -> None:
    pause = tmp_path / "PAUSE"
    pause.touch()
    progress = Progress("any", 1, 0, pause=pause)
    waiting = threading.Thread(target=progress.step)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    pause.unlink()
    waiting.join(30)
    assert not waiting.is_alive()


def test_an_average_is_worn_for_a_while_only() -> None:
    network = torch.nn.Linear(2, 2)
    average = Average(network)
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    average.update(network)
    with average.worn_by(network):
        worn = network.weight.detach().clone()
    assert torch.allclose(network.weight, before + 1)
    assert (worn > before).all()
    assert (worn < before + 1).all()
