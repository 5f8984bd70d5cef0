"""Trains the VAE until the small parts of things survive its round trip."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from argus.families.pictogram.draw import draw_scene
from argus.families.pictogram.train.progress import Checkpoints, Progress, cosine
from argus.families.pictogram.world import SIZE, Scene, sample_scene

BATCH = 16
CROP, CROPPED_SHARE = 32, 0.8  # most batches are quarter pictures around a thing: four times faster
THING_WEIGHT = 3.0
RATE = 2e-3
KL_WEIGHT = 1e-6


def pictures(scenes: list[Scene]) -> Tensor:
    """Scenes drawn as a (n, 3, 64, 64) tensor in [-1, 1]."""
    pixels = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def training_scenes(seed: int, count: int) -> list[Scene]:
    return [sample_scene(random.Random(f"scene {seed} {i}")) for i in range(count)]


def train_vae(vae: AutoencoderKL, work: Path, steps: int, seed: int) -> None:
    """Train for `steps` batches and leave the standardised VAE in `work/vae`.

    Resumes from the checkpoint in `work` if there is one.
    """
    optimiser = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-4, fused=True)
    checkpoints = Checkpoints(work / "vae.ckpt", vae=vae, optimiser=optimiser)
    begin = checkpoints.resume()
    progress = Progress("vae", steps, begin)
    for step, (batch, weights) in zip(
        range(begin, steps), _batches(seed, begin, steps), strict=False
    ):
        for group in optimiser.param_groups:
            group["lr"] = RATE * cosine(step, steps, warmup=100)
        loss, error = _loss(vae, batch.to(vae.device), weights.to(vae.device))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        progress.step(loss=loss.item(), mse=error.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            checkpoints.save(step + 1)
    standardise(vae, pictures(training_scenes(seed, 512)).to(vae.device))
    vae.save_pretrained(work / "vae")


def _scenes(rng: random.Random, n: int) -> list[Scene]:
    return [sample_scene(rng) for _ in range(n)]


def _batches(seed: int, begin: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures, and the weight of each of their pixels (n, 1, h, w)."""
    step = begin
    while True:
        rng = random.Random(f"vae {seed} {step}")
        scenes = _scenes(rng, BATCH)
        drawn = pictures(scenes)
        empty = pictures([replace(scene, groups=()) for scene in scenes])
        things = ((drawn - empty).abs().amax(1, keepdim=True) > 0.02).float()
        weights = 1 + (THING_WEIGHT - 1) * things
        if step < CROPPED_SHARE * steps:
            corners = [_corner(scene, rng) for scene in scenes]
            drawn, weights = _cropped(drawn, corners), _cropped(weights, corners)
        yield drawn, weights / weights.mean()
        step += 1


def _corner(scene: Scene, rng: random.Random) -> tuple[int, int]:
    """The upper left of a crop that has one of the scene's things in it."""
    x, y = rng.choice(rng.choice(scene.groups).places)
    left, top = x - rng.randint(8, CROP - 8), y - rng.randint(8, CROP - 8)
    return min(max(left, 0), SIZE - CROP), min(max(top, 0), SIZE - CROP)


def _cropped(pixels: Tensor, corners: list[tuple[int, int]]) -> Tensor:
    return torch.stack(
        [
            image[:, y : y + CROP, x : x + CROP]
            for image, (x, y) in zip(pixels, corners, strict=True)
        ]
    )


def _loss(vae: AutoencoderKL, batch: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(batch).latent_dist
    out = vae.decode(posterior.sample()).sample
    error = out - batch
    pixels = (weights * (error.abs() + 4 * error.square())).mean()
    across = (weights[..., 1:] * error.diff(dim=3).abs()).mean()
    down = (weights[..., 1:, :] * error.diff(dim=2).abs()).mean()
    kl = posterior.kl().mean()
    return pixels + across + down + KL_WEIGHT * kl, error.square().mean()


@torch.no_grad()
def standardise(vae: AutoencoderKL, batch: Tensor) -> None:
    """Fold mean and deviation of every latent channel into the VAE, so that latents are unit.

    Afterwards `scaling_factor` 1 is right, which is what the config says.
    """
    latents = vae.encode(batch).latent_dist.mean
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    c = mean.numel()
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:c] /= deviation[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / deviation
    quant.bias[c:] -= 2 * deviation.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= deviation[None, :, None, None]
