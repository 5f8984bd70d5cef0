"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable

from argus.control.clipper import ClipperHA
from argus.control.nirvana import Nirvana
from argus.control.policy import Policy
from argus.core.errors import BadRequest
from argus.core.family import Family

POLICIES: dict[str, Callable[[Family], Policy]] = {"nirvana": Nirvana, "clipper-ha": ClipperHA}


def new_policy(name: str, family: Family) -> Policy:
    """Raises BadRequest for a name that is not in `POLICIES`."""
    if name not in POLICIES:
        raise BadRequest(f"There is no policy {name!r}: use {', '.join(POLICIES)}.")
    return POLICIES[name](family)
