"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from argus.control.argus import Argus, Pac
from argus.control.cascades import Cascade, Hadis
from argus.control.clipper import ClipperHA, ClipperHT
from argus.control.modm import MoDM
from argus.control.nirvana import Nirvana
from argus.control.policy import Policy, Slo
from argus.control.price import Oracle, Price, PriceBlind
from argus.control.scaling import Proteus, Sommelier
from argus.control.variants import VariantTable
from argus.core.errors import BadRequest

POLICIES: dict[str, Callable[[VariantTable, Sequence[Slo]], Policy]] = {
    "price": Price,
    "price-blind": PriceBlind,
    "argus": Argus,
    "pac": Pac,
    "proteus": Proteus,
    "sommelier": Sommelier,
    "nirvana": Nirvana,
    "clipper-ha": ClipperHA,
    "clipper-ht": ClipperHT,
    "cascade": Cascade,
    "hadis": Hadis,
    "modm": MoDM,
    "oracle": Oracle,
}


def new_policy(name: str, table: VariantTable, slos: Sequence[Slo]) -> Policy:
    """A new policy. Raises BadRequest for a name that is not in `POLICIES`."""
    if name not in POLICIES:
        raise BadRequest(f"There is no policy {name!r}: use {', '.join(POLICIES)}.")
    return POLICIES[name](table, slos)
