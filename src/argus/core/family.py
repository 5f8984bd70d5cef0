"""A family: models and variants that serve the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from argus.core.job import Job

EXACT = "exact"
STRATEGIES = ("exact", "cache", "model", "steps")
UPSTREAM = "upstream"  # source of a model whose weights are not here
SIDE_STEP = 8  # every Stable Diffusion model takes only sides that are multiples of this


@dataclass(frozen=True)
class Variant:
    """One way to make a picture. `width` and `height` are pixels, `guidance` as in `Job`.

    `skip` is K: how many of the first of `steps` denoising steps cached latents replace. `extra`
    are fields that an upstream gets with every request for it. `scale` is the ratio of its sides to
    those that a picture of the family has; the picture is enlarged by as much.
    """

    model: str
    sampler: str
    width: int
    height: int
    steps: int
    guidance: float
    skip: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scale: float = 1.0

    @property
    def work_steps(self) -> float:
        """Its denoising in steps of a picture of the family's size: the cost of a step is taken to
        be proportional to the area."""
        return (self.steps - self.skip) * self.scale**2

    @property
    def facts(self) -> dict[str, Any]:
        """All that tells it from other variants, for hashes."""
        usual = {"extra": {}, "scale": 1.0}
        return {k: fact for k, fact in asdict(self).items() if usual.get(k) != fact}

    def sides(self, width: int, height: int) -> tuple[int, int]:
        """The sides at which it makes a picture of some size, in pixels."""
        if self.scale == 1.0:
            return width, height

        def scaled(side: int) -> int:
            return SIDE_STEP * max(1, round(side * self.scale / SIDE_STEP))

        return scaled(width), scaled(height)

    def job(self, prompt: str, seed: int) -> Job:
        """The job of a picture by this variant."""
        return Job(
            prompt, seed=seed, steps=self.steps, guidance=self.guidance, skip=self.skip,
            width=self.width, height=self.height, extra=self.extra,
        )  # fmt: skip


@dataclass(frozen=True)
class ScorerSpec:
    """Which scorer judges a family's pictures.

    `kind` is `clip`, `pickscore`, or `module:Class` for one of your own; `source` is the folder or
    hub id of its weights, if it needs one. A scorer may value a picture in several ways: `score` is
    the one that quality is made of, None its first. `unrelated` is s₀, its mean score of pictures
    of unrelated prompts, once that is measured.
    """

    kind: str
    source: str | None = None
    unrelated: float | None = None
    score: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a family's pictures, as width and height in pixels.

    `native` are those it is made for, the exact variant's first. Pictures of another size are made
    at the native one nearest in shape and resized, up to `limit` pixels a side; without a `limit`
    they are made at that size, if it is near the exact variant's.
    """

    native: tuple[tuple[int, int], ...]
    limit: int | None = None

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """The native size of the most similar shape; of several, the one nearest in area."""

        def unlike(size: tuple[int, int]) -> tuple[float, float]:
            shape = abs(math.log(size[0] * height / (size[1] * width)))
            return round(shape, 6), abs(math.log(size[0] * size[1] / (width * height)))

        return min(self.native, key=unlike)


@dataclass(frozen=True)
class Family:
    """`models` maps a model's name to its source: a folder, a hub id, or `UPSTREAM` for one that
    only an upstream has.

    `exact` is the best variant, the one whose quality is 1 by definition. `skips` maps every K that
    cached latents may replace to the least similarity of the neighbour at which the published
    thresholds (policy `nirvana`) allow it. `cheaper` are variants with fewer steps or another
    model. `encoder` is the folder or hub id of the text encoder that embeds prompts, by default
    the exact model's. `ideas` is `module:Class` of the source of the family's own prompts,
    `examples` are a few prompts to show people.
    `folder` holds the family's file, its profile, quality table and predictor.
    """

    name: str
    description: str
    models: dict[str, str]
    exact: Variant
    skips: dict[int, float]
    sizes: Sizes
    cheaper: dict[str, Variant] = field(default_factory=dict)
    scorer: ScorerSpec | None = None
    encoder: str | None = None
    ideas: str | None = None
    examples: tuple[str, ...] = ()
    folder: str = "."
    bundled: bool = False

    @property
    def variants(self) -> dict[str, Variant]:
        """Every variant by name, the exact one first."""
        skipping = {skip_name(k): replace(self.exact, skip=k) for k in self.skips}
        return {EXACT: self.exact, **skipping, **self.cheaper}

    @property
    def encoder_source(self) -> str:
        """The folder or hub id of the text encoder that embeds prompts."""
        return self.encoder or self.models[self.exact.model]

    def strategy(self, variant: str) -> str:
        """How a variant saves time, one of `STRATEGIES`."""
        chosen = self.variants[variant]
        if chosen.skip:
            return "cache"
        if chosen.model != self.exact.model:
            return "model"
        return "exact" if variant == EXACT else "steps"

    def usable_skip(self, k: int, stored: tuple[int, ...]) -> int:
        """The largest K up to `k` that is a variant and whose latents are stored; 0 if none is."""
        return max((s for s in self.skips if s <= k and s in stored), default=0)


def skip_name(k: int) -> str:
    """The name of the variant that skips K steps."""
    return f"skip-{k}" if k else EXACT
