"""How many denoising steps does a prompt of the bundled family need?

    python benchmarks/steps.py [--prompts 24] [--json]

Paints unseen prompts with one, two and three things at several step counts, finds the things by
matching their drawn shapes in the pixels of their colour, and prints the share of asked things
that are there, with their kind and colour right, and the seconds a picture takes. With --skips it
does the same for runs that resume from a neighbour, a prompt that differs in one word.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from argus.core.job import Job
from argus.engine.engine import Engine
from argus.families.catalog import default_family
from argus.families.pictogram.draw import PALETTE, draw_scene
from argus.families.pictogram.world import COLOURS, KINDS, SIZES, Group, Scene, sample_scene

STEPS = (4, 6, 8, 12, 16, 20, 25, 30, 40, 50)
THINGS = (1, 2, 3)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--prompts", type=int, default=24, help="prompts of each thing count")
    options.add_argument("--guidance", type=float, default=None)
    options.add_argument("--skips", action="store_true", help="resume from neighbours instead")
    options.add_argument("--json", action="store_true", help="one JSON object as the last line")
    asked = options.parse_args()
    exact = default_family().exact
    engine = Engine.load(default_family().models[exact.model], sampler=exact.sampler)
    guidance = exact.guidance if asked.guidance is None else asked.guidance
    rows = [0, *range(exact.steps // 6, exact.steps, exact.steps // 6)] if asked.skips else STEPS
    name = "skip" if asked.skips else "steps"
    results = []
    for row in rows:
        steps, skip = (exact.steps, row) if asked.skips else (row, 0)
        result: dict[str, float] = {name: row}
        seconds = []
        for things in THINGS:
            found = []
            for i in range(asked.prompts):
                rng = random.Random(f"steps {things} {i}")
                scene = plain_scene(rng, things)
                job = Job(wording(scene), seed=i, steps=steps, guidance=guidance, skip=skip)
                start = None
                if skip:
                    near = replace(job, prompt=wording(changed(scene, rng)), seed=i + 1000, skip=0)
                    start = engine.run(near, keep=[skip]).kept[skip]
                begun = time.perf_counter()
                image = engine.run(job, start=start).image
                seconds.append(time.perf_counter() - begun)
                found.append(share_found(np.asarray(image), scene.groups))
            result[f"{things} things"] = statistics.mean(found)
        result["seconds"] = statistics.median(seconds)
        results.append(result)
        print(result, flush=True)
    table = Table(*results[0], title=f"things found, guidance {guidance:g}")
    for result in results:
        table.add_row(*(f"{value:.3g}" for value in result.values()))
    Console().print(table)
    if asked.json:
        print(json.dumps({"benchmark": "steps", "guidance": guidance, "rows": results}))


def plain_scene(rng: random.Random, things: int) -> Scene:
    """A scene of different plain things of different colours, none in front of another."""
    while True:
        scene = sample_scene(rng)
        groups = tuple(replace(group, fill="plain") for group in scene.groups)
        colours = {group.colour for group in groups}
        if (
            scene.things == len(groups) == len(colours) == things
            and scene.relation != "in front of"
        ):
            return replace(scene, groups=groups)


def changed(scene: Scene, rng: random.Random) -> Scene:
    """The scene with another colour or kind for one of its things."""
    groups = list(scene.groups)
    at = rng.randrange(len(groups))
    if rng.random() < 0.5:
        others = set(COLOURS) - {group.colour for group in groups}
        groups[at] = replace(groups[at], colour=rng.choice(sorted(others)))
    else:
        others = set(KINDS) - {group.kind for group in groups}
        groups[at] = replace(groups[at], kind=rng.choice(sorted(others)))
    return replace(scene, groups=tuple(groups))


def wording(scene: Scene) -> str:
    """The scene in one fixed form of words."""
    phrases = []
    for group in scene.groups:
        article = "an" if group.colour == "orange" and group.size == "medium" else "a"
        size = "" if group.size == "medium" else f"{group.size} "
        phrases.append(f"{article} {size}{group.colour} {group.kind}")
    if scene.relation == "between":
        return f"{phrases[0]} between {phrases[1]} and {phrases[2]}, {scene.background}"
    if scene.relation is not None:
        phrases = [f"{phrases[0]} {scene.relation} {phrases[1]}", *phrases[2:]]
    return f"{' and '.join(phrases)}, {scene.background}"


def share_found(pixels: np.ndarray, groups: tuple[Group, ...]) -> float:
    """The share of things whose best-matching kind among the pixels of their colour is theirs."""
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    return statistics.mean(kind_in(image, group.colour) == group.kind for group in groups)


def kind_in(image: Tensor, colour: str) -> str | None:
    """The kind whose silhouette best matches the pixels of a colour, if any matches well."""
    mask = mask_of(image, colour)
    best, kind = 0.55, None
    for name, templates in TEMPLATES[colour].items():
        for template in templates:
            window = torch.ones_like(template)
            energy = F.conv2d(mask[None, None] ** 2, window[None, None])
            scores = F.conv2d(mask[None, None], template[None, None]) / (
                template.norm() * (energy.sqrt() + 1)
            )
            if scores.max().item() > best:
                best, kind = scores.max().item(), name
    return kind


def mask_of(image: Tensor, colour: str) -> Tensor:
    """Per pixel, how near it is to a colour: 1 at it, 0 from a distance of 90 on (of 255)."""
    ink = torch.tensor(PALETTE[colour], dtype=torch.float32)[:, None, None]
    mask: Tensor = (1 - (image - ink).norm(dim=0) / 90).clamp(min=0)
    return mask


def silhouettes(colour: str) -> dict[str, list[Tensor]]:
    """Masks of every kind in every size, drawn alone in the middle of a pale ground."""
    shapes: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        for size, side in SIZES.items():
            scene = Scene("paper", 0, (Group(kind, colour, "plain", size, ((32, 32),)),))
            pixels = torch.from_numpy(np.asarray(draw_scene(scene)).astype(np.float32))
            mask = mask_of(pixels.permute(2, 0, 1), colour)
            low = 32 - side // 2 - 2
            mask = mask[low : low + side + 4, low : low + side + 4]
            shapes.setdefault(kind, []).append(mask)
    return shapes


TEMPLATES = {colour: silhouettes(colour) for colour in COLOURS}

if __name__ == "__main__":
    main()
