"""What a UNet is told besides the latents: the encoded prompt, and SDXL's sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from argus.core.job import Job
from argus.engine.loading import AnyPipeline


@dataclass(frozen=True)
class Conditioning:
    """One row for an unguided job; for a guided one the negative row, then the positive.

    `states` is (rows, tokens, width); `added` are SDXL's `text_embeds` (rows, width) and
    `time_ids` (rows, 6), or None; `guidance_embedding` (rows, width) is what models distilled
    for a range of guidance scales take, or None.
    """

    states: Tensor
    added: dict[str, Tensor] | None
    guidance_embedding: Tensor | None

    @property
    def guided(self) -> bool:
        return len(self.states) == 2


def is_guided(pipeline: AnyPipeline, job: Job) -> bool:
    """Whether a job runs two rows. Models that embed their guidance scale run one."""
    return job.guided and pipeline.unet.config.time_cond_proj_dim is None


def encode(pipeline: AnyPipeline, job: Job, width: int, height: int) -> Conditioning:
    """Encode a job's prompts the way the stock pipeline does."""
    guided = is_guided(pipeline, job)
    negative = job.negative_prompt or None
    device = pipeline.unet.device
    added = None
    if isinstance(pipeline, StableDiffusionXLPipeline):
        positive, unconditional, pooled, unconditional_pooled = pipeline.encode_prompt(
            job.prompt,
            device=device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
        )
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=positive.dtype)
        rows = 2 if guided else 1
        added = {
            "text_embeds": torch.cat([unconditional_pooled, pooled]) if guided else pooled,
            "time_ids": sizes.repeat(rows, 1).to(device),
        }
    else:
        positive, unconditional = pipeline.encode_prompt(
            job.prompt,
            device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
        )
    states = torch.cat([unconditional, positive]) if guided else positive
    return Conditioning(states, added, _guidance_embedding(pipeline, job, states))


def _guidance_embedding(pipeline: AnyPipeline, job: Job, states: Tensor) -> Tensor | None:
    width = pipeline.unet.config.time_cond_proj_dim
    if width is None:
        return None
    scale = torch.tensor([job.guidance - 1])
    embedding: Tensor = pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)
    return embedding.to(states.device, states.dtype)
