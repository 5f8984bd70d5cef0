"""Trains the text encoder: it learns to tell from a caption the scene, and what each cell shows.

The noise a diffusion model is trained on hides for long which word belongs to which thing, and a
text encoder that learns from it alone learns slowly. Asked for the scene itself and for its cells,
through small heads that are thrown away afterwards, it binds words to things and things to places
within minutes; the UNet then finds in its states what to paint.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from argus.families.pictogram.captions import caption
from argus.families.pictogram.networks import LATENT_SIZE, TEXT_WIDTH
from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.halves import Halves
from argus.families.pictogram.train.progress import Checkpoints, Progress, cosine
from argus.families.pictogram.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    MAX_THINGS,
    RELATIONS,
    SIZE,
    SIZES,
    Scene,
    sample_scene,
)

BATCH = 96
RATE = 1e-3
GROUPS = 3
NOTHING = -100  # what cross_entropy leaves out
_COLUMNS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS),
    "fill": len(FILLS),
    "size": len(SIZES),
    "count": MAX_THINGS,
    "second": len(COLOURS) + 1,
}
_LOOKS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOURS),
    "fill": len(FILLS),
    "second": len(COLOURS) + 1,
}


class Reader(nn.Module):
    """Reads groups, background and relation out of the text encoder's last hidden states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(GROUPS + 1, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.hidden = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.group_heads = nn.Linear(2 * width, sum(_COLUMNS.values()))
        self.scene_head = nn.Linear(2 * width, len(BACKGROUNDS) + len(RELATIONS) + 1)

    def loss(self, states: Tensor, facts: Tensor) -> Tensor:
        """Mean cross entropy of every fact; `states` (b, tokens, width), `facts` of `facts_of`."""
        slots = self.slots.expand(len(states), -1, -1)
        read = self.hidden(self.attention(slots, states, states, need_weights=False)[0])
        guesses = self.group_heads(read[:, :GROUPS]).split(list(_COLUMNS.values()), dim=-1)
        scene = self.scene_head(read[:, GROUPS])
        terms = [
            F.cross_entropy(
                guess.flatten(0, 1), facts[:, i : len(_COLUMNS) * GROUPS : len(_COLUMNS)].flatten()
            )
            for i, guess in enumerate(guesses)
        ]
        terms.append(F.cross_entropy(scene[:, : len(BACKGROUNDS)], facts[:, -2]))
        terms.append(F.cross_entropy(scene[:, len(BACKGROUNDS) :], facts[:, -1]))
        return torch.stack(terms).mean()


class Cells(nn.Module):
    """Reads what each of the 64 cells of a picture shows: kind or nothing, and its looks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(LATENT_SIZE**2, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.heads = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, sum(_LOOKS.values())),
        )

    def loss(self, states: Tensor, cells: Tensor) -> Tensor:
        """Sum of the looks' cross entropies; `states` (b, tokens, width), `cells` of `cells_of`."""
        slots = self.slots.expand(len(states), -1, -1)
        read = self.heads(self.attention(slots, states, states, need_weights=False)[0])
        guesses = read.split(list(_LOOKS.values()), dim=-1)
        terms = [
            F.cross_entropy(guess.flatten(0, 1), cells[:, i].flatten(), ignore_index=NOTHING)
            for i, guess in enumerate(guesses)
        ]
        return torch.stack(terms).sum()


def train_reader(
    work: Path,
    steps: int,
    seed: int,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    threads: int = 1,
    bfloat16: bool = False,
) -> None:
    """Train for `steps` batches. Resumes from the checkpoint in `work` if there is one."""
    device = text_encoder.device
    text_encoder.set_attn_implementation("eager")  # faster for gradients on a CPU
    reader, cells = Reader(TEXT_WIDTH).to(device), Cells(TEXT_WIDTH).to(device)
    trained = nn.ModuleDict({"text_encoder": text_encoder, "reader": reader, "cells": cells})
    optimiser = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=1e-3, fused=True)
    checkpoints = Checkpoints(work / "reader.ckpt", trained=trained, optimiser=optimiser)
    begin = checkpoints.resume()
    progress = Progress("reader", steps, begin, pause=work / "PAUSE")
    halves = Halves(list(trained.parameters()), threads)

    def loss(ids: Tensor, facts: Tensor, seen: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            states = text_encoder(ids).last_hidden_state
        states = states.float()
        return reader.loss(states, facts) + cells.loss(states, seen)

    trained.train()
    for step in range(begin, steps):
        rng = random.Random(f"reader {seed} {step}")
        for group in optimiser.param_groups:
            group["lr"] = RATE * cosine(step, steps, warmup=200)
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        ids = token_ids(tokenizer, [caption(scene, rng) for scene in scenes]).to(device)
        facts = torch.tensor([facts_of(scene) for scene in scenes], device=device)
        seen = torch.stack([cells_of(scene) for scene in scenes]).to(device)

        chunks = zip(*(x.chunk(threads) for x in (ids, facts, seen)), strict=True)
        mean = halves.backward([partial(loss, *chunk) for chunk in chunks])
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        progress.step(loss=mean)
        checkpoints.save_at_times(step + 1, last=step + 1 == steps)
    trained.eval()


def facts_of(scene: Scene) -> list[int]:
    """A scene as numbers: kind, colour, fill, size, count, second colour of three groups in the
    order of mention; background; relation."""
    sizes = list(SIZES)
    facts: list[int] = []
    for group in scene.groups:
        facts += [KINDS.index(group.kind), COLOURS.index(group.colour), FILLS.index(group.fill)]
        facts += [sizes.index(group.size), group.count - 1, second_number(group.second)]
    for _ in range(GROUPS - len(scene.groups)):
        facts += [len(KINDS), *(NOTHING,) * (len(_COLUMNS) - 1)]
    relation = len(RELATIONS) if scene.relation is None else RELATIONS.index(scene.relation)
    return [*facts, BACKGROUNDS.index(scene.background), relation]


def cells_of(scene: Scene) -> Tensor:
    """Kind or nothing, colour, fill and second colour of what each cell shows (4, 64)."""
    cells = torch.full((len(_LOOKS), LATENT_SIZE, LATENT_SIZE), NOTHING)
    cells[0] = len(KINDS)
    scale = SIZE // LATENT_SIZE
    for group in scene.groups:
        looks = [KINDS.index(group.kind), COLOURS.index(group.colour), FILLS.index(group.fill)]
        values = torch.tensor([*looks, second_number(group.second)])
        reach = group.size_px / 2 - 1
        for x, y in group.places:
            (left, right), (top, bottom) = (
                (int((at - reach) // scale), int((at + reach) // scale)) for at in (x, y)
            )
            cells[:, top : bottom + 1, left : right + 1] = values[:, None, None]
    return cells.flatten(1)


def second_number(colour: str | None) -> int:
    """The number of a second colour; the last one stands for none."""
    return len(COLOURS) if colour is None else COLOURS.index(colour)
