"""Trains the text encoder: it learns to tell the scene from its caption.

The noise a diffusion model is trained on hides for long which word belongs to which thing, and a
text encoder that learns from it alone learns slowly. Asked for the scene itself, through a small
head that is thrown away afterwards, it binds words to things within minutes; the UNet then finds
in its states what to paint.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from argus.families.pictogram.captions import caption
from argus.families.pictogram.networks import TEXT_WIDTH
from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.progress import Checkpoints, Progress, cosine
from argus.families.pictogram.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    MAX_THINGS,
    RELATIONS,
    SIZES,
    Group,
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
            F.cross_entropy(guess.flatten(0, 1), facts[:, i : 5 * GROUPS : 5].flatten())
            for i, guess in enumerate(guesses)
        ]
        terms.append(F.cross_entropy(scene[:, : len(BACKGROUNDS)], facts[:, -2]))
        terms.append(F.cross_entropy(scene[:, len(BACKGROUNDS) :], facts[:, -1]))
        return torch.stack(terms).mean()


def train_reader(
    work: Path, steps: int, seed: int, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Train for `steps` batches. Resumes from the checkpoint in `work` if there is one."""
    device = text_encoder.device
    reader = Reader(TEXT_WIDTH).to(device)
    trained = nn.ModuleDict({"text_encoder": text_encoder, "reader": reader})
    optimiser = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=1e-3, fused=True)
    checkpoints = Checkpoints(work / "reader.ckpt", trained=trained, optimiser=optimiser)
    begin = checkpoints.resume()
    progress = Progress("reader", steps, begin)
    trained.train()
    for step in range(begin, steps):
        rng = random.Random(f"reader {seed} {step}")
        for group in optimiser.param_groups:
            group["lr"] = RATE * cosine(step, steps, warmup=200)
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        ids = token_ids(tokenizer, [caption(scene, rng) for scene in scenes]).to(device)
        facts = torch.tensor([facts_of(scene) for scene in scenes], device=device)
        loss = reader.loss(text_encoder(ids).last_hidden_state, facts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        progress.step(loss=loss.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            checkpoints.save(step + 1)
    trained.eval()


def facts_of(scene: Scene) -> list[int]:
    """A scene as numbers: kind, colour, fill, size, count of three groups; background; relation.

    Groups that no relation orders are put in the order of their kind and colour, because their
    captions name them in any order.
    """
    groups = list(scene.groups)
    if scene.relation is None:
        groups.sort(key=_order)
    if scene.relation == "between":
        groups[1:] = sorted(groups[1:], key=_order)
    facts: list[int] = []
    for group in groups:
        sizes = list(SIZES)
        facts += [KINDS.index(group.kind), COLOURS.index(group.colour), FILLS.index(group.fill)]
        facts += [sizes.index(group.size), group.count - 1]
    for _ in range(GROUPS - len(groups)):
        facts += [len(KINDS), NOTHING, NOTHING, NOTHING, NOTHING]
    relation = len(RELATIONS) if scene.relation is None else RELATIONS.index(scene.relation)
    return [*facts, BACKGROUNDS.index(scene.background), relation]


def _order(group: Group) -> tuple[int, int]:
    return KINDS.index(group.kind), COLOURS.index(group.colour)
