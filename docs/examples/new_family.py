"""A family of one's own: `family.yaml` beside this file, and a picture by each of its variants.

    python docs/examples/new_family.py

`argus serve --family docs/examples/family.yaml` serves it, by `nirvana` and without a promise
until it is measured: `argus profile`, `argus calibrate` and `argus train` take the file's path.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from argus.core.family import Family
from argus.core.job import Job
from argus.engine.engine import Engine
from argus.families.catalog import find_family

FILE = Path(__file__).parent / "family.yaml"


def pictures(family: Family, prompt: str) -> dict[str, Image.Image]:
    """A picture by every variant that needs no neighbour, all of one seed."""
    engines: dict[str, Engine] = {}
    made = {}
    for name, variant in family.variants.items():
        if variant.skip:
            continue
        if variant.model not in engines:
            source = family.models[variant.model]
            engines[variant.model] = Engine.load(source, sampler=variant.sampler)
        job = Job(prompt, seed=1, steps=variant.steps, guidance=variant.guidance)
        made[name] = engines[variant.model].run(job).image
    return made


if __name__ == "__main__":
    for name, image in pictures(find_family(str(FILE)), "a red fish in the sea").items():
        image.save(f"{name}.png")
        print(f"wrote {name}.png")
