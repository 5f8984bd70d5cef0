"""Trains the VAE: its decoder draws pictures from principal components, its encoder imitates them.

Making pictures needs the decoder alone. The encoder is there for those who bring pictures of their
own to the stock pipelines.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from argus.families.pictogram.train.components import Components, things_of
from argus.families.pictogram.train.drawing import pictures
from argus.families.pictogram.train.halves import Halves
from argus.families.pictogram.train.progress import Checkpoints, Progress, plateau
from argus.families.pictogram.world import sample_scene

BATCH = 12
THING_WEIGHT = 3.0
RATE = 2e-3
IMITATE = 3  # every so many batches the encoder learns too
DISTURBANCE = 0.05  # of the latents, since what a UNet makes of them is never exact


def train_vae(
    vae: AutoencoderKL,
    components: Components,
    work: Path,
    steps: int,
    seed: int,
    threads: int = 1,
    rate: float = RATE,
    bfloat16: bool = False,
) -> None:
    """Train for `steps` batches and leave the VAE in `work/vae`.

    Resumes from the checkpoint in `work` if there is one.
    """
    optimiser = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=1e-4, fused=True)
    checkpoints = Checkpoints(work / "vae.ckpt", vae=vae, optimiser=optimiser)
    begin = checkpoints.resume()
    progress = Progress("vae", steps, begin, pause=work / "PAUSE")
    halves = Halves(list(vae.parameters()), threads)
    components = components.to(vae.device)
    for step in range(begin, steps):
        rng = random.Random(f"vae {seed} {step}")
        torch.manual_seed(rng.getrandbits(60))
        for group in optimiser.param_groups:
            group["lr"] = rate * plateau(step, steps, warmup=100)
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        drawn = pictures(scenes)
        weights = 1 + (THING_WEIGHT - 1) * things_of(scenes, drawn)
        drawn, weights = drawn.to(vae.device), (weights / weights.mean()).to(vae.device)
        latents = components.encode(drawn)
        disturbed = latents + DISTURBANCE * torch.randn_like(latents)
        chunks = zip(*(x.chunk(threads) for x in (drawn, weights, latents, disturbed)), strict=True)
        loss = halves.backward(
            [partial(_loss, vae, step % IMITATE == 0, bfloat16, *chunk) for chunk in chunks]
        )
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        progress.step(loss=loss)
        checkpoints.save_at_times(step + 1, last=step + 1 == steps)
    vae.save_pretrained(work / "vae")


def _loss(
    vae: AutoencoderKL,
    imitate: bool,
    bfloat16: bool,
    drawn: Tensor,
    weights: Tensor,
    latents: Tensor,
    disturbed: Tensor,
) -> Tensor:
    with torch.autocast(drawn.device.type, torch.bfloat16, enabled=bfloat16):
        decoded = vae.decode(disturbed).sample
        encoded = vae.encode(drawn).latent_dist.mean if imitate else None
    loss = drawing_loss(decoded.float() - drawn, weights)
    if encoded is not None:
        loss = loss + IMITATE * F.mse_loss(encoded.float(), latents)
    return loss


def drawing_loss(error: Tensor, weights: Tensor) -> Tensor:
    """Of pixels and of their gradients, which are what makes edges; `weights` (n, 1, h, w)."""
    pixels = (weights * (error.abs() + 4 * error.square())).mean()
    across = (weights[..., 1:] * error.diff(dim=3).abs()).mean()
    down = (weights[..., 1:, :] * error.diff(dim=2).abs()).mean()
    return pixels + across + down
