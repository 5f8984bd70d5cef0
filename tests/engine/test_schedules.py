"""A schedule's numbers do what the diffusers scheduler does that they were read off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, SchedulerMixin
from torch import Tensor

from argus.core.errors import BadRequest
from argus.engine.samplers import SAMPLERS
from argus.engine.schedules import new_schedule

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ddim": [
        {"clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 1.5},
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ],
    "euler": [{}, {"timestep_spacing": "leading", "steps_offset": 1}, {"use_karras_sigmas": True}],
    "euler-ancestral": [{}, {"timestep_spacing": "trailing"}],
    "dpm++2m": [
        {},
        {"use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"euler_at_final": True, "timestep_spacing": "trailing"},
        {"solver_order": 1},
    ],
    "lcm": [{}, {"timestep_scaling": 5.0}],
}
CASES = [
    (sampler, options, prediction, steps)
    for sampler, several in OPTIONS.items()
    for options in several
    for prediction in ("epsilon", "v_prediction")
    for steps in ((1, 4, 17) if sampler != "dpm++2m" else (2, 4, 17))
    if prediction == "v_prediction" or "rescale_betas_zero_snr" not in options
]


def model(x: Tensor, timestep: float) -> Tensor:
    """Something that depends on all a model depends on."""
    return torch.tanh(x.roll(1, -1) * 0.7 + timestep / 1000)


def diffusers_way(scheduler: Any, x: Tensor, steps: int, skip: int) -> Tensor:
    scheduler.set_timesteps(steps)
    if skip and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skip)
    generator = torch.Generator().manual_seed(5)
    x = x if skip else x * scheduler.init_noise_sigma
    for t in scheduler.timesteps[skip:]:
        out = model(scheduler.scale_model_input(x, t), float(t))
        extra = {"generator": generator} if type(scheduler).__name__ in NOISY else {}
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x


NOISY = ("EulerAncestralDiscreteScheduler", "LCMScheduler")


def our_way(scheduler: Any, x: Tensor, steps: int, skip: int) -> Tensor:
    schedule = new_schedule(scheduler, steps)
    generator = torch.Generator().manual_seed(5)
    x = x if skip else x * schedule.start
    last = None
    for i in range(skip, steps):
        step = (schedule.alone if last is None else schedule.steps)[i]
        out = model(x * step.scale, step.timestep)
        x0 = step.x0_x * x + step.x0_out * out
        if schedule.clip is not None:
            x0 = x0.clamp(-schedule.clip, schedule.clip)
        x = step.x * x + step.out * out + step.x0 * x0
        if step.last:
            assert last is not None
            x = x + step.last * last
        if step.noise:
            x = x + step.noise * torch.randn(x.shape, generator=generator)
        last = x0
    return x


@pytest.mark.parametrize(("sampler", "options", "prediction", "steps"), CASES)
def test_schedules_move_latents_as_diffusers_does(
    sampler: str, options: dict[str, Any], prediction: str, steps: int
) -> None:
    kind, own = SAMPLERS[sampler]
    scheduler: SchedulerMixin = kind(**{**TRAINED, "prediction_type": prediction, **own, **options})
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
    for skip in {0, steps // 2, steps - 1}:
        expected = diffusers_way(kind.from_config(scheduler.config), x, steps, skip)
        ours = our_way(scheduler, x, steps, skip)
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (PNDMScheduler(), "does not run PNDMScheduler; it runs DDIMScheduler"),
        (SAMPLERS["ddim"][0](thresholding=True), "thresholding False alone, not True"),
        (SAMPLERS["ddim"][0](prediction_type="sample"), "not 'sample'"),
        (SAMPLERS["dpm++2m"][0](solver_order=3), "solver_order 1 or 2, not 3"),
        (SAMPLERS["dpm++2m"][0](solver_type="heun"), "solver_type 'midpoint' alone"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        new_schedule(scheduler, 5)
