"""A family: models and variants that serve the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

EXACT = "exact"


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


@dataclass(frozen=True)
class Family:
    """`models` maps a model's name to its source: a folder or a hub id.

    `exact` is the best variant, the one whose quality is 1 by definition. `skips` maps every K
    that a cached latent may replace to the least similarity of the neighbour at which the
    published thresholds (policy `nirvana`) allow it.
    """

    name: str
    description: str
    models: dict[str, str]
    exact: Variant
    skips: dict[int, float]
    bundled: bool = False

    @property
    def variants(self) -> dict[str, Variant]:
        """Every variant by name, the exact one first."""
        skipping = {skip_name(k): replace(self.exact, skip=k) for k in self.skips}
        return {EXACT: self.exact, **skipping}

    def usable_skip(self, k: int, stored: tuple[int, ...]) -> int:
        """The largest K up to `k` that is a variant and whose latents are stored; 0 if none is."""
        return max((s for s in self.skips if s <= k and s in stored), default=0)


def skip_name(k: int) -> str:
    """The name of the variant that skips K steps."""
    return f"skip-{k}" if k else EXACT
