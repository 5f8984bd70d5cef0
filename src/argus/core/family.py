"""A family: models and variants that serve the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from argus.core.job import Job

EXACT = "exact"
STRATEGIES = ("exact", "cache", "model", "steps")


@dataclass(frozen=True)
class Variant:
    """One way to make a picture. `width` and `height` are pixels, `guidance` as in `Job`.

    `skip` is how many of the first of `steps` denoising steps a cached latent replaces.
    """

    model: str
    sampler: str
    width: int
    height: int
    steps: int
    guidance: float
    skip: int = 0

    def job(self, prompt: str, seed: int) -> Job:
        """A picture to make in this way."""
        return Job(
            prompt, seed=seed, steps=self.steps, guidance=self.guidance, skip=self.skip,
            width=self.width, height=self.height,
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
class Family:
    """`models` maps a model's name to its source: a folder or a hub id.

    `exact` is the best variant, the one whose quality is 1 by definition. `skips` maps every K
    that a cached latent may replace to the least similarity of the neighbour at which the
    published thresholds (policy `nirvana`) allow it. `cheaper` are variants with fewer steps or
    another model. `ideas` is `module:Class` of where the family's own prompts come from. `folder`
    is where the family's file is; what was measured of it lies beside it.
    """

    name: str
    description: str
    models: dict[str, str]
    exact: Variant
    skips: dict[int, float]
    cheaper: dict[str, Variant] = field(default_factory=dict)
    scorer: ScorerSpec | None = None
    ideas: str | None = None
    folder: str = "."
    bundled: bool = False

    @property
    def variants(self) -> dict[str, Variant]:
        """Every variant by name, the exact one first."""
        skipping = {skip_name(k): replace(self.exact, skip=k) for k in self.skips}
        return {EXACT: self.exact, **skipping, **self.cheaper}

    def strategy(self, variant: str) -> str:
        """By what a variant saves time, one of `STRATEGIES`."""
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
