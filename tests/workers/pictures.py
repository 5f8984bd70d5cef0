from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Whether pictures are the same but for rounding: threads add up in another order."""
    return int(np.asarray(ImageChops.difference(one, other)).max()) <= 1
