"""Trains the UNet, on latents that are computed once and prompts that the text encoder reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextModel, CLIPTokenizer

from argus.families.pictogram.captions import caption
from argus.families.pictogram.networks import LATENT_SIZE, new_scheduler
from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.components import Components
from argus.families.pictogram.train.drawing import pictures, training_scenes
from argus.families.pictogram.train.progress import Checkpoints, Progress, plateau
from argus.families.pictogram.train.sheet import draw_sheet
from argus.families.pictogram.world import SIZE, Scene

BATCH = 64
RATE = 1e-3
AVERAGING = 0.999
UNCONDITIONAL = 0.1
SNR_LIMIT = 6.0
CLOSEUP_SHARE = 0.6
EASY_SHARE = 0.25
THING_WEIGHT, CLEAR_SNR = 3.0, 0.4


@torch.no_grad()
def latents_of(scenes: list[Scene], components: Components, cached: Path) -> Tensor:
    """The scenes' latents (n, 32, 8, 8) in float16, read from `cached` if they are there."""
    if cached.exists():
        latents = load_file(cached)["latents"]
        if len(latents) == len(scenes):
            return latents
    progress = Progress("latents", -(-len(scenes) // 64), 0)
    parts = []
    for begin in range(0, len(scenes), 64):
        parts.append(components.encode(pictures(scenes[begin : begin + 64])).half())
        progress.step()
    latents = torch.cat(parts).contiguous()
    save_file({"latents": latents}, cached)
    return latents


def train_painter(
    work: Path,
    steps: int,
    seed: int,
    scene_count: int,
    components: Components,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    sheet_every: int = 1000,
) -> None:
    """Train for `steps` batches; leave the averaged weights in `unet`.

    Resumes from the checkpoint in `work`. Every `sheet_every` steps the averaged weights paint a
    contact sheet of unseen prompts into `work`; 0 is never.
    """
    scenes = training_scenes(seed, scene_count)
    device = unet.device
    latents = latents_of(scenes, components, work / "latents.safetensors").to(device)
    things = torch.stack([cells_of_things(scene) for scene in scenes]).to(device)
    closeups = find_closeups(scenes)
    easy_first = sorted(range(len(scenes)), key=lambda i: (scenes[i].things, len(scenes[i].groups)))
    unet.to(memory_format=torch.channels_last)
    average = AveragedModel(unet, avg_fn=_average)
    optimiser = torch.optim.AdamW(
        unet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
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
    alphas = new_scheduler().alphas_cumprod.to(device)
    unet.train()
    for step in range(begin, steps):
        rng = random.Random(f"painter {seed} {step}")
        torch.manual_seed(rng.getrandbits(60))  # so that a resumed run sees the same noise
        for group in optimiser.param_groups:
            group["lr"] = RATE * plateau(step, steps, warmup=200)
        if step < CLOSEUP_SHARE * steps:
            near = rng.choices(closeups, k=2 * BATCH)
            seen = [one.scene for one in near]
            batch = torch.stack([one.cut(latents[one.number]) for one in near])
            cells = torch.stack([one.cut(things[one.number]) for one in near])
        else:
            chosen = rng.choices(easy_first[: pool_size(step / steps, len(scenes))], k=BATCH)
            seen = [scenes[i] for i in chosen]
            batch, cells = latents[chosen], things[chosen]
        prompts = ["" if rng.random() < UNCONDITIONAL else caption(scene, rng) for scene in seen]
        with torch.no_grad():
            states = text_encoder(token_ids(tokenizer, prompts).to(device)).last_hidden_state
        loss = painting_loss(unet, batch.float(), cells, states, alphas)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(unet)
        progress.step(loss=loss.item())
        last = step + 1 == steps
        if (step + 1) % 250 == 0 or last:
            checkpoints.save(step + 1)
        if sheet_every and ((step + 1) % sheet_every == 0 or last):
            sheet = draw_sheet(vae, average.module, text_encoder, tokenizer)
            sheet.save(work / f"sheet_{step + 1:06d}.png")
    unet.load_state_dict(average.module.state_dict())
    unet.eval()


@dataclass(frozen=True)
class Closeup:
    """A quarter of picture `number` with one whole thing in it; `scene` is what it shows."""

    number: int
    scene: Scene
    row: int
    column: int

    def cut(self, cells: Tensor) -> Tensor:
        """The close-up's cells of something (..., 8, 8)."""
        half = LATENT_SIZE // 2
        return cells[..., self.row : self.row + half, self.column : self.column + half]


def find_closeups(scenes: Sequence[Scene]) -> list[Closeup]:
    """Every close-up of the scenes that shows nothing of a second thing.

    They teach what things look like at a quarter of the cost of whole pictures, most of which is
    background.
    """
    found = []
    half, scale = LATENT_SIZE // 2, SIZE // LATENT_SIZE
    for number, scene in enumerate(scenes):
        cells = cells_of_things(scene)
        for group in scene.groups:
            for x, y in group.places:
                alone = replace(scene, relation=None, groups=(replace(group, places=((x, y),)),))
                row, column = (min(max(at // scale - half // 2, 0), half) for at in (y, x))
                closeup = Closeup(number, alone, row, column)
                if torch.equal(closeup.cut(cells), closeup.cut(cells_of_things(alone))):
                    found.append(closeup)
    return found


def cells_of_things(scene: Scene) -> Tensor:
    """Which latent cells (8, 8) the things of a scene touch."""
    cells = torch.zeros(LATENT_SIZE, LATENT_SIZE, dtype=torch.bool)
    scale = SIZE // LATENT_SIZE
    for group in scene.groups:
        for x, y in group.places:
            reach = group.size_px / 2 + 1
            (left, top), (right, bottom) = (
                [int(max(0, at + side) // scale) for at in (x, y)] for side in (-reach, reach)
            )
            cells[top : bottom + 1, left : right + 1] = True
    return cells


def pool_size(done: float, scene_count: int) -> int:
    """How many of the scenes, easiest first, are used when a share `done` of the steps is done.

    The whole world is reached at four fifths.
    """
    share = EASY_SHARE + (1 - EASY_SHARE) * (done - CLOSEUP_SHARE) / (4 / 5 - CLOSEUP_SHARE)
    return max(1, round(scene_count * min(1.0, max(EASY_SHARE, share))))


def painting_loss(
    unet: UNet2DConditionModel, latents: Tensor, things: Tensor, states: Tensor, alphas: Tensor
) -> Tensor:
    """v-prediction, with steps of little noise weighted less and cells of things more.

    The weight of the implied error of x0 is min(SNR + 1, limit). Min-SNR weights (Hang et al. 2023,
    arXiv 2303.09556), min(SNR, limit), all but ignore the noisiest steps, which is where latents
    this small decide what stands where. `things` (b, 8, 8) count three times, but only where the
    noise leaves no doubt of where they are: elsewhere it would teach that there are more of them.
    """
    noise = torch.randn_like(latents)
    times = torch.randint(0, len(alphas), (len(latents),), device=latents.device)
    alpha = alphas[times][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    guess = unet(noisy, times, states).sample
    errors = F.mse_loss(guess, velocity, reduction="none").mean(1)
    clear = (alphas[times] > CLEAR_SNR / (1 + CLEAR_SNR))[:, None, None]
    cells = torch.where(things & clear, THING_WEIGHT, 1.0)
    weights = (SNR_LIMIT * (1 - alphas[times])).clamp(max=1.0)
    return (weights * (cells * errors).sum((1, 2)) / cells.sum((1, 2))).mean()


def _average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    share = min(AVERAGING, (1 + int(count)) / (10 + int(count)))
    return old.lerp(new, 1 - share)
