"""The upstreams of a server as types of worker: which holds which model, at what speed and cost."""

from __future__ import annotations

from dataclasses import dataclass

from argus.config import Settings, Upstream
from argus.core.errors import BadRequest
from argus.core.family import UPSTREAM, Family
from argus.core.profile import Profile

DEVICE = "upstream"  # of a profile that was measured through one


@dataclass(frozen=True)
class Group:
    """Upstreams that hold the same model, with the same profile, concurrency and cost: a type of
    worker. `name` is the type's."""

    name: str
    model: str
    upstreams: tuple[Upstream, ...]

    @property
    def first(self) -> Upstream:
        return self.upstreams[0]


def groups_of(settings: Settings, family: Family) -> list[Group]:
    """The groups of the settings' upstreams.

    Raises BadRequest if one holds a model that the family does not have, or whose variants resume
    from cached latents, or if none holds a model that has no weights here.
    """
    used = {variant.model for variant in family.variants.values()}
    resumed = {variant.model for variant in family.variants.values() if variant.skip}
    alike: dict[object, list[Upstream]] = {}
    for one in settings.upstreams:
        model = one.model or family.exact.model
        if model not in used:
            known = ", ".join(sorted(used))
            raise BadRequest(f"The upstream {one.url} holds {model!r}; the models are {known}.")
        if model in resumed:
            raise BadRequest(
                f"The upstream {one.url} holds {model!r}, whose latents {family.name} resumes, as "
                "only Argus's own engines can. Leave skips out of the family's file."
            )
        key = (model, one.profile, one.concurrency, one.cost_per_hour)
        alike.setdefault(key, []).append(one)
    held = {one.model or family.exact.model for one in settings.upstreams}
    for model in sorted(used - held):
        if family.models[model] == UPSTREAM:
            raise BadRequest(
                f"No upstream holds {model!r}, whose weights are not here: add one to upstreams, "
                f"with model: {model}."
            )
    groups: list[Group] = []
    for servers in alike.values():
        model = servers[0].model or family.exact.model
        others = sum(group.model == model for group in groups)
        name = f"{DEVICE} {model}" + (f" {others + 1}" if others else "")
        groups.append(Group(name, model, tuple(servers)))
    return groups


def own_models(family: Family) -> list[str]:
    """The models whose weights are here."""
    used = dict.fromkeys(variant.model for variant in family.variants.values())
    return [model for model in used if family.models[model] != UPSTREAM]


def best_in_flight(profile: Profile | None, group: Group) -> int:
    """The most requests that a server of a group gets at once: where more gain nothing, they wait
    here, to go elsewhere if need be."""
    if profile is None:
        return group.first.concurrency
    return min(group.first.concurrency, profile.models[group.model].best_batch)
