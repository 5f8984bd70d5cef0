"""The family's latents: the leading principal components of 8×8 pixels.

They are linear in the picture, so that a colour changes them in the same way whatever the shape and
a shape whatever the colour; the UNet then has to learn far less than from the code that an encoder
invents for itself. Decoding them is learnt, because sharp edges are not linear.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from argus.families.pictogram.networks import LATENT_CHANNELS
from argus.families.pictogram.train.drawing import pictures
from argus.families.pictogram.world import Scene, sample_scene

PATCH = 8
SCENES = 3000
THING_WEIGHT = 3.0


@dataclass(frozen=True)
class Components:
    """`mean` (192,) and `basis` (192, c) of a patch's pixels, `scale` (c,) of its latents.

    The scale is the root of what would make every component's variance 1, so that the leading ones,
    which decide what stands where, still stand out of the noise first. All together have mean
    square 1.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures (n, 3, 64, 64) in [-1, 1] as latents (n, c, 8, 8)."""
        patches = F.pixel_unshuffle(pixels, PATCH) - self.mean.view(1, -1, 1, 1)
        kernel = (self.basis * self.scale).T
        return F.conv2d(patches, kernel[:, :, None, None])

    def to(self, device: torch.device) -> Components:
        return Components(self.mean.to(device), self.basis.to(device), self.scale.to(device))

    def save(self, path: Path) -> None:
        save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> Components:
        return cls(**load_file(path))


def find_components(
    count: int = LATENT_CHANNELS, scenes: int = SCENES, kept: Components | None = None
) -> Components:
    """The components of rendered scenes; patches that show things count three times.

    With `kept`, those come first and the others are of what they leave, so that networks which
    know them need to learn the others only.
    """
    drawn = [sample_scene(random.Random(f"components {i}")) for i in range(scenes)]
    pixels = pictures(drawn)
    shown = F.pixel_unshuffle(things_of(drawn, pixels), PATCH).amax(1).reshape(-1, 1)
    patches = F.pixel_unshuffle(pixels, PATCH).permute(0, 2, 3, 1).reshape(-1, 3 * PATCH**2)
    weights = 1 + (THING_WEIGHT - 1) * shown
    mean = (patches * weights).sum(0) / weights.sum() if kept is None else kept.mean
    known = torch.zeros(len(mean), 0) if kept is None else kept.basis[:, :count]
    left = patches - mean
    left = left - left @ known @ known.T
    basis = torch.linalg.eigh((left * weights).T @ left / weights.sum())[1]
    basis = basis.flip(1)[:, : count - known.shape[1]]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = torch.cat([known, basis * largest.sign()], 1)  # an eigenvector may point either way
    latents = (patches - mean) @ basis
    scale = latents.std(0).rsqrt()
    scale = scale / (latents * scale).square().mean().sqrt()
    if kept is not None:
        scale[: known.shape[1]] = kept.scale
    return Components(mean, basis, scale)


def things_of(scenes: list[Scene], pixels: Tensor) -> Tensor:
    """Which pixels (n, 1, 64, 64) show a thing, 1 or 0."""
    empty = pictures([replace(scene, groups=()) for scene in scenes])
    return ((pixels - empty).abs().amax(1, keepdim=True) > 0.02).float()
