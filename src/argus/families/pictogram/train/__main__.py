"""`python -m argus.families.pictogram.train`: make the weights, from nothing or further."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

from argus.families.pictogram import BASE, COMPONENTS, WEIGHTS
from argus.families.pictogram.networks import (
    LATENT_CHANNELS,
    assemble,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
    save_pipeline,
)
from argus.families.pictogram.tokenizer import learn_tokenizer
from argus.families.pictogram.train.autoencoder import train_vae
from argus.families.pictogram.train.components import Components, find_components
from argus.families.pictogram.train.drawing import training_scenes
from argus.families.pictogram.train.growing import grow, grow_text_encoder
from argus.families.pictogram.train.lessons import EASY_SHARE, Lessons, detailed, latents_of
from argus.families.pictogram.train.losses import Denoising, Loss, Teacher
from argus.families.pictogram.train.painter import Sheet, train_painter
from argus.families.pictogram.train.reading import train_reader

app = typer.Typer(add_completion=False)


class Model(StrEnum):
    base = "base"
    small = "small"


GUIDANCE = 2.0  # of a base that has not taken it over yet
SHEET_STEPS = 8
RATE, FINE_RATE = 8e-4, 2e-4  # the latter for what base's weights are only to be adapted to
RATE_VAE, RATE_ON = 2e-3, 1e-3  # of a VAE from nothing, and from a shipped one
TEXT_SHARE = 0.2  # of the UNet's rate at which the text encoder goes on learning


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints, sheets and the result.")],
    model: Annotated[
        Model, typer.Option(help="Which; all but base are taught by --base.")
    ] = Model.base,
    base: Annotated[
        Path, typer.Option(help="Folder of the base that --go-on starts from and that teaches.")
    ] = BASE,
    vae_steps: Annotated[int, typer.Option(help="Batches of 12 pictures for the VAE.")] = 4000,
    reader_steps: Annotated[
        int, typer.Option(help="Batches of 96 captions for the text encoder.")
    ] = 4000,
    steps: Annotated[int, typer.Option(help="Batches of 64 pictures for the UNet.")] = 20_000,
    scenes: Annotated[int, typer.Option(help="Scenes whose latents are computed once.")] = 40_000,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and captions.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    go_on: Annotated[bool, typer.Option(help="Start from the shipped weights.")] = False,
    closeups: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the UNet's batches that are close-ups.")
    ] = 0.6,
    guidance: Annotated[
        float, typer.Option(help="That of --base, which the model takes over.")
    ] = 1.0,
    threads: Annotated[
        int, typer.Option(help="Each takes a part of every batch; with OMP_NUM_THREADS=1.")
    ] = 1,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Compute in bfloat16, where that is faster.")
    ] = False,
    new_words: Annotated[
        bool, typer.Option("--new-words", help="With --go-on, learn the vocabulary anew.")
    ] = False,
    sheet_every: Annotated[
        int, typer.Option(help="Batches between contact sheets; 0: none.")
    ] = 1000,
) -> None:
    """Train a model of the pictogram family and leave its folder in WORK/weights.

    Run again with the same options, it goes on where it was stopped; while a file WORK/PAUSE
    exists, it waits. With --go-on it starts from the shipped weights, as far as shapes allow (use
    another WORK and another --seed, so that it sees new scenes); the VAE and the text encoder stay
    as they are with --vae-steps 0 and --reader-steps 0, and with --closeups 0 all batches teach
    what stands where. With --guidance 2.5 as well, it learns to be without guidance as it was with
    it. Other models share all but the UNet with --base.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    where = torch.device(device)
    components = _components(work, base, anew=not go_on and model == Model.base)
    plain = model == Model.base and guidance == 1
    if model == Model.base:
        pipeline = _own(
            base,
            work,
            components,
            vae_steps,
            reader_steps,
            seed,
            where,
            go_on,
            threads,
            new_words,
            bfloat16,
        )
    else:
        pipeline = taught(base, model, go_on)
    pipeline.text_encoder.requires_grad_(False).eval()
    pipeline.vae.requires_grad_(False).eval()
    pipeline.to(where)
    if steps == 0:
        return
    world = training_scenes(seed, scenes)
    if model == Model.small:  # detailed scenes are left to base
        world = [scene for scene in world if not detailed(scene)]
    latents = latents_of(world, components, work / "latents.safetensors")
    lessons = Lessons(world, latents.to(where), closeups, 1.0 if go_on else EASY_SHARE)
    loss = _loss(base, model, pipeline, guidance)
    rate = RATE if plain or model == Model.small else FINE_RATE
    sheet = Sheet(
        every=sheet_every,
        steps=SHEET_STEPS,
        guidance=GUIDANCE if plain else 1.0,
    )
    share = TEXT_SHARE if plain else 0.0
    train_painter(work, steps, seed, lessons, loss, pipeline, rate, sheet, share, threads, bfloat16)
    save_pipeline(work / "weights", pipeline)
    size = sum(path.stat().st_size for path in (work / "weights").rglob("*") if path.is_file())
    print(f"saved {work / 'weights'}, {size / 1e6:.1f} MB")


def _own(
    base: Path,
    work: Path,
    components: Components,
    vae_steps: int,
    reader_steps: int,
    seed: int,
    device: torch.device,
    go_on: bool,
    threads: int,
    new_words: bool,
    bfloat16: bool,
) -> StableDiffusionPipeline:
    """The base model, with a VAE and a text encoder that are trained here."""
    if go_on:
        pipeline = _grown(base, work, new_words)
    else:
        tokenizer = _tokenizer(work)
        pipeline = assemble(new_vae(), new_unet(), new_text_encoder(tokenizer), tokenizer)
    pipeline.to(device)
    if vae_steps or (work / "vae").exists():
        pipeline.vae = _trained(
            pipeline.vae,
            components,
            work,
            vae_steps,
            seed,
            threads,
            RATE_ON if go_on else RATE_VAE,
            bfloat16,
        )
    if reader_steps:
        train_reader(
            work, reader_steps, seed, pipeline.text_encoder, pipeline.tokenizer, threads, bfloat16
        )
    return pipeline


def _grown(base: Path, work: Path, new_words: bool) -> StableDiffusionPipeline:
    """Networks of today's shapes that begin from another base, as far as those allow."""
    shipped = StableDiffusionPipeline.from_pretrained(base, use_safetensors=True)
    tokenizer = _tokenizer(work) if new_words else shipped.tokenizer
    vae, unet, text_encoder = new_vae(), new_unet(), new_text_encoder(tokenizer)
    grow(vae, shipped.vae.state_dict())
    grow(unet, shipped.unet.state_dict())
    grow_text_encoder(text_encoder, tokenizer, shipped.text_encoder, shipped.tokenizer)
    return assemble(vae, unet, text_encoder, tokenizer)


def taught(base: Path, model: Model, go_on: bool) -> StableDiffusionPipeline:
    """A model that shares all but the UNet with its base."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, use_safetensors=True)
    pipeline.scheduler = new_scheduler()
    pipeline.unet = new_unet(model)
    if go_on:
        shipped = UNet2DConditionModel.from_pretrained(WEIGHTS / model / "unet")
        grow(pipeline.unet, shipped.state_dict())
    return pipeline


def _loss(base: Path, model: Model, pipeline: StableDiffusionPipeline, guidance: float) -> Loss:
    alphas = new_scheduler().alphas_cumprod.to(pipeline.device)
    if model == Model.base and guidance == 1:
        return Denoising(alphas)
    return Denoising(alphas, Teacher.of(pipeline, base, guidance))


def _components(work: Path, base: Path, anew: bool) -> Components:
    """Those beside the base, with more where latents have more channels now; or all anew."""
    file = work / COMPONENTS.name
    if not file.exists():
        kept = None if anew else Components.load(base.parent / COMPONENTS.name)
        if kept is None or kept.basis.shape[1] < LATENT_CHANNELS:
            kept = find_components(kept=kept)
        kept.save(file)
    return Components.load(file)


def _trained(
    vae: AutoencoderKL,
    components: Components,
    work: Path,
    steps: int,
    seed: int,
    threads: int,
    rate: float,
    bfloat16: bool,
) -> AutoencoderKL:
    folder = work / "vae"
    if not folder.exists():
        train_vae(vae, components, work, steps, seed, threads, rate, bfloat16)
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)


def _tokenizer(work: Path) -> CLIPTokenizer:
    folder = work / "tokenizer"
    if not folder.exists():
        learn_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    app()
