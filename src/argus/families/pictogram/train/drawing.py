"""Scenes to train on, and their pictures as tensors."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from argus.families.pictogram.draw import draw_scene
from argus.families.pictogram.scene.detector import to_pixels
from argus.families.pictogram.world import Scene, sample_scene


def pictures(scenes: list[Scene]) -> Tensor:
    """Scenes drawn as a (n, 3, 64, 64) tensor in [-1, 1]."""
    return to_pixels([draw_scene(scene) for scene in scenes])


def as_bytes(pixels: Tensor) -> Tensor:
    """Pictures in [-1, 1] in a quarter of the memory; `as_pixels` turns them back."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def as_pixels(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def training_scenes(seed: int, count: int) -> list[Scene]:
    """Scene i is the same for every `count`."""
    return [sample_scene(random.Random(f"scene {seed} {i}")) for i in range(count)]
