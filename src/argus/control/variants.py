"""The variant table: what each variant costs on each type of device, and its mean quality.

Axes of arrays: v variants, m models, d types of device, b batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from argus.core.family import Family
from argus.core.profile import Profile

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]

EXACT = 0  # the exact variant is the first
RESERVE = 0.7  # of a deadline, for running; the rest is for waiting


@dataclass(frozen=True)
class VariantTable:
    """The variants, the exact one first, and the types of device.

    `strategies` are `exact`, `cache`, `model`, `steps` or `refine`; `model` (v,) is the model of a
    variant, `steps` (v,) its work steps: those it denoises, with encoding and decoding counted as
    steps; `skip` (v,) is the K it skips and `least_similarity` (v,) the published threshold for
    that. `mean_quality` (v,) is for policies without predictions. `step_s` (d, m, b) are seconds of
    a step of a batch of `batches` (b,), ascending from 1, and `load_s` (d, m) seconds to load a
    model.
    """

    variants: tuple[str, ...]
    strategies: tuple[str, ...]
    models: tuple[str, ...]
    types: tuple[str, ...]
    model: Whole
    steps: Numbers
    skip: Whole
    least_similarity: Numbers
    mean_quality: Numbers
    batches: Whole
    step_s: Numbers
    load_s: Numbers
    _curves: dict[tuple[int, int], list[float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def alone_s(self) -> Numbers:
        """Seconds (v, d) of one picture on an idle worker."""
        return self.picture_s[:, :, 0]

    @cached_property
    def sizes(self) -> Whole:
        """Every batch size up to the largest (s,)."""
        return np.arange(1, int(self.batches[-1]) + 1)

    @cached_property
    def picture_s(self) -> Numbers:
        """Seconds (v, d, s) of a batch of pictures; linear between measured sizes."""
        step_s = np.apply_along_axis(
            lambda known: np.interp(self.sizes, self.batches, known), 2, self.step_s
        )
        times: Numbers = self.steps[:, None, None] * step_s[:, self.model].transpose(1, 0, 2)
        return times

    @cached_property
    def slo_s(self) -> float:
        """Seconds of `1x`: the exact variant's latency, alone on the fastest type of device."""
        return float(self.alone_s[EXACT].min())

    @cached_property
    def best_batch(self) -> Whole:
        """The batch size (d, m) with most pictures a second."""
        best: Whole = self.batches[(self.batches / self.step_s).argmax(axis=2)]
        return best

    def cost_s(self, deadline_s: float) -> Numbers:
        """Worker-seconds per picture (v, d), in the best batch that takes no more than `RESERVE` of
        a deadline; alone where all batches take longer."""
        cost: Numbers = self._chosen_s(deadline_s) / self.sizes[self._batch(deadline_s)]
        return cost

    def full_s(self, deadline_s: float) -> Numbers:
        """Seconds (v, d) of the batch of `cost_s`."""
        return self._chosen_s(deadline_s)

    def _batch(self, deadline_s: float) -> Whole:
        """Index (v, d) in `sizes` of the batch of `cost_s`."""
        in_time = self.picture_s <= RESERVE * deadline_s
        best: Whole = np.where(in_time, self.sizes / self.picture_s, 0.0).argmax(axis=2)
        return best

    def _chosen_s(self, deadline_s: float) -> Numbers:
        batch = self._batch(deadline_s)[:, :, None]
        chosen: Numbers = np.take_along_axis(self.picture_s, batch, axis=2)[:, :, 0]
        return chosen

    def batch_step_s(self, kind: int, model: int, size: int) -> float:
        """Seconds of a step of `size` pictures; linear between measured sizes, and beyond them in
        proportion to the size."""
        curve = self._curves.get((kind, model))
        if curve is None:
            curve = [0.0, *np.interp(self.sizes, self.batches, self.step_s[kind, model]).tolist()]
            self._curves[kind, model] = curve
        if size < len(curve):
            return curve[size]
        return curve[-1] * size / (len(curve) - 1)


def variant_table(family: Family, profile: Profile | None = None) -> VariantTable:
    """The variant table of a family on one type of device.

    Encoding and decoding count as steps, at the model's best batch. Without a profile every step of
    every model takes a second: enough for policies that ignore costs.
    """
    variants = family.variants
    names, models = tuple(variants), list(dict.fromkeys(one.model for one in variants.values()))
    measured = profile.models if profile else {}
    batches = (
        sorted(set.intersection(*(set(measured[m].step_s) for m in models if m in measured)))
        if measured
        else [1]
    )
    step_s = [
        [measured[m].batch_step_s(b) if m in measured else float(b) for b in batches]
        for m in models
    ]
    steps = []
    for one in variants.values():
        extra = 0.0
        if one.model in measured:
            model = measured[one.model]
            best = model.best_batch
            extra = model.encode_s + model.batch_decode_s(best) / best
            extra /= model.batch_step_s(best) / best
        steps.append(one.steps - one.skip + extra)
    return VariantTable(
        variants=names,
        strategies=tuple(family.strategy(name) for name in names),
        models=tuple(models),
        types=(str(profile.device.get("name", "device")) if profile else "device",),
        model=np.array([models.index(one.model) for one in variants.values()]),
        steps=np.array(steps),
        skip=np.array([one.skip for one in variants.values()]),
        least_similarity=np.array([family.skips.get(one.skip, 0.0) for one in variants.values()]),
        mean_quality=np.ones(len(names)),
        batches=np.array(batches),
        step_s=np.array([step_s]),
        load_s=np.array(
            [[measured[m].load_s["page_cache"] if m in measured else 0.0 for m in models]]
        ),
    )
