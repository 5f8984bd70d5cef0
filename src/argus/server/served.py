"""`GET /v1/argus/served`: what a server serves, for clients that let a person choose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from argus import __version__
from argus.config import QUALITY_LEVELS
from argus.server.generate import named_size
from argus.server.schema import MAX_PICTURES, ServedData, SloData, VariantData
from argus.server.slo import DEFAULT

if TYPE_CHECKING:
    from argus.server.service import Service


def served(service: Service, tenant: str) -> ServedData:
    """What a tenant can ask for."""
    family, settings, router = service.family, service.settings, service.router
    classes = []
    for name in dict.fromkeys((DEFAULT, *settings.slo)):
        deadline_s = math.inf if router is None else router.classes[name].deadline_s
        floor = settings.slo[name].quality if name in settings.slo else 0.0
        deadline_ms = None if math.isinf(deadline_s) else round(1000 * deadline_s)
        classes.append(SloData(name=name, deadline_ms=deadline_ms, quality=floor))
    exact = family.exact
    native = family.sizes.native or ((exact.width, exact.height),)
    problem = service.problem
    return ServedData(
        version=__version__,
        family=family.name,
        description=family.description,
        policy=service.policy,
        ready=service.ready,
        problem=None if problem is None else str(problem),
        degraded=service.degraded,
        key=None if service.keys is None else tenant,
        admin=service.keys is None or tenant in settings.admin_keys,
        variants=[
            VariantData(
                name=name,
                model=one.model,
                strategy=family.strategy(name),
                steps=one.steps,
                skip=one.skip,
            )
            for name, one in service.model.variants.items()
        ],
        slo=classes,
        quality_levels=list(QUALITY_LEVELS | settings.quality_levels),
        sizes=[named_size(size) for size in native],
        size_limit=family.sizes.limit,
        most_pictures=min(MAX_PICTURES, settings.queue_limit),
        scores=service.scorer.able,
        prompts=list(family.examples),
    )
