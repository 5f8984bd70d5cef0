"""The family that a server serves: folders of weights, costs, and the scope of its latents."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from argus.cache.scope import Scope
from argus.config import Settings, Upstream
from argus.control.variants import DeviceType, VariantTable, variant_table
from argus.core.errors import BadRequest, ModelError
from argus.core.family import UPSTREAM, Family, Variant
from argus.core.machine import cores
from argus.core.profile import MAX_BATCH, Profile
from argus.engine.sources import (
    default_dtype,
    encoder_folder,
    family_fingerprint,
    fingerprint,
    model_folder,
    portable,
    settled,
    weights_of,
)
from argus.families.catalog import default_family, find_family
from argus.files import restore_folder
from argus.quality.predictor import Predictor
from argus.server.upstreams import DEVICE, Group, best_in_flight, groups_of, own_models
from argus.workers.worker import Model

if TYPE_CHECKING:
    from argus.workers.ray import RayCluster

log = logging.getLogger(__name__)

PROFILE, PREDICTOR = "profile.json", "predictor"
DEFAULT_TYPE = "default"  # of devices, in `cost_per_hour`
CPU_WORKERS = 2  # one keeps the exact model while the other loads another


@dataclass(frozen=True)
class Place:
    """Where workers of one type of device are: the device of each (`cuda` is its first GPU), its
    CPU threads (None: torch's default), and whether it is another machine, which has models of its
    own; or the group of upstreams that they are."""

    type: DeviceType
    device: str
    threads: int | None = None
    elsewhere: bool = False
    group: Group | None = None


@dataclass(frozen=True)
class ServedFamily:
    """A family and how it is served. `id` names the exact model's weights, so that latents of other
    weights never match.

    `table` has the variants that are served, `models` (d, m) what a worker of a type of device
    loads for each model of the table, `devices` the device of each worker of this machine,
    `upstreams` the servers that are workers, with the number of their type. `encoder` is the folder
    of the text encoder that embeds prompts. Without a `predictor` qualities are unknown; without
    profiles (`profiled` is false) the table's costs are guesses. `made_for` is the fingerprint that
    a predictor must be trained for. `cost_per_s` is what a worker's second costs by type of device,
    None if no costs are set.
    """

    family: Family
    id: str
    table: VariantTable
    models: tuple[tuple[Model, ...], ...]
    devices: tuple[str, ...]
    upstreams: tuple[tuple[Upstream, int], ...]
    encoder: Path
    predictor: Predictor | None
    predictor_folder: Path | None
    made_for: str
    profiled: bool
    cost_per_s: tuple[float, ...] | None

    @classmethod
    def of(cls, settings: Settings, cluster: RayCluster | None = None) -> ServedFamily:
        """The family that the settings name, on workers of a cluster; without one, of this machine.

        Raises BadRequest and ModelError for settings that cannot be served.
        """
        whole = default_family() if settings.family is None else find_family(settings.family)
        samplers = _samplers(whole)
        cheaper = {
            name: variant
            for name, variant in whole.cheaper.items()
            if samplers[variant.model] == variant.sampler
        }
        family = replace(whole, cheaper=cheaper)
        groups, own = groups_of(settings, family), own_models(family)
        devices: tuple[str, ...] = ()
        places: list[Place] = []
        if cluster is not None:
            places = _cluster_places(settings, family, cluster, own)
        elif own:
            here, devices = _this_machine(settings, family, own)
            places = [here]
        upstreams = tuple(
            (one, len(places) + number)
            for number, group in enumerate(groups)
            for one in group.upstreams
        )
        places += [_upstream_place(settings, family, group) for group in groups]
        types = [one.type for one in places]
        profiled = all(one.profile is not None for one in types)
        made_for = family_fingerprint(whole)
        predictor, predictor_folder = _predictor(settings, whole, made_for)
        table = variant_table(
            family, types if profiled else [replace(one, profile=None) for one in types]
        )
        if predictor is not None:
            usual = dict(zip(predictor.variants, predictor.usual.tolist(), strict=True))
            means = np.array([usual[name] for name in table.variants])
            table = replace(table, mean_quality=means)
        models = tuple(
            tuple(_model(settings, family, place, name, samplers[name]) for name in table.models)
            for place in places
        )
        exact = family.exact.model
        return cls(
            family, f"{exact}@{weights_of(family.models[exact])}", table, models, devices,
            upstreams, encoder_folder(family.encoder_source), predictor, predictor_folder, made_for,
            profiled, _costs(settings, table.types, groups),
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """The folder of the exact model. Raises ModelError if its weights are not here."""
        return model_folder(self.family.models[self.family.exact.model])

    @property
    def variants(self) -> dict[str, Variant]:
        """The family's variants that are served."""
        return self.family.variants

    def scope(
        self, namespace: str, width: int, height: int, guidance: float, negative_prompt: str
    ) -> Scope:
        """The cache scope of an exact run with these settings."""
        exact = self.family.exact
        return Scope(
            namespace, self.id, exact.sampler, width, height, exact.steps, guidance,
            negative_prompt,
        )  # fmt: skip


def _costs(
    settings: Settings, types: Sequence[str], groups: Sequence[Group]
) -> tuple[float, ...] | None:
    """What a worker's second costs by type of device. Raises BadRequest for an unknown type."""
    given = settings.cost_per_hour
    if given is None:
        given = {}
    elif not isinstance(given, dict):
        given = {DEFAULT_TYPE: given}
    for name in given:
        if name not in (*types, DEFAULT_TYPE):
            known = ", ".join([*types, DEFAULT_TYPE])
            raise BadRequest(f"cost_per_hour is given for {name!r}; the types are {known}.")
    for group in groups:
        if group.first.cost_per_hour is not None:
            given = given | {group.name: group.first.cost_per_hour}
    if not given and settings.cost_per_hour is None:
        return None
    for name in types:
        if name not in given and DEFAULT_TYPE not in given:
            raise BadRequest(f"cost_per_hour lacks {name!r}: give it, or {DEFAULT_TYPE!r}.")
    return tuple(given.get(name, given.get(DEFAULT_TYPE, 0.0)) / 3600 for name in types)


def _samplers(family: Family) -> dict[str, str]:
    """The sampler that each model is loaded with: that of its first variant."""
    samplers: dict[str, str] = {}
    for variant in family.variants.values():
        samplers.setdefault(variant.model, variant.sampler)
    return samplers


def profile_of(
    given: Path | None, family: Family, device: str, models: Collection[str]
) -> Profile | None:
    """The family's profile of some models on such a device, in the file `given` or shipped with it;
    or None.

    Raises ModelError for a profile that cannot be read or is of another family.
    """
    shipped = Path(family.folder) / PROFILE
    if given is None and not shipped.is_file():
        return None
    file = given or shipped
    profile = Profile.read(file)
    known = not set(models).isdisjoint(profile.models)
    if given is not None and (profile.family != family.name or not known):
        raise ModelError(f"The profile {file} is of {profile.family!r}, not of {family.name!r}.")
    alike = str(profile.device["device"]).partition(":")[0] == device.partition(":")[0]
    lacking = set(models) - set(profile.models)
    if lacking and alike:
        log.warning("The profile %s lacks %s: make it again", file, ", ".join(sorted(lacking)))
    return profile if alike and not lacking else None


def _best_batch(profile: Profile | None, model: str) -> int:
    """The largest batch that the profile finds useful; the engine's limit without a profile."""
    return MAX_BATCH if profile is None else profile.models[model].best_batch


def _predictor(
    settings: Settings, family: Family, made_for: str
) -> tuple[Predictor | None, Path | None]:
    """The predictor and its folder: one that the server trained, else the one that ships.

    Raises ModelError for a configured one that cannot be used.
    """
    if settings.predictor is not None:
        return Predictor.load(settings.predictor, made_for), settings.predictor
    restore_folder(settings.data / PREDICTOR)
    for folder in (settings.data / PREDICTOR, Path(family.folder) / PREDICTOR):
        if not folder.is_dir():
            continue
        try:
            return Predictor.load(folder, made_for), folder
        except ModelError as error:
            log.warning("%s", error)
    return None, None


def _model(settings: Settings, family: Family, place: Place, name: str, sampler: str) -> Model:
    """What a worker of a place loads to hold a model."""
    source = family.models[name]
    if place.group is not None or source == UPSTREAM:
        most = 1 if place.group is None else best_in_flight(place.type.profile, place.group)
        return Model(f"{UPSTREAM} {name}", max_batch=most)
    folder = model_folder(source)
    return Model(
        portable(source) if place.elsewhere else str(folder),
        sampler,
        place.device,
        settings.dtype or default_dtype(place.device),
        max_batch=settings.max_batch or _best_batch(place.type.profile, name),
        compiled=settings.compile,
        threads=place.threads,
        weights=fingerprint(folder) if place.elsewhere else None,
    )


def _upstream_place(settings: Settings, family: Family, group: Group) -> Place:
    profile = profile_of(
        group.first.profile or (None if own_models(family) else settings.profile),
        family, DEVICE, [group.model],
    )  # fmt: skip
    kind = DeviceType(group.name, profile, frozenset([group.model]))
    return Place(kind, DEVICE, group=group)


def _only(own: Collection[str], family: Family) -> frozenset[str] | None:
    """The models that a worker of ours can hold, None if it can hold every one."""
    used = {variant.model for variant in family.variants.values()}
    return None if used <= set(own) else frozenset(own)


def _cluster_places(
    settings: Settings, family: Family, cluster: RayCluster, own: Collection[str]
) -> list[Place]:
    """A cluster's types of worker."""
    places = []
    several = len(cluster.types) > 1
    for kind, (name, one) in enumerate(cluster.types.items()):
        device = cluster.device(kind)
        profile = None
        if one.profile is not None or not several:  # one type's would be wrong for another
            profile = profile_of(one.profile or settings.profile, family, device, own)
        type_ = DeviceType(name, profile, _only(own, family))
        places.append(Place(type_, device, cluster.threads(kind), elsewhere=True))
    return places


def _this_machine(
    settings: Settings, family: Family, own: Collection[str]
) -> tuple[Place, tuple[str, ...]]:
    """This machine as a place of workers, and the device of each."""
    device, _ = settled(settings.device, settings.dtype)
    devices = _devices(settings.workers, device, len(own))
    threads = max(1, cores() // len(devices)) if device == "cpu" else None
    kind = DeviceType.of(profile_of(settings.profile, family, device, own))
    return Place(replace(kind, models=_only(own, family)), device, threads), devices


def _devices(workers: int | str | None, device: str, models: int) -> tuple[str, ...]:
    """The device of every worker."""
    count = workers if isinstance(workers, int) else None
    if device == "cpu":
        return ("cpu",) * (count or (1 if models == 1 else min(CPU_WORKERS, cores())))
    if ":" in device:
        return (device,) * (count or 1)
    there = torch.cuda.device_count()
    return tuple(f"{device}:{i % there}" for i in range(count or there))
