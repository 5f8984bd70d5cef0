"""A sampler more: DPM-Solver++(2M) along Karras' noise levels.

    python docs/examples/new_sampler.py

A sampler is a diffusers scheduler with options. One of a class that Argus knows is the line below,
which belongs into `SAMPLERS` of `engine/samplers.py`, so that worker processes know it. A new class
also needs its steps as numbers: a function in `SCHEDULERS` of `engine/schedules.py`.
"""

from __future__ import annotations

from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from argus.core.job import Job
from argus.engine.engine import Engine
from argus.engine.samplers import SAMPLERS
from argus.families.catalog import default_family

NAME = "dpm++2m-karras"
SAMPLER = (
    DPMSolverMultistepScheduler,
    {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
)


def picture(prompt: str, steps: int) -> Image.Image:
    """A picture by the bundled family's exact model with the new sampler."""
    SAMPLERS[NAME] = SAMPLER
    family = default_family()
    engine = Engine.load(family.models[family.exact.model], sampler=NAME)
    return engine.run(Job(prompt, seed=1, steps=steps, guidance=family.exact.guidance)).image


if __name__ == "__main__":
    picture("a red fish in the sea", steps=8).save("karras.png")
    print("wrote karras.png")
