"""Nirvana: how many steps a neighbour's latents replace, by similarity alone."""

from __future__ import annotations

from collections.abc import Sequence

from argus.control.batching import AdditiveIncrease
from argus.control.policy import Base, Cluster, Decision, Slo, first_free
from argus.control.request import Request
from argus.control.variants import EXACT, VariantTable


class Nirvana(Base):
    """K from similarity thresholds, whatever the load (Agarwal et al., NSDI 2024, section 5.2).

    The family defines the thresholds, because cosines differ between embeddings. Deviations: when
    the latents at the K that the similarity allows were evicted, the next smaller stored K is used;
    batches are Clipper's, since the paper defines none.
    """

    batching = AdditiveIncrease()

    def __init__(self, table: VariantTable, slos: Sequence[Slo]) -> None:
        super().__init__(table, slos)
        skipping = [v for v, k in enumerate(table.skip) if k > 0 and table.strategies[v] == "cache"]
        self._skips = sorted(skipping, key=lambda v: -table.skip[v])

    def route(self, request: Request, cluster: Cluster) -> Decision:
        variant, reason = self._chosen(request)
        worker = first_free(cluster, int(self.table.model[variant]))
        return Decision(variant, worker, reason)

    def _chosen(self, request: Request) -> tuple[int, str]:
        similarity = request.similarity
        if similarity is None:
            return EXACT, "no similar prompt is cached"
        near = [v for v in self._skips if similarity > self.table.least_similarity[v]]
        if not near:
            return EXACT, f"similarity {similarity:.3f} allows no skip"
        k = self.table.skip[near[0]]
        for v in near:
            if request.allowed[v]:
                return v, f"similarity {similarity:.3f} allows K={k}"
        return EXACT, f"the neighbour's latents at K={k} are not stored"
