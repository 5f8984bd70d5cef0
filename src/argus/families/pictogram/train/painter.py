"""Trains the UNet and the text encoder together, on latents that are computed once."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel, CLIPTokenizer

from argus.families.pictogram.captions import caption
from argus.families.pictogram.networks import TEXT_WIDTH, new_scheduler
from argus.families.pictogram.train.autoencoder import pictures, training_scenes
from argus.families.pictogram.train.progress import Checkpoints, Progress, cosine
from argus.families.pictogram.train.reading import Reader, facts_of
from argus.families.pictogram.train.sheet import draw_sheet
from argus.families.pictogram.world import Scene

BATCH = 48
RATE = 1e-3
TEXT_RATE = 5e-4
AVERAGING = 0.999
UNCONDITIONAL = 0.1
SNR_LIMIT = 6.0
READING_WEIGHT = 0.05
EASY_SHARE = 0.25


@torch.no_grad()
def latents_of(scenes: list[Scene], vae: AutoencoderKL, cached: Path) -> Tensor:
    """The scenes' latents (n, 16, 8, 8) in float16, read from `cached` if they are there."""
    if cached.exists():
        latents = load_file(cached)["latents"]
        if len(latents) == len(scenes):
            return latents
    progress = Progress("latents", -(-len(scenes) // 64), 0)
    parts = []
    for begin in range(0, len(scenes), 64):
        batch = pictures(scenes[begin : begin + 64]).to(vae.device)
        parts.append(vae.encode(batch).latent_dist.mean.half().cpu())
        progress.step()
    latents = torch.cat(parts).contiguous()
    save_file({"latents": latents}, cached)
    return latents


def train_painter(
    work: Path,
    steps: int,
    seed: int,
    scene_count: int,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    sheet_every: int = 1000,
) -> None:
    """Train for `steps` batches; leave the averaged weights in `unet` and `text_encoder`.

    Resumes from the checkpoint in `work`. Every `sheet_every` steps the averaged weights paint a
    contact sheet of unseen prompts into `work`.
    """
    scenes = training_scenes(seed, scene_count)
    device = unet.device
    latents = latents_of(scenes, vae, work / "latents.safetensors").to(device)
    easy_first = sorted(range(len(scenes)), key=lambda i: (scenes[i].things, len(scenes[i].groups)))
    facts = torch.tensor([facts_of(scene) for scene in scenes], device=device)
    reader = Reader(TEXT_WIDTH).to(device)
    trained = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = AveragedModel(trained, avg_fn=_average)
    averaged_unet, averaged_text_encoder = average.module.children()
    optimiser = torch.optim.AdamW(
        [
            {"params": unet.parameters(), "rate": RATE},
            {"params": [*text_encoder.parameters(), *reader.parameters()], "rate": TEXT_RATE},
        ],
        lr=RATE,
        betas=(0.9, 0.99),
        weight_decay=1e-3,
        fused=True,
    )
    checkpoints = Checkpoints(
        work / "painter.ckpt", trained=trained, average=average, reader=reader, optimiser=optimiser
    )
    begin = checkpoints.resume()
    progress = Progress("painter", steps, begin)
    alphas = new_scheduler().alphas_cumprod.to(device)
    trained.train()
    for step in range(begin, steps):
        rng = random.Random(f"painter {seed} {step}")
        torch.manual_seed(rng.getrandbits(60))  # so that a resumed run sees the same noise
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * cosine(step, steps, warmup=200)
        chosen = rng.choices(easy_first[: pool_size(step / steps, len(scenes))], k=BATCH)
        blind = torch.tensor([rng.random() < UNCONDITIONAL for _ in chosen], device=device)
        prompts = [
            "" if dark else caption(scenes[i], rng)
            for i, dark in zip(chosen, blind.tolist(), strict=True)
        ]
        states = text_encoder(token_ids(tokenizer, prompts).to(device)).last_hidden_state
        painting = painting_loss(unet, latents[chosen].float(), states, alphas)
        reading = reader.loss(states[~blind], facts[chosen][~blind])
        optimiser.zero_grad()
        (painting + READING_WEIGHT * reading).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(trained)
        progress.step(painting=painting.item(), reading=reading.item())
        last = step + 1 == steps
        if (step + 1) % 500 == 0 or last:
            checkpoints.save(step + 1)
        if (step + 1) % sheet_every == 0 or last:
            sheet = draw_sheet(vae, averaged_unet, averaged_text_encoder, tokenizer)
            sheet.save(work / f"sheet_{step + 1:06d}.png")
    trained.load_state_dict(average.module.state_dict())
    trained.eval()


def pool_size(done: float, scene_count: int) -> int:
    """How many of the scenes, easiest first, are used when a share `done` of the steps is done.

    Single things teach what the words mean, so the first third of training sees little else; the
    whole world is reached at four fifths.
    """
    share = EASY_SHARE + (1 - EASY_SHARE) * (done - 1 / 3) / (4 / 5 - 1 / 3)
    return max(1, round(scene_count * min(1.0, max(EASY_SHARE, share))))


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids (n, 40), padded as `StableDiffusionPipeline` pads them."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids
    return ids


def painting_loss(
    unet: UNet2DConditionModel, latents: Tensor, states: Tensor, alphas: Tensor
) -> Tensor:
    """v-prediction, steps of little noise weighted less.

    The weight of the implied error of x0 is min(SNR + 1, limit). Min-SNR weights (Hang et al. 2023,
    arXiv 2303.09556), min(SNR, limit), all but ignore the noisiest steps, which is where latents
    this small decide what stands where.
    """
    noise = torch.randn_like(latents)
    times = torch.randint(0, len(alphas), (len(latents),), device=latents.device)
    alpha = alphas[times][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    guess = unet(noisy, times, states).sample
    weights = (SNR_LIMIT * (1 - alphas[times])).clamp(max=1.0)
    return (weights * F.mse_loss(guess, velocity, reduction="none").mean((1, 2, 3))).mean()


def _average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    share = min(AVERAGING, (1 + int(count)) / (10 + int(count)))
    return old.lerp(new, 1 - share)
