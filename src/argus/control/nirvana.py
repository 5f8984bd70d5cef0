"""Nirvana: how much of the denoising a neighbour's latents replace, by similarity alone."""

from __future__ import annotations

from argus.control.policy import Candidate, Decision
from argus.core.family import EXACT, Family, skip_name


class Nirvana:
    """K from similarity thresholds, blind to load (Agarwal et al., NSDI 2024, section 5.2).

    The family carries the thresholds, because a cosine means something else in every embedding.
    Deviation: when the latents of the K that the similarity allows were evicted, the next smaller
    K that is stored is used.
    """

    def __init__(self, family: Family) -> None:
        self._family = family

    def route(self, candidate: Candidate) -> Decision:
        similarity = candidate.similarity
        if similarity is None:
            return Decision(EXACT, "no similar prompt is cached")
        allowed = max((k for k, s in self._family.skips.items() if similarity > s), default=0)
        if not allowed:
            return Decision(EXACT, f"similarity {similarity:.3f} allows no skip")
        k = self._family.usable_skip(allowed, candidate.stored)
        if not k:
            return Decision(EXACT, f"the neighbour's latents at K={allowed} are not stored")
        return Decision(skip_name(k), f"similarity {similarity:.3f} allows K={allowed}")
