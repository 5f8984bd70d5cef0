"""Trains a UNet, on latents that are computed once and prompts that the text encoder reads."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.lessons import Lessons
from argus.families.pictogram.train.losses import Loss
from argus.families.pictogram.train.progress import Checkpoints, Progress, plateau
from argus.families.pictogram.train.sheet import draw_sheet

AVERAGING = 0.999


@dataclass(frozen=True)
class Sheet:
    """A contact sheet `every` so many batches, none if that is 0, and how its pictures are made."""

    every: int
    steps: int
    guidance: float


def train_painter(
    work: Path,
    steps: int,
    seed: int,
    lessons: Lessons,
    loss_of: Loss,
    pipeline: StableDiffusionPipeline,
    rate: float,
    sheet: Sheet,
    bfloat16: bool = False,
) -> None:
    """Train the pipeline's UNet for `steps` batches; leave the averaged weights in it.

    Resumes from the checkpoint in `work`. The averaged weights paint contact sheets of
    unseen prompts into `work`.
    """
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    device = unet.device
    unet.to(memory_format=torch.channels_last)
    average = AveragedModel(unet, avg_fn=_average)
    optimiser = torch.optim.AdamW(
        unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    checkpoints = Checkpoints(
        work / "painter.ckpt", unet=unet, average=average, optimiser=optimiser
    )
    begin = checkpoints.resume()
    for state in optimiser.state.values():  # laid out as the weights are, which fused steps need
        for name, value in state.items():
            if value.dim() == 4:
                state[name] = value.contiguous(memory_format=torch.channels_last)
    progress = Progress("painter", steps, begin)
    unet.train()
    for step in range(begin, steps):
        rng = random.Random(f"painter {seed} {step}")
        torch.manual_seed(rng.getrandbits(60))  # so that a resumed run sees the same noise
        for group in optimiser.param_groups:
            group["lr"] = rate * plateau(step, steps, warmup=200)
        lesson = lessons.batch(step / steps, rng)
        with torch.no_grad():
            ids = token_ids(tokenizer, lesson.prompts).to(device)
            states = text_encoder(ids).last_hidden_state
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of(unet, lesson.latents, lesson.things, states)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(unet)
        progress.step(loss=loss.item())
        last = step + 1 == steps
        if (step + 1) % 250 == 0 or last:
            checkpoints.save(step + 1)
        if sheet.every and ((step + 1) % sheet.every == 0 or last):
            pipeline.unet = average.module
            draw_sheet(pipeline, sheet.steps, sheet.guidance).save(
                work / f"sheet_{step + 1:06d}.png"
            )
            pipeline.unet = unet
    unet.load_state_dict(average.module.state_dict())
    unet.eval()


def _average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    share = min(AVERAGING, (1 + int(count)) / (10 + int(count)))
    return old.lerp(new, 1 - share)
