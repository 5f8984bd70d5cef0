from __future__ import annotations

import pytest

from argus.core.errors import BadRequest
from argus.core.family import Family, Variant
from argus.server.routing import Router

FAMILY = Family(
    name="mine",
    description="",
    models={"large": "owner/large"},
    exact=Variant("large", "ddim", 64, 64, 50, 7.5),
    skips={5: 0.65, 10: 0.75, 15: 0.85, 20: 0.9, 25: 0.95},
)
ALL = tuple(FAMILY.skips)


@pytest.mark.parametrize(
    ("similarity", "variant"),
    [
        (1.0, "skip-25"),
        (0.951, "skip-25"),
        (0.95, "skip-20"),
        (0.86, "skip-15"),
        (0.8, "skip-10"),
        (0.66, "skip-5"),
        (0.65, "exact"),
        (-1.0, "exact"),
    ],
)
def test_nirvana_skips_by_the_published_thresholds(similarity: float, variant: str) -> None:
    decision = Router(FAMILY, "nirvana").choose(similarity, ALL)
    assert decision.variant == variant
    assert f"{similarity:.3f}" in decision.reason


def test_nirvana_uses_the_next_smaller_skip_when_latents_were_evicted() -> None:
    router = Router(FAMILY, "nirvana")
    assert router.choose(0.97, (5, 10, 25)).variant == "skip-25"
    assert router.choose(0.92, (5, 10, 25)).variant == "skip-10"
    assert router.choose(0.92, (25,)).variant == "exact"


def test_nirvana_without_a_neighbour_is_exact() -> None:
    assert Router(FAMILY, "nirvana").choose(None, ()).variant == "exact"


def test_clipper_ha_is_always_exact() -> None:
    assert Router(FAMILY, "clipper-ha").choose(1.0, ALL).variant == "exact"


def test_an_unknown_policy_is_refused_with_what_there_is() -> None:
    with pytest.raises(BadRequest, match="nirvana, clipper-ha"):
        Router(FAMILY, "best")


def test_every_variant_has_a_name() -> None:
    assert list(FAMILY.variants) == ["exact", *(f"skip-{k}" for k in ALL)]
    assert FAMILY.variants["skip-15"].skip == 15
