"""What UNets are taught with: latents of scenes, where their things are, and prompts for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from argus.families.pictogram.captions import caption
from argus.families.pictogram.networks import LATENT_SIZE
from argus.families.pictogram.train.components import Components
from argus.families.pictogram.train.drawing import pictures
from argus.families.pictogram.train.progress import Progress
from argus.families.pictogram.world import SIZE, Scene

BATCH = 64
UNCONDITIONAL = 0.1
EASY_SHARE = 0.25
THING_WEIGHT, DETAIL_WEIGHT = 3, 6  # of cells of things, and of those whose part has a colour
DETAILED = 2  # times as often as others come scenes with such a part


@dataclass(frozen=True)
class Lesson:
    """A batch: `latents` (b, c, h, w), the weights of cells by the `things` that touch them
    (b, h, w), and b prompts."""

    latents: Tensor
    things: Tensor
    prompts: list[str]


class Lessons:
    """Batches from `scenes` and their `latents` (n, c, 8, 8).

    The first `closeup_share` of them are close-ups, the others whole pictures, of which the easiest
    `easy_share` come first. One prompt in ten is empty, for guidance.
    """

    def __init__(
        self,
        scenes: list[Scene],
        latents: Tensor,
        closeup_share: float,
        easy_share: float = EASY_SHARE,
    ) -> None:
        self._easy_share = easy_share
        self._scenes, self._latents, self._closeup_share = scenes, latents, closeup_share
        self._things = torch.stack([weights_of(scene) for scene in scenes]).to(latents.device)
        self._closeups = find_closeups(scenes) if closeup_share else []
        numbers = range(len(scenes))
        self._easy_first = sorted(numbers, key=lambda i: (scenes[i].things, len(scenes[i].groups)))
        self._often = [DETAILED if detailed(scenes[i]) else 1 for i in self._easy_first]

    def batch(self, done: float, rng: random.Random) -> Lesson:
        """A batch for when a share `done` of the training is done: 64 pictures, or 128 close-ups,
        which cost half as much."""
        if done < self._closeup_share:
            near = rng.choices(self._closeups, k=2 * BATCH)
            seen = [one.scene for one in near]
            latents = torch.stack([one.cut(self._latents[one.number]) for one in near])
            things = torch.stack([one.cut(self._things[one.number]) for one in near])
        else:
            done = (done - self._closeup_share) / (1 - self._closeup_share)
            pool = self._easy_first[: pool_size(done, len(self._scenes), self._easy_share)]
            chosen = rng.choices(pool, self._often[: len(pool)], k=BATCH)
            seen = [self._scenes[i] for i in chosen]
            latents, things = self._latents[chosen], self._things[chosen]
        prompts = ["" if rng.random() < UNCONDITIONAL else caption(scene, rng) for scene in seen]
        return Lesson(latents.float(), things, prompts)


def pool_size(done: float, scene_count: int, easy_share: float = EASY_SHARE) -> int:
    """How many of the scenes, easiest first, are used when `done` of the whole pictures are done.

    All of them, from half of the way on.
    """
    share = easy_share + (1 - easy_share) * done / 0.5
    return max(1, round(scene_count * min(1.0, share)))


@torch.no_grad()
def latents_of(scenes: list[Scene], components: Components, cached: Path) -> Tensor:
    """The scenes' latents (n, c, 8, 8) in float16, read from `cached` if they are there."""
    if cached.exists():
        latents = load_file(cached)["latents"]
        if len(latents) == len(scenes):
            return latents
    progress = Progress("latents", -(-len(scenes) // 64), 0, pause=cached.parent / "PAUSE")
    parts = []
    for begin in range(0, len(scenes), 64):
        parts.append(components.encode(pictures(scenes[begin : begin + 64])).half())
        progress.step()
    latents = torch.cat(parts).contiguous()
    save_file({"latents": latents}, cached)
    return latents


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


def weights_of(scene: Scene) -> Tensor:
    """The weights (8, 8) of latent cells, small integers, where noise leaves no doubt of what is
    where. Small parts in a colour of their own are what is learnt last."""
    weights = torch.ones(LATENT_SIZE, LATENT_SIZE, dtype=torch.uint8)
    for group in scene.groups:
        weight = THING_WEIGHT if group.second is None else DETAIL_WEIGHT
        weights[cells_of_things(replace(scene, groups=(group,)))] = weight
    return weights


def detailed(scene: Scene) -> bool:
    """Whether a part of something in it has a colour of its own."""
    return any(group.second is not None for group in scene.groups)


def cells_of_things(scene: Scene) -> Tensor:
    """Which latent cells (8, 8) the things of a scene touch."""
    cells = torch.zeros(LATENT_SIZE, LATENT_SIZE, dtype=torch.bool)
    scale = SIZE // LATENT_SIZE
    for group in scene.groups:
        for x, y in group.places:
            reach = group.size_px // 2 + 1  # with its white edge
            (left, right), (top, bottom) = (
                ((at - reach) // scale, (at + reach - 1) // scale) for at in (x, y)
            )
            cells[top : bottom + 1, left : right + 1] = True
    return cells
