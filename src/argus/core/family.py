"""A family: models and variants that serve the same prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One way to make a picture. `width` and `height` are pixels, `guidance` as in `Job`."""

    model: str
    sampler: str
    width: int
    height: int
    steps: int
    guidance: float
    skip: int = 0


@dataclass(frozen=True)
class Family:
    """`models` maps a model's name to its source: a folder or a hub id.

    `exact` is the best variant, the one whose quality is 1 by definition.
    """

    name: str
    description: str
    models: dict[str, str]
    exact: Variant
    bundled: bool = False
