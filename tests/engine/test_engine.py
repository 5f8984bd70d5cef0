"""The engine's pictures are diffusers' pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from argus.core.errors import BadRequest
from argus.core.job import Job
from argus.engine.engine import Engine
from argus.engine.samplers import SAMPLERS, new_scheduler

TOLERANCE = 1e-3
MODELS = ("tiny_sd", "tiny_sdxl")


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def stock(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_latents(pipeline: Any, job: Job, keep: list[Tensor] | None = None) -> Tensor:
    """What the unmodified pipeline makes of a job."""

    def collect(_: Any, __: int, ___: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if keep is not None:
            keep.append(values["latents"].clone())
        return values

    result = pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt or None,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        width=job.width,
        height=job.height,
        generator=torch.Generator().manual_seed(job.seed),
        callback_on_step_end=collect,
        output_type="latent",
    )
    latents: Tensor = result.images
    return latents


@pytest.mark.parametrize(
    "job",
    [
        Job("a red fish", seed=1, steps=6, guidance=5.0),
        Job("a red fish", negative_prompt="blue", seed=2, steps=5, guidance=3.0),
        Job("a red fish", seed=3, steps=4, guidance=1.0),
        Job("ein größerer Fisch 🐟", seed=4, steps=4, guidance=4.0, width=48, height=32),
    ],
    ids=["guided", "negative", "unguided", "wide"],
)
def test_latents_are_those_of_the_stock_pipeline(folder: Path, job: Job) -> None:
    expected: list[Tensor] = []
    final = stock_latents(stock(folder), job, keep=expected)
    result = Engine.load(str(folder)).run(job, keep=range(1, job.steps + 1))
    assert (result.final - final).abs().max() < TOLERANCE
    for k, latents in enumerate(expected, 1):
        assert (result.kept[k] - latents).abs().max() < TOLERANCE


def test_the_picture_is_that_of_the_stock_pipeline(folder: Path) -> None:
    job = Job("a red fish", seed=1, steps=4, guidance=5.0)
    expected = stock(folder)(
        job.prompt, num_inference_steps=4, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert Engine.load(str(folder)).run(job).image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_matches_the_stock_pipeline(tiny_sd: Path, sampler: str) -> None:
    job = Job("a red fish", seed=1, steps=5, guidance=4.0)
    pipeline = stock(tiny_sd)
    pipeline.scheduler = new_scheduler(sampler, pipeline.scheduler)
    expected = stock_latents(pipeline, job)
    final = Engine.load(str(tiny_sd), sampler=sampler).run(job).final
    assert (final - expected).abs().max() < TOLERANCE * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("skip", [1, 3, 5])
def test_a_resumed_run_matches_a_plain_loop_over_diffusers(folder: Path, skip: int) -> None:
    engine = Engine.load(str(folder))
    neighbour = engine.run(Job("a blue fish", seed=8, steps=6, guidance=5.0), keep=[skip])
    job = Job("a red fish", seed=9, steps=6, guidance=5.0, skip=skip)
    resumed = engine.run(job, start=neighbour.kept[skip])
    expected = plain_loop(stock(folder), job, neighbour.kept[skip].clone())
    assert (resumed.final - expected).abs().max() < TOLERANCE


@torch.no_grad()
def plain_loop(pipeline: Any, job: Job, latents: Tensor) -> Tensor:
    """Finish a run from `latents` with nothing but diffusers' UNet and scheduler."""
    added = None
    if hasattr(pipeline, "text_encoder_2"):
        yes, no, pooled, no_pooled = pipeline.encode_prompt(
            job.prompt, do_classifier_free_guidance=True
        )
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
        added = {"text_embeds": torch.cat([no_pooled, pooled]), "time_ids": ids}
    else:
        yes, no = pipeline.encode_prompt(job.prompt, "cpu", 1, True)
    scheduler, states = pipeline.scheduler, torch.cat([no, yes])
    scheduler.set_timesteps(job.steps)
    for timestep in scheduler.timesteps[job.skip :]:
        rows = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        guess = pipeline.unet(
            rows, timestep, encoder_hidden_states=states, added_cond_kwargs=added
        ).sample
        negative, positive = guess.chunk(2)
        guess = negative + job.guidance * (positive - negative)
        latents = scheduler.step(guess, timestep, latents).prev_sample
    return latents


def test_resuming_ones_own_latents_gives_ones_own_picture(folder: Path) -> None:
    engine = Engine.load(str(folder))
    whole = engine.run(Job("a red fish", seed=5, steps=6, guidance=5.0), keep=[2])
    job = Job("a red fish", seed=5, steps=6, guidance=5.0, skip=2)
    assert (engine.run(job, start=whole.kept[2]).final - whole.final).abs().max() < TOLERANCE


def test_progress_counts_the_steps_that_run(tiny_sd: Path) -> None:
    engine, seen = Engine.load(str(tiny_sd)), list[tuple[int, int]]()
    whole = engine.run(Job("a red fish", steps=4), keep=[0, 1])
    job = Job("a red fish", steps=4, skip=1)
    result = engine.run(
        job, start=whole.kept[1], keep=[1, 4], on_step=lambda done, of: seen.append((done, of))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(result.kept[1], whole.kept[1])
    assert torch.equal(result.kept[4], result.final)
    assert set(result.timings_ms) == {"encode", "denoise", "decode"}


def test_half_precision_runs(tiny_sdxl: Path) -> None:
    result = Engine.load(str(tiny_sdxl), dtype="bfloat16").run(Job("a red fish", steps=2))
    assert result.final.dtype == torch.bfloat16
    assert result.image.size == (32, 32)


@pytest.mark.parametrize(
    ("job", "start", "keep", "message"),
    [
        (Job("x", width=33), None, [], "width is 33; this model needs a multiple of 2"),
        (Job("x", steps=4, skip=2), None, [], "needs the latents to start from"),
        (Job("x", steps=4), torch.zeros(1, 4, 16, 16), [], "skips no step"),
        (Job("x", steps=4, skip=2), torch.zeros(1, 4, 8, 8), [], "must be \\(1, 4, 16, 16\\)"),
        (Job("x", steps=4), None, [5], "passes 0 to 4"),
        (Job("x", steps=1000), None, [], "steps is 1000"),
    ],
)
def test_what_the_model_cannot_make_is_refused(
    tiny_sd: Path, job: Job, start: Tensor | None, keep: list[int], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        Engine.load(str(tiny_sd)).run(job, start=start, keep=keep)
