"""`python -m argus.families.pictogram.train.detecting`: trains the detector that judges pictures.

It sees rendered scenes, half of them as the VAE decodes them, and never what a generator made:
a judge that has seen the painter's mistakes learns to overlook them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from argus.families.pictogram import BASE, COMPONENTS
from argus.families.pictogram.scene.detector import CELLS, LOOKS, STRIDE, WEIGHTS, Detector
from argus.families.pictogram.train.components import Components
from argus.families.pictogram.train.drawing import as_bytes, as_pixels, pictures
from argus.families.pictogram.train.growing import grow
from argus.families.pictogram.train.halves import Halves
from argus.families.pictogram.train.progress import Checkpoints, Progress, cosine
from argus.families.pictogram.train.reading import NOTHING, second_number
from argus.families.pictogram.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    MAX_THINGS,
    PARTS,
    SIZE,
    SIZES,
    Group,
    Scene,
    sample_scene,
)

BATCH = 64
RATE = 2e-3
EMPTY = 0.04
JITTER = 2
OFF = 0.1  # of latents
NEAR_CELLS = 4
SOFT = 0.3  # of the pictures
SECOND_WEIGHT = 2.0  # of the smallest parts

app = typer.Typer(add_completion=False)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder for the checkpoint and the result.")],
    steps: Annotated[int, typer.Option(help="Batches of 64 pictures.")] = 1500,
    scenes: Annotated[int, typer.Option(help="Pictures that are drawn once.")] = 24_000,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and noise.")] = 0,
    vae: Annotated[Path, typer.Option(help="Half of the pictures are as it decodes them.")] = (
        BASE / "vae"
    ),
    components: Annotated[Path, typer.Option(help="What it decodes.")] = COMPONENTS,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="Start from the shipped detector, as shapes allow.")
    ] = False,
    threads: Annotated[
        int, typer.Option(help="Each takes a part of every batch; with OMP_NUM_THREADS=1.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Compute in bfloat16, where that is faster.")
    ] = False,
) -> None:
    """Train the detector and leave its weights in WORK/detector.safetensors.

    Run again with the same options, it goes on where it was stopped.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    coder = AutoencoderKL.from_pretrained(vae, use_safetensors=True).to(device)
    detector = Detector().to(device)
    if go_on:
        grow(detector, load_file(WEIGHTS))
    decode = Decoder(coder, Components.load(components).to(torch.device(device)))
    detector = train_detector(detector, decode, work, steps, seed, scenes, threads, bfloat16)
    path = work / "detector.safetensors"
    save_detector(detector, path)
    print(f"saved {path}, {path.stat().st_size / 1e6:.1f} MB")


def save_detector(detector: Detector, path: Path) -> None:
    """Save its weights, in float16."""
    states = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
    save_file({name: x.half() if x.is_floating_point() else x for name, x in states.items()}, path)


@dataclass(frozen=True)
class Decoder:
    """Pictures as the VAE decodes their latents, which are a little off."""

    vae: AutoencoderKL
    components: Components

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        latents = self.components.encode(pixels.to(self.vae.device))
        latents = latents + OFF * torch.randn_like(latents)
        result: Tensor = self.vae.decode(latents).sample.clamp(-1, 1)
        return result


def train_detector(
    detector: Detector,
    decoder: Decoder,
    work: Path,
    steps: int,
    seed: int,
    scene_count: int,
    threads: int = 1,
    bfloat16: bool = False,
) -> Detector:
    """Train for `steps` batches. Resumes from the checkpoint in `work` if there is one."""
    device = detector.background.weight.device
    scenes = [loose_scene(random.Random(f"detector {seed} {i}")) for i in range(scene_count)]
    drawn = _drawn(scenes, decoder, work / "detector_pictures.safetensors")
    targets = targets_of(scenes).to(device)
    detector = detector.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(detector.parameters(), lr=RATE, weight_decay=1e-3, fused=True)
    checkpoints = Checkpoints(work / "detector.ckpt", detector=detector, optimiser=optimiser)
    begin = checkpoints.resume()
    progress = Progress("detector", steps, begin, pause=work / "PAUSE")
    halves = Halves(list(detector.parameters()), threads)
    for step in range(begin, steps):
        rng = random.Random(f"detector batch {seed} {step}")
        torch.manual_seed(rng.getrandbits(60))
        for group in optimiser.param_groups:
            group["lr"] = RATE * cosine(step, steps, warmup=100)
        chosen = rng.choices(range(scene_count), k=BATCH)
        batch = disturbed(as_pixels(drawn[chosen].to(device)))
        asked = targets[chosen]
        size = -(-BATCH // threads)
        ranges = [slice(at, at + size) for at in range(0, BATCH, size)]
        loss = halves.backward(
            [
                partial(detection_loss, detector, batch[part], asked[part], bfloat16)
                for part in ranges
            ]
        )
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimiser.step()
        progress.step(loss=loss)
        checkpoints.save_at_times(step + 1, last=step + 1 == steps)
    return detector.eval()


def loose_scene(rng: random.Random) -> Scene:
    """A scene of the world whose things are moved off its grid by a few pixels; at times empty."""
    scene = sample_scene(rng)
    if rng.random() < EMPTY:
        return replace(scene, groups=(), relation=None)
    return replace(scene, groups=tuple(_moved(group, rng) for group in scene.groups))


def _moved(group: Group, rng: random.Random) -> Group:
    edge = group.size_px // 2

    def move(at: int) -> int:
        return min(max(at + rng.randint(-JITTER, JITTER), edge), SIZE - edge)

    return replace(group, places=tuple((move(x), move(y)) for x, y in group.places))


@torch.no_grad()
def _drawn(scenes: list[Scene], decoder: Decoder, cached: Path) -> Tensor:
    """The scenes as bytes (n, 3, 64, 64), every second one as the VAE decodes it."""
    if cached.exists():
        kept = load_file(cached)["pictures"]
        if len(kept) == len(scenes):
            return kept
    progress = Progress("pictures", -(-len(scenes) // 64), 0, pause=cached.parent / "PAUSE")
    parts = []
    for begin in range(0, len(scenes), 64):
        batch = pictures(scenes[begin : begin + 64])
        batch[::2] = decoder(batch[::2]).cpu()
        parts.append(as_bytes(batch))
        progress.step()
    drawn = torch.cat(parts).contiguous()
    save_file({"pictures": drawn}, cached)
    return drawn


def disturbed(batch: Tensor) -> Tensor:
    """The pictures a little brighter or darker, noisier, at times softer."""

    def chance() -> Tensor:
        return torch.rand(len(batch), 1, 1, 1, device=batch.device)

    contrast, brightness = 1 + 0.12 * (2 * chance() - 1), 0.1 * (2 * chance() - 1)
    soft = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    batch = batch.lerp(soft, chance() * (chance() < SOFT))
    noise = 0.06 * chance() * torch.randn_like(batch)
    return (batch * contrast + brightness + noise).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Targets:
    """What the detector should say of n pictures.

    `presence` (n, 16, 16): 1 in the cell of a centre, falling off around it. `facts` (n, 36, 7),
    integers: row and column of a cell near a centre, then the `LOOKS` of that thing; rows without a
    thing are NOTHING. `places` (n, 36, 2): the centre's x and y in cells, from that cell's upper
    left. `backgrounds` (n,): their numbers.
    """

    presence: Tensor
    facts: Tensor
    places: Tensor
    backgrounds: Tensor

    def __getitem__(self, chosen: Any) -> Targets:
        return Targets(*(values[chosen] for values in vars(self).values()))

    def to(self, device: torch.device) -> Targets:
        return Targets(*(values.to(device) for values in vars(self).values()))


def targets_of(scenes: Sequence[Scene]) -> Targets:
    """What the detector should say of scenes."""
    cells = NEAR_CELLS * MAX_THINGS
    result = Targets(
        torch.zeros(len(scenes), CELLS, CELLS),
        torch.full((len(scenes), cells, 2 + len(LOOKS)), NOTHING, dtype=torch.int16),
        torch.zeros(len(scenes), cells, 2),
        torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
    )
    centres = torch.arange(CELLS) + 0.5
    for i, scene in enumerate(scenes):
        facts, places = [], []
        for group in scene.groups:
            looks = [
                KINDS.index(group.kind), COLOURS.index(group.colour), FILLS.index(group.fill),
                list(SIZES).index(group.size), _second(group),
            ]  # fmt: skip
            for x, y in group.places:
                at_x, at_y = x / STRIDE, y / STRIDE
                squares = (centres[:, None] - at_y) ** 2 + (centres[None, :] - at_x) ** 2
                presence = torch.maximum(result.presence[i], torch.exp(-squares / 1.5))
                near = squares.flatten().topk(NEAR_CELLS, largest=False).indices.tolist()
                presence.view(-1)[near[0]] = 1.0
                result.presence[i] = presence
                for cell in near:
                    row, column = divmod(cell, CELLS)
                    facts.append([row, column, *looks])
                    places.append([at_x - column, at_y - row])
        if facts:
            result.facts[i, : len(facts)] = torch.tensor(facts, dtype=torch.int16)
            result.places[i, : len(places)] = torch.tensor(places)
    return result


def _second(group: Group) -> int:
    """The second colour's number; what no thing can have is not asked."""
    if group.kind not in PARTS:
        return NOTHING
    return second_number(group.second)


def detection_loss(
    detector: Detector, batch: Tensor, targets: Targets, bfloat16: bool = False
) -> Tensor:
    """Focal loss of presence (CornerNet, arXiv 1808.01244, eq. 1); of looks where things are."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        maps, backgrounds = detector(batch)
    maps = {name: values.float() for name, values in maps.items()}
    logits, presence = maps["presence"][:, 0], targets.presence
    sure = logits.sigmoid()
    there = presence == 1
    right = F.logsigmoid(logits) * (1 - sure) ** 2
    wrong = F.logsigmoid(-logits) * sure**2 * (1 - presence) ** 4
    loss = -torch.where(there, right, wrong).sum() / there.sum().clamp(min=1)

    facts = targets.facts.long()
    picture = torch.arange(len(batch), device=batch.device)[:, None]
    row, column = facts[..., 0].clamp(min=0), facts[..., 1].clamp(min=0)
    for i, name in enumerate(LOOKS):
        weight = SECOND_WEIGHT if name == "second" else 1.0
        found, asked = maps[name][picture, :, row, column], facts[..., 2 + i].flatten()
        errors = F.cross_entropy(found.flatten(0, 1), asked, ignore_index=NOTHING, reduction="sum")
        loss = loss + weight * errors / (asked != NOTHING).sum().clamp(min=1)
    off = (maps["place"][picture, :, row, column] - targets.places).abs().mean(-1)
    known = facts[..., 0] >= 0
    loss = loss + (off * known).sum() / known.sum().clamp(min=1)
    result: Tensor = loss + 0.5 * F.cross_entropy(backgrounds.float(), targets.backgrounds)
    return result


if __name__ == "__main__":
    app()
