"""`python -m argus.families.pictogram.train`: make the weights, from nothing or further."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from argus.families.pictogram import BASE, COMPONENTS
from argus.families.pictogram.networks import (
    new_text_encoder,
    new_unet,
    new_vae,
    save_pipeline,
)
from argus.families.pictogram.tokenizer import learn_tokenizer
from argus.families.pictogram.train.autoencoder import train_vae
from argus.families.pictogram.train.components import Components, find_components
from argus.families.pictogram.train.painter import train_painter
from argus.families.pictogram.train.reading import train_reader

app = typer.Typer(add_completion=False)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder for checkpoints, sheets and the result.")],
    vae_steps: Annotated[int, typer.Option(help="Batches of 12 pictures for the VAE.")] = 4000,
    reader_steps: Annotated[
        int, typer.Option(help="Batches of 96 captions for the text encoder.")
    ] = 4000,
    steps: Annotated[int, typer.Option(help="Batches of 64 pictures for the UNet.")] = 20_000,
    scenes: Annotated[int, typer.Option(help="Scenes whose latents are computed once.")] = 40_000,
    seed: Annotated[int, typer.Option(help="Seed of weights, scenes and captions.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    go_on: Annotated[bool, typer.Option(help="Start from the shipped weights.")] = False,
    sheet_every: Annotated[
        int, typer.Option(help="Batches between contact sheets; 0: none.")
    ] = 1000,
) -> None:
    """Train the pictogram family and leave a StableDiffusionPipeline folder in WORK/weights.

    Run again with the same options, it goes on where it was stopped. With --go-on it starts from
    the shipped weights (use another WORK and another --seed, so that it sees new scenes); their VAE
    and their text encoder stay as they are with --vae-steps 0 and --reader-steps 0.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    where = torch.device(device)
    if go_on:
        shipped = StableDiffusionPipeline.from_pretrained(BASE, use_safetensors=True)
        vae, tokenizer = shipped.vae, shipped.tokenizer
        unet, text_encoder = shipped.unet, shipped.text_encoder
    else:
        vae, tokenizer = new_vae(), _tokenizer(work)
        unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    components = _components(work, COMPONENTS if go_on else None)
    if vae_steps:
        vae = _trained(vae, components, work, vae_steps, seed, where)
    text_encoder.to(where)
    if reader_steps:
        train_reader(work, reader_steps, seed, text_encoder, tokenizer)
    text_encoder.requires_grad_(False).eval()
    vae.requires_grad_(False).eval().to(where)
    train_painter(
        work, steps, seed, scenes, components, vae, unet.to(where), text_encoder, tokenizer,
        sheet_every,
    )  # fmt: skip
    save_pipeline(work / "weights", vae, unet, text_encoder, tokenizer)
    size = sum(path.stat().st_size for path in (work / "weights").rglob("*") if path.is_file())
    print(f"saved {work / 'weights'}, {size / 1e6:.1f} MB")


def _components(work: Path, shipped: Path | None) -> Components:
    file = work / COMPONENTS.name
    if shipped is not None:
        return Components.load(shipped)
    if not file.exists():
        find_components().save(file)
    return Components.load(file)


def _trained(
    vae: AutoencoderKL,
    components: Components,
    work: Path,
    steps: int,
    seed: int,
    device: torch.device,
) -> AutoencoderKL:
    folder = work / "vae"
    if not folder.exists():
        train_vae(vae.to(device), components, work, steps, seed)
    return AutoencoderKL.from_pretrained(folder, use_safetensors=True)


def _tokenizer(work: Path) -> CLIPTokenizer:
    folder = work / "tokenizer"
    if not folder.exists():
        learn_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    app()
