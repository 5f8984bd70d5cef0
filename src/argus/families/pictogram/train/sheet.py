"""Contact sheets: pictures of prompts that training never saw, each with its prompt below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

UNSEEN = (
    "a red house in the snow",
    "a small blue fish in the sea",
    "a large yellow sun in the sky",
    "a striped green umbrella on paper",
    "an outlined purple key in a room",
    "a dotted pink mushroom in a meadow",
    "a big black tree at night",
    "an orange cup in the desert",
    "three small yellow stars at night",
    "two red boats at sea",
    "four blue hearts on paper",
    "five tiny green trees in the snow",
    "a red circle left of a blue square",
    "a green tree to the right of a pink house, meadow",
    "a yellow moon above a black boat at night",
    "a purple cup below an orange flower in a room",
    "two red fish below a small boat, sea",
    "three pink flowers above a green mushroom, meadow",
    "a blue key between a red heart and a yellow star",
    "a small red star in front of a large blue moon at night",
    "a green fish, a red cup and a purple triangle on paper",
    "two striped orange squares left of three black keys, desert",
    "a zebra playing the violin",
    "a dotted red umbrella and an outlined blue house in the snow",
    "a red cup with a blue handle in a room",
    "a checked black boat with yellow sails at sea",
    "seven purple hearts on paper",
    "two yellow houses with green roofs, meadow",
    "nine small yellow stars at night",
    "two pink flowers with red centres left of an orange tree with a purple trunk",
)


def draw_sheet(
    pipeline: StableDiffusionPipeline, steps: int, guidance: float, prompts: Sequence[str] = UNSEEN
) -> Image.Image:
    """Paint each prompt once, from its own seed, and lay the pictures out under one another."""
    pipeline.set_progress_bar_config(disable=True)
    painted = pipeline(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    )
    return lay_out(painted.images, prompts)


def lay_out(
    pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 6, zoom: int = 3
) -> Image.Image:
    """Pictures in a grid, each `zoom` times its size with its label below."""
    font = ImageFont.load_default(size=15)
    side, foot, gap = pictures[0].width * zoom, 62, 12
    rows = -(-len(pictures) // columns)
    width, height = columns * (side + gap) + gap, rows * (side + foot + gap) + gap
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x = gap + (i % columns) * (side + gap)
        y = gap + (i // columns) * (side + foot + gap)
        page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        lines = "\n".join(textwrap.wrap(label, side // 7)[:3])
        pen.multiline_text((x, y + side + 4), lines, fill=(40, 40, 50), font=font, spacing=2)
    return page
