"""The variant table: what each variant costs on each type of device, and its mean quality.

Axes of arrays: v variants, m models, d types of device, b batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from argus.core.family import Family
from argus.core.profile import ModelProfile, Profile

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
    model. `able` (d, m) says which models a type's workers can hold, None that they can hold all.
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
    able: Flags | None = None
    _curves: dict[tuple[int, int], list[float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def holds(self) -> Flags:
        """Whether a worker of a type can hold a model (d, m)."""
        return np.ones(self.load_s.shape, dtype=bool) if self.able is None else self.able

    @cached_property
    def runs(self) -> Flags:
        """Whether a variant can run on a type (v, d)."""
        runs: Flags = self.holds[:, self.model].T
        return runs

    def home(self, kind: int) -> int:
        """The model that a type's workers begin with: the first that they can hold."""
        return int(self.holds[kind].argmax())

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
        return float(self.alone_s[EXACT][self.runs[EXACT]].min(initial=np.inf))

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


@dataclass(frozen=True)
class DeviceType:
    """A type of device: its name, what was measured on it (None: nothing yet), and the models that
    its workers can hold (None: every one)."""

    name: str
    profile: Profile | None = None
    models: frozenset[str] | None = None

    @classmethod
    def of(cls, profile: Profile | None) -> DeviceType:
        """The type that a profile was measured on."""
        name = "device" if profile is None else str(profile.device.get("name", "device"))
        return cls(name, profile)

    def holds(self, model: str) -> bool:
        return self.models is None or model in self.models


def variant_table(family: Family, types: Sequence[DeviceType]) -> VariantTable:
    """The variant table of a family on some types of device, at least one.

    Encoding and decoding count as steps, at the model's best batch; where types differ in that, as
    their mean. A type without a profile counts as what the first type with one is; if none has
    one, every step of every model takes a second: enough for policies that ignore costs. What a
    type cannot hold has the times of the slowest that can.
    """
    variants = family.variants
    models = list(dict.fromkeys(one.model for one in variants.values()))
    first = next((one.profile for one in types if one.profile is not None), None)
    profiles = [one.profile or first for one in types]
    known = [[_known(one, m) for m in models] for one in profiles]
    able = np.array([[one.holds(m) for m in models] for one in types])
    sizes = [set(one.step_s) for row in known for one in row if one is not None]
    batches = sorted(set.intersection(*sizes)) if sizes else [1]
    step_s = np.array(
        [
            [[one.batch_step_s(b) if one else float(b) for b in batches] for one in row]
            for row in known
        ]
    )
    slowest = np.where(able[:, :, None], step_s, 0.0).max(axis=0)
    step_s = np.where(able[:, :, None], step_s, np.maximum(slowest, step_s * (slowest == 0)))
    steps = [
        one.work_steps + _extra_steps([row[models.index(one.model)] for row in known])
        for one in variants.values()
    ]
    return VariantTable(
        variants=tuple(variants),
        strategies=tuple(family.strategy(name) for name in variants),
        models=tuple(models),
        types=tuple(one.name for one in types),
        model=np.array([models.index(one.model) for one in variants.values()]),
        steps=np.array(steps),
        skip=np.array([one.skip for one in variants.values()]),
        least_similarity=np.array([family.skips.get(one.skip, 0.0) for one in variants.values()]),
        mean_quality=np.ones(len(variants)),
        batches=np.array(batches),
        step_s=step_s,
        load_s=np.array(
            [[one.load_s["page_cache"] if one else 0.0 for one in row] for row in known]
        ),
        able=None if able.all() else able,
    )


def _known(profile: Profile | None, model: str) -> ModelProfile | None:
    return None if profile is None else profile.models.get(model)


def _extra_steps(profiles: Sequence[ModelProfile | None]) -> float:
    """Encoding and decoding of a picture in steps, the mean of a model's profiles."""
    extra = []
    for one in profiles:
        if one is not None:
            best = one.best_batch
            work_s = one.encode_s + one.batch_decode_s(best) / best
            extra.append(work_s / (one.batch_step_s(best) / best))
    return sum(extra) / len(extra) if extra else 0.0
