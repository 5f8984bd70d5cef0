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
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from argus.families.pictogram import BASE, COMPONENTS
from argus.families.pictogram.scene.detector import CELLS, LOOKS, STRIDE, WEIGHTS, Detector
from argus.families.pictogram.train.components import Components
from argus.families.pictogram.train.drawing import pictures
from argus.families.pictogram.train.growing import grow
from argus.families.pictogram.train.halves import Halves
from argus.families.pictogram.train.progress import Checkpoints, Progress, cosine
from argus.families.pictogram.train.reading import NOTHING, second_number
from argus.families.pictogram.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
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
    states = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
    save_file({name: x.half() if x.is_floating_point() else x for name, x in states.items()}, path)
    print(f"saved {path}, {path.stat().st_size / 1e6:.1f} MB")


@dataclass(frozen=True)
class Decoder:
    """Pictures as the VAE decodes their latents, which are a little off."""

    vae: AutoencoderKL
    components: Components

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        latents = self.components.encode(pixels.to(self.vae.device))
        latents = latents + OFF * torch.randn_like(latents)
        result: Tensor = self.vae.decode(latents).sample.clamp(-1, 1).cpu()
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
    targets = [targets_of(scene) for scene in scenes]
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
        batch = _disturbed(drawn[chosen].float() / 127.5 - 1, rng).to(device)
        asked = [targets[i] for i in chosen]
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
        batch[::2] = decoder(batch[::2])
        parts.append(((batch + 1) * 127.5).round().to(torch.uint8))
        progress.step()
    drawn = torch.cat(parts).contiguous()
    save_file({"pictures": drawn}, cached)
    return drawn


def _disturbed(batch: Tensor, rng: random.Random) -> Tensor:
    """The pictures a little brighter or darker, noisier, at times softer."""
    contrast = 1 + 0.12 * (2 * torch.rand(len(batch), 1, 1, 1) - 1)
    brightness = 0.1 * (2 * torch.rand(len(batch), 1, 1, 1) - 1)
    if rng.random() < 0.3:
        soft = F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        batch = batch.lerp(soft, torch.rand(len(batch), 1, 1, 1))
    noise = 0.06 * torch.rand(len(batch), 1, 1, 1) * torch.randn_like(batch)
    return (batch * contrast + brightness + noise).contiguous(memory_format=torch.channels_last)


Targets = tuple[Tensor, Tensor, Tensor, int]


def targets_of(scene: Scene) -> Targets:
    """What the detector should say of a scene.

    Presence (16, 16): 1 in the cell of a centre, falling off around it. Facts (m, 7), integers:
    row and column of a cell near a centre, then the `LOOKS` of that thing. Places
    (m, 2): the centre's x and y in cells, from that cell's upper left. The background's number.
    """
    presence = torch.zeros(CELLS, CELLS)
    centres = torch.arange(CELLS) + 0.5
    facts, places = [], []
    for group in scene.groups:
        looks = [
            KINDS.index(group.kind), COLOURS.index(group.colour), FILLS.index(group.fill),
            list(SIZES).index(group.size), _second(group),
        ]  # fmt: skip
        for x, y in group.places:
            at_x, at_y = x / STRIDE, y / STRIDE
            squares = (centres[:, None] - at_y) ** 2 + (centres[None, :] - at_x) ** 2
            presence = torch.maximum(presence, torch.exp(-squares / 1.5))
            near = squares.flatten().topk(NEAR_CELLS, largest=False).indices.tolist()
            presence.view(-1)[near[0]] = 1.0
            for cell in near:
                row, column = divmod(cell, CELLS)
                facts.append([row, column, *looks])
                places.append([at_x - column, at_y - row])
    number = BACKGROUNDS.index(scene.background)
    return (
        presence,
        torch.tensor(facts, dtype=torch.long).view(-1, 2 + len(LOOKS)),
        torch.tensor(places).view(-1, 2),
        number,
    )


def _second(group: Group) -> int:
    """The second colour's number; what no thing can have is not asked."""
    if group.kind not in PARTS:
        return NOTHING
    return second_number(group.second)


def detection_loss(
    detector: Detector, batch: Tensor, targets: Sequence[Targets], bfloat16: bool = False
) -> Tensor:
    """Focal loss of presence (CornerNet, arXiv 1808.01244, eq. 1); of looks where things are."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bfloat16):
        maps, backgrounds = detector(batch)
    maps = {name: values.float() for name, values in maps.items()}
    device = batch.device
    presence = torch.stack([target[0] for target in targets]).to(device)
    counts = torch.tensor([len(target[1]) for target in targets])
    picture = torch.repeat_interleave(torch.arange(len(targets)), counts).to(device)
    facts = torch.cat([target[1] for target in targets]).to(device)
    places = torch.cat([target[2] for target in targets]).to(device)
    number = torch.tensor([target[3] for target in targets], device=device)

    logits = maps["presence"][:, 0]
    sure = logits.sigmoid()
    there = presence == 1
    right = F.logsigmoid(logits) * (1 - sure) ** 2
    wrong = F.logsigmoid(-logits) * sure**2 * (1 - presence) ** 4
    loss = -torch.where(there, right, wrong).sum() / there.sum().clamp(min=1)

    row, column = facts[:, 0], facts[:, 1]
    for i, name in enumerate(LOOKS):
        weight = SECOND_WEIGHT if name == "second" else 1.0
        loss = loss + weight * F.cross_entropy(
            maps[name][picture, :, row, column], facts[:, 2 + i], ignore_index=NOTHING
        )
    loss = loss + F.l1_loss(maps["place"][picture, :, row, column], places)
    return loss + 0.5 * F.cross_entropy(backgrounds.float(), number)


if __name__ == "__main__":
    app()
