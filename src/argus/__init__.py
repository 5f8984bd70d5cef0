"""Argus: text-to-image serving that gives every prompt the cheapest variant it can bear.

import argus
picture = argus.load("pictogram").generate("two red fish below a small boat, sea")
picture.save("boat.png")
"""

from argus.core.errors import ArgusError, BadRequest, ModelError, NotEnoughMemory
from argus.families.catalog import list_families
from argus.studio import Picture, Studio, load

__version__ = "0.1.0"
__all__ = [
    "ArgusError",
    "BadRequest",
    "ModelError",
    "NotEnoughMemory",
    "Picture",
    "Studio",
    "list_families",
    "load",
]
