"""Trains a UNet, on latents that are computed once and prompts that the text encoder reads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.halves import Halves
from argus.families.pictogram.train.lessons import Lessons
from argus.families.pictogram.train.losses import Chance, Loss
from argus.families.pictogram.train.progress import Checkpoints, Progress, plateau
from argus.families.pictogram.train.sheet import draw_sheet

AVERAGING = 0.998


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
    text_share: float = 0.0,
    threads: int = 1,
    bfloat16: bool = False,
) -> None:
    """Train the pipeline's UNet for `steps` batches; leave the averaged weights in it.

    Its text encoder learns too, with `text_share` of the rate. Resumes from the checkpoint in
    `work`. The averaged weights paint contact sheets of unseen prompts into `work`.
    """
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    device = unet.device
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    text_encoder.requires_grad_(text_share > 0)
    pair = nn.ModuleDict({"unet": unet})
    if text_share:  # else a checkpoint would bring back a text encoder that base no longer has
        pair["text_encoder"] = text_encoder
    average = Average(pair)
    trained = [*unet.parameters(), *(text_encoder.parameters() if text_share else ())]
    groups = [{"params": list(unet.parameters()), "share": 1.0}]
    if text_share:
        groups.append({"params": list(text_encoder.parameters()), "share": text_share})
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    checkpoints = Checkpoints(
        work / "painter.ckpt", pair=pair, average=average, optimiser=optimiser
    )
    begin = checkpoints.resume()
    for state in optimiser.state.values():  # laid out as the weights are, which fused steps need
        for name, value in state.items():
            if value.dim() == 4:
                state[name] = value.contiguous(memory_format=torch.channels_last)
    progress = Progress("painter", steps, begin, pause=work / "PAUSE")
    halves = Halves(trained, threads)

    def loss(ids: Tensor, latents: Tensor, things: Tensor, chance: Chance) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            with torch.set_grad_enabled(text_share > 0):
                states = text_encoder(ids).last_hidden_state
            return loss_of(unet, latents, things, states, chance)

    pair.train()
    for step in range(begin, steps):
        rng = random.Random(f"painter {seed} {step}")
        torch.manual_seed(rng.getrandbits(60))  # so that a resumed run sees the same noise
        for group in optimiser.param_groups:
            group["lr"] = rate * group["share"] * plateau(step, steps, warmup=100)
        lesson = lessons.batch(step / steps, rng)
        ids = token_ids(tokenizer, lesson.prompts).to(device)
        chance = Chance.like(lesson.latents)
        chunks = zip(
            *(x.chunk(threads) for x in (ids, lesson.latents, lesson.things, chance)), strict=True
        )
        mean = halves.backward([partial(loss, *chunk) for chunk in chunks])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update(pair)
        progress.step(loss=mean)
        last = step + 1 == steps
        checkpoints.save_at_times(step + 1, last)
        if sheet.every and ((step + 1) % sheet.every == 0 or last):
            with average.worn_by(pair):
                page = draw_sheet(pipeline, sheet.steps, sheet.guidance)
            page.save(work / f"sheet_{step + 1:06d}.png")
    pair.load_state_dict(average.weights)
    pair.eval()


class Average:
    """An exponential moving average of a network's weights, quick to follow at first."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = {name: x.detach().clone() for name, x in network.state_dict().items()}
        self._count = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        share = 1 - min(AVERAGING, (1 + self._count) / (10 + self._count))
        self._count += 1
        now = network.state_dict()
        moving = [name for name, x in self._weights.items() if x.is_floating_point()]
        torch._foreach_lerp_(
            [self._weights[name] for name in moving], [now[name] for name in moving], share
        )

    @contextmanager
    def worn_by(self, network: nn.Module) -> Iterator[None]:
        """The network with the averaged weights, for a while."""
        own = {name: x.clone() for name, x in network.state_dict().items()}
        network.load_state_dict(self._weights)
        network.eval()
        yield
        network.load_state_dict(own)
        network.train()

    @property
    def weights(self) -> dict[str, Tensor]:
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights, "count": self._count}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, value in saved["weights"].items():
            self._weights[name].copy_(value)
        self._count = saved["count"]
