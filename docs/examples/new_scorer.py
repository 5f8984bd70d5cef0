"""A scorer of one's own: whether a picture shows the colour that its prompt names.

    python docs/examples/new_scorer.py

A family names it as `scorer: {kind: "new_scorer:NamedColour"}`; the module must be importable where
Argus runs (`PYTHONPATH=docs/examples argus calibrate docs/examples/family.yaml ...`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

import argus

NEAR = 0.25  # distance in RGB, as a share of the largest, up to which a pixel has a colour
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")


class NamedColour:
    """Scores are shares of pixels: those near the colours that the prompt names, up to 1."""

    @classmethod
    def load(cls, source: str | None, device: str) -> NamedColour:
        """What Argus calls. `source` is that of the family file; a scorer with weights loads them
        from there, to `device`."""
        del source, device
        return cls()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """The score (n,) of each picture for the prompt at the same place; higher is better."""
        scores = [self._one(*pair) for pair in zip(prompts, images, strict=True)]
        return np.array(scores, np.float32)

    def _one(self, prompt: str, image: Image.Image) -> float:
        pixels = np.asarray(image.convert("RGB"), float) / 255
        named = [colour for colour in COLOURS if colour in prompt.split()]
        wanted = [np.array(ImageColor.getrgb(colour)) / 255 for colour in named]
        near = [np.linalg.norm(pixels - one, axis=-1) < NEAR * 3**0.5 for one in wanted]
        return float(np.mean(np.any(near, axis=0))) if near else 0.0


if __name__ == "__main__":
    prompt = "a large red fish in the sea"
    image = argus.load("pictogram").generate(prompt, seed=1).image
    scorer = NamedColour.load(None, "cpu")
    for asked in (prompt, "a large yellow fish in the sea"):
        print(f"{asked}: {scorer.score([asked], [image])[0]:.3f}")
