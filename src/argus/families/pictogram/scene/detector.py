"""Finds the things in a picture: a small network that has only ever seen rendered scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from argus.core.errors import ModelError
from argus.families.pictogram.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    PARTS,
    SIZE,
    SIZES,
)

WEIGHTS = Path(__file__).parent / "detector.safetensors"
STRIDE = 4
LOOKS = ("kind", "colour", "fill", "size", "second")
CELLS = SIZE // STRIDE
THRESHOLD = 0.4
HEADS = {
    "presence": 1,
    "place": 2,
    "kind": len(KINDS),
    "colour": len(COLOURS),
    "fill": len(FILLS),
    "size": len(SIZES),
    "second": len(COLOURS) + 1,
}


@dataclass(frozen=True)
class Thing:
    """A thing that was found. `x` and `y` are the pixels of its centre.

    `second` is the colour of its part, None if it has none of its own.
    """

    kind: str
    colour: str
    fill: str
    size: str
    x: float
    y: float
    second: str | None = None


@dataclass(frozen=True)
class Sight:
    """What a picture shows."""

    background: str
    things: tuple[Thing, ...]


class Detector(nn.Module):
    """Says for every cell of 4×4 pixels whether a thing's centre is in it, where, and its looks.

    Things are scored where they are (as CenterNet does, arXiv 1904.07850), since a network that is
    asked for the whole scene at once learns nothing in reasonable time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(
            _conv(3, 32, 2), _conv(32, 32), _conv(32, 64, 2), _Residual(64)
        )  # fmt: skip
        self.far = nn.Sequential(_conv(64, 128, 2), _Residual(128), _Residual(128))
        self.merge_near, self.merge_far = nn.Conv2d(64, 96, 1), nn.Conv2d(128, 96, 1)
        self.head = nn.Sequential(
            _conv(96, 96), _conv(96, 96), nn.Conv2d(96, sum(HEADS.values()), 1)
        )
        self.background = nn.Linear(128, len(BACKGROUNDS))
        nn.init.constant_(self.head[-1].bias[:1], -4.0)  # type: ignore[index]

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """`pixels` (n, 3, 64, 64) in [-1, 1] to maps (n, values, 16, 16) and backgrounds (n, 8)."""
        near = self.near(pixels)
        far = self.far(near)
        wide = F.interpolate(self.merge_far(far), scale_factor=2.0, mode="bilinear")
        maps = self.head(F.silu(self.merge_near(near) + wide))
        parts = maps.split(list(HEADS.values()), dim=1)
        return dict(zip(HEADS, parts, strict=True)), self.background(far.mean((2, 3)))

    @torch.inference_mode()
    def look(self, images: Sequence[Image.Image]) -> list[Sight]:
        """What is in each picture. Pictures of another size are brought to 64×64."""
        device = self.background.weight.device
        maps, backgrounds = self(to_pixels(images).to(device))
        presence = maps["presence"].sigmoid()
        peaks = presence == F.max_pool2d(presence, 3, stride=1, padding=1)
        found = (peaks & (presence > THRESHOLD))[:, 0].cpu().numpy()
        looks = {name: maps[name].argmax(1).cpu().numpy() for name in LOOKS}
        places = maps["place"].cpu().numpy()
        sights = []
        for i, background in enumerate(backgrounds.argmax(1).tolist()):
            things = tuple(
                _thing(
                    {name: int(of[i, row, column]) for name, of in looks.items()},
                    STRIDE * (column + float(places[i, 0, row, column])),
                    STRIDE * (row + float(places[i, 1, row, column])),
                )
                for row, column in np.argwhere(found[i])
            )
            sights.append(Sight(BACKGROUNDS[background], things))
        return sights


def _thing(looks: dict[str, int], x: float, y: float) -> Thing:
    kind, second = KINDS[looks["kind"]], looks["second"]
    return Thing(
        kind,
        COLOURS[looks["colour"]],
        FILLS[looks["fill"]],
        list(SIZES)[looks["size"]],
        x,
        y,
        COLOURS[second] if kind in PARTS and second < len(COLOURS) else None,
    )


def load_detector(path: Path = WEIGHTS, device: str = "cpu") -> Detector:
    """The trained detector. Raises ModelError if its weights are not those of this network."""
    detector = Detector()
    try:
        detector.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path} does not hold the detector's weights: {error}") from error
    return detector.float().eval().to(device)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as a (n, 3, 64, 64) tensor in [-1, 1]."""
    arrays = [
        np.asarray(
            image.convert("RGB")
            if image.size == (SIZE, SIZE)
            else image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        )
        for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.inner(x)
        return result
