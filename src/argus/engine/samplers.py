"""Samplers by name. A sampler is a diffusers scheduler with options."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from argus.core.errors import BadRequest

DEFAULT = "default"  # whatever the model's folder names
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "lcm": (LCMScheduler, {}),
}


def new_scheduler(sampler: str, own: Any) -> Any:
    """A scheduler for `sampler` with the noise schedule of `own`, the model's scheduler.

    Raises BadRequest for a name that is not in `SAMPLERS` and not `DEFAULT`.
    """
    if sampler == DEFAULT:
        return type(own).from_config(own.config)
    if sampler not in SAMPLERS:
        raise BadRequest(f"There is no sampler {sampler!r}: use {DEFAULT}, {', '.join(SAMPLERS)}.")
    scheduler_class, options = SAMPLERS[sampler]
    return scheduler_class.from_config(own.config, **options)
