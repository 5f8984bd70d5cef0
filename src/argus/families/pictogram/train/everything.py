"""`python -m argus.families.pictogram.train.everything`: all networks of the family but the VAE,
on a GPU, in minutes.

Base learns further from the shipped weights, takes its guidance over and teaches the small model;
then the detector learns. Every stage lasts so many seconds, whatever the GPU makes of them, since
it is time that one is lent for. What is done already, with the same options, is not done again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from argus.core.machine import cores
from argus.families.pictogram import BASE, COMPONENTS
from argus.families.pictogram.networks import new_scheduler, save_pipeline
from argus.families.pictogram.scene.detector import WEIGHTS as DETECTOR_WEIGHTS
from argus.families.pictogram.scene.detector import Detector
from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.__main__ import (
    FINE_RATE,
    GUIDANCE,
    TEXT_SHARE,
    Model,
    taught,
)
from argus.families.pictogram.train.components import Components
from argus.families.pictogram.train.detecting import RATE as DETECTOR_RATE
from argus.families.pictogram.train.detecting import (
    Decoder,
    Targets,
    detection_loss,
    disturbed,
    save_detector,
)
from argus.families.pictogram.train.drawing import as_bytes, as_pixels
from argus.families.pictogram.train.growing import grow
from argus.families.pictogram.train.lessons import UNCONDITIONAL
from argus.families.pictogram.train.losses import Chance, Denoising, Teacher
from argus.families.pictogram.train.recorded import Training
from argus.families.pictogram.train.shelf import (
    CAPTIONS,
    CHUNK,
    Shelf,
    artists,
    draw_lessons,
    draw_sights,
)

SECONDS = {"base": 180.0, "guided": 25.0, "small": 90.0, "detector": 75.0}
RATES = {"base": 1e-3, "guided": FINE_RATE, "small": 1e-3, "detector": DETECTOR_RATE}
DECODED = 1024  # at a time
DONE = "done"  # a file in the folder of a stage, with its options

app = typer.Typer(add_completion=False)


@app.command()
def everything(
    work: Annotated[Path, typer.Option(help="Folder for what every stage leaves.")],
    share: Annotated[float, typer.Option(min=1e-6, help="Of every stage's time.")] = 1.0,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to draw for UNets.")] = 200_000,
    sights: Annotated[int, typer.Option(min=1, help="Scenes to draw for the detector.")] = 120_000,
    batch: Annotated[
        int, typer.Option(min=2, help="Pictures in a batch of UNets; the detector's has half.")
    ] = 512,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    seed: Annotated[int, typer.Option(help="Seed of scenes and captions.")] = 41,
) -> None:
    """Train base from the shipped weights, let it take its guidance over, teach the small model,
    and train the detector. What is to be shipped is in WORK/guided, WORK/small and
    WORK/detector."""
    options = f"share {share:g}, scenes {scenes}, sights {sights}, batch {batch}, seed {seed}"
    left = list(dropwhile(lambda name: _told(work / name / DONE) == options, SECONDS))
    if not left:
        print(f"All of it is done in {work}, with the same options.")
        return
    torch.manual_seed(seed)
    where = torch.device(device)
    with artists(max(1, cores() - 1)) as pool:
        draw = partial(draw_lessons, BASE / "tokenizer", COMPONENTS, seed)
        lessons = Shelf(pool, draw, 0 if left == ["detector"] else scenes, where)
        drawn = Shelf(pool, partial(draw_sights, seed), sights, where)
        stages = _Stages(work, batch, where, lessons, drawn)
        for name in left:
            begun, mark = time.monotonic(), work / name / DONE
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.unlink(missing_ok=True)
            getattr(stages, name)(share * SECONDS[name])
            mark.write_text(options)
            print(f"{name}: {time.monotonic() - begun:.0f} s with all that it needs", flush=True)


def _told(mark: Path) -> str | None:
    return mark.read_text() if mark.exists() else None


@dataclass(frozen=True)
class _Stages:
    work: Path
    batch: int
    device: torch.device
    lessons: Shelf
    sights: Shelf

    def base(self, seconds: float) -> None:
        """The true velocities; the text encoder learns too."""
        pipeline = self._loaded(BASE)
        pipeline.text_encoder.requires_grad_(True)
        self._taught("base", pipeline, Denoising(self._alphas), seconds, text_share=TEXT_SHARE)

    def guided(self, seconds: float) -> None:
        """What base guesses with guidance."""
        pipeline = self._loaded(self._weights("base"))
        self._taught("guided", pipeline, self._of(pipeline, "base", GUIDANCE), seconds)

    def small(self, seconds: float) -> None:
        """What that guesses, for scenes without parts in a colour of their own: those details are
        left to base, and what there is of the small model to everything else."""
        pupil = self._ready(taught(self._weights("guided"), Model.small, go_on=True))
        self._taught("small", pupil, self._of(pupil, "guided", 1.0), seconds, plain=True)

    def detector(self, seconds: float) -> None:
        """Half of its pictures are as the VAE decodes them."""
        detector = Detector()
        grow(detector, load_file(DETECTOR_WEIGHTS))
        detector = detector.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        vae = self._loaded(self._weights("guided")).vae
        decode = Decoder(vae, Components.load(COMPONENTS).to(self.device))
        self.sights.fill(self.sights.count)
        pictures = self.sights.rows("pictures")
        for begin in range(0, len(pictures), 2 * DECODED):
            half = pictures[begin : begin + 2 * DECODED : 2]
            half.copy_(as_bytes(decode(as_pixels(half))))

        def loss() -> Tensor:
            rows = self.sights.batch(self.batch // 2)
            batch = disturbed(as_pixels(rows.pop("pictures")))
            return detection_loss(detector, batch, Targets(**rows), bfloat16=self._half)

        training = Training(
            detector, [(list(detector.parameters()), 1.0)], loss, RATES["detector"], self.device
        )
        training.run("detector", seconds, self.sights.fill)
        save_detector(detector, self.work / "detector" / "detector.safetensors")

    def _taught(
        self,
        name: str,
        pipeline: StableDiffusionPipeline,
        loss_of: Denoising,
        seconds: float,
        text_share: float = 0.0,
        plain: bool = False,
    ) -> None:
        """Train the pipeline's UNet, and save it; `plain` scenes are those without detail."""
        unet, text_encoder = pipeline.unet, pipeline.text_encoder
        unet.to(memory_format=torch.channels_last).requires_grad_(True).train()
        networks = nn.ModuleDict({"unet": unet})
        groups = [(list(unet.parameters()), 1.0)]
        if text_share:
            networks["text_encoder"] = text_encoder
            groups.append((list(text_encoder.parameters()), text_share))
        nothing = token_ids(pipeline.tokenizer, [""]).to(self.device)
        self.lessons.fill(CHUNK if not plain else self.lessons.count)
        among = None
        if plain:
            among = (~self.lessons.rows("detailed")).nonzero().flatten()
            if not len(among):
                raise typer.BadParameter("All scenes are detailed: draw more --scenes.")

        def loss() -> Tensor:
            rows = self.lessons.batch(self.batch, among)
            count = len(rows["ids"])
            which = (torch.rand(count, device=self.device) * CAPTIONS).long()
            ids = rows["ids"][torch.arange(count, device=self.device), which].long()
            empty = torch.rand(count, 1, device=self.device) < UNCONDITIONAL
            ids = torch.where(empty, nothing, ids)
            latents = rows["latents"].float()
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self._half, cache_enabled=False
            ):
                with torch.set_grad_enabled(text_share > 0):
                    states = text_encoder(ids).last_hidden_state
                chance = Chance.like(latents)
                result: Tensor = loss_of(unet, latents, rows["things"], states, chance)
            return result

        training = Training(networks, groups, loss, RATES[name], self.device)
        training.run(name, seconds, self.lessons.fill)
        pipeline.unet.eval()
        save_pipeline(self._weights(name), pipeline)

    def _loaded(self, folder: Path) -> StableDiffusionPipeline:
        return self._ready(StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True))

    def _ready(self, pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
        pipeline.scheduler = new_scheduler()
        pipeline.vae.requires_grad_(False).eval()
        pipeline.text_encoder.requires_grad_(False)
        return pipeline.to(self.device)

    def _of(self, pipeline: StableDiffusionPipeline, teacher: str, guidance: float) -> Denoising:
        return Denoising(self._alphas, Teacher.of(pipeline, self._weights(teacher), guidance))

    def _weights(self, stage: str) -> Path:
        return self.work / stage / "weights"

    @property
    def _half(self) -> bool:
        return self.device.type == "cuda"

    @property
    def _alphas(self) -> Tensor:
        alphas: Tensor = new_scheduler().alphas_cumprod.to(self.device)
        return alphas


if __name__ == "__main__":
    app()
