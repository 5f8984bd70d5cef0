"""A sampler's steps as plain numbers, so that one weighted sum advances many latents at once.

Every sampler here is linear in the latents x, the model's output, the estimate x₀ of the finished
latents, the x₀ of the step before, and fresh noise. A `Schedule` holds the factors of each step,
computed from a diffusers scheduler.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from argus.core.errors import BadRequest


@dataclass(frozen=True)
class Step:
    """One step. The model gets `scale` · x at `timestep` and returns out. Then

    x₀ = clip(`x0_x` · x + `x0_out` · out)
    x ← `x` · x + `out` · out + `x0` · x₀ + `last` · x₀ of the step before + `noise` · noise
    """

    timestep: float
    scale: float
    x0_x: float
    x0_out: float
    x: float
    out: float
    x0: float
    last: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """All steps of a sampler. Latents begin as noise times `start`.

    `alone` are the steps for latents without a step before: those just begun or resumed. x₀ is
    clipped to ±`clip`, if that is set.
    """

    steps: tuple[Step, ...]
    alone: tuple[Step, ...]
    start: float
    clip: float | None

    @cached_property
    def noisy(self) -> bool:
        """Whether the sampler draws fresh noise after every step."""
        return any(step.noise for step in self.steps)


def new_schedule(scheduler: Any, steps: int) -> Schedule:
    """The schedule of `steps` steps of a diffusers scheduler, which is not changed.

    Raises BadRequest for a scheduler that is not in `SCHEDULERS`, for options of it that are not
    supported, and for more steps than it has room for.
    """
    name = type(scheduler).__name__
    config = _own_config(scheduler)
    make = SCHEDULERS.get(type(scheduler))
    if make is None:
        raise BadRequest(f"Argus does not run {name}; it runs {_known()}. Name another sampler.")
    for option, wanted in _WANTED.items():
        value = config.get(option, wanted)
        if value != wanted:
            raise BadRequest(f"Argus runs {name} with {option} {wanted!r} alone, not {value!r}.")
    prediction = config["prediction_type"]
    if prediction not in ("epsilon", "v_prediction"):
        raise BadRequest(f"Argus runs models that predict epsilon or v, not {prediction!r}.")
    if config.get("solver_order", 2) > 2:
        order = config["solver_order"]
        raise BadRequest(f"Argus runs {name} with solver_order 1 or 2, not {order}.")
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(steps)
    except ValueError as error:
        raise BadRequest(f"steps is {steps}: {error}") from error
    timesteps = [float(t) for t in own.timesteps]
    if len(timesteps) != steps or max(timesteps) >= config["num_train_timesteps"]:
        raise BadRequest(f"steps is {steps}; this model's sampler has room for fewer.")
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
    usual, alone = make(own, timesteps)
    return Schedule(tuple(usual), tuple(alone), float(own.init_noise_sigma), clip)


def _own_config(scheduler: Any) -> dict[str, Any]:
    """The options that a scheduler's class knows. Its config also holds, unused, those of the
    scheduler whose config it was made from."""
    known = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in known}


Steps = tuple[Sequence[Step], Sequence[Step]]


def _estimate(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """The factors of x₀ from latents α·x₀ + σ·ε and the model's output."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    return alpha, -sigma


def _ddim(scheduler: DDIMScheduler, timesteps: list[float]) -> Steps:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 with η = 0."""
    config = scheduler.config
    levels = scheduler.alphas_cumprod.double().numpy()
    stride = config.num_train_timesteps // len(timesteps)
    steps = []
    for t in map(int, timesteps):
        end = levels[t - stride] if t >= stride else float(scheduler.final_alpha_cumprod)
        alpha, sigma = np.sqrt(levels[t]), np.sqrt(1 - levels[t])
        alpha_next, sigma_next = np.sqrt(end), np.sqrt(1 - end)
        x0_x, x0_out = _estimate(config.prediction_type, alpha, sigma)
        noise_x, noise_out = (0, 1) if config.prediction_type == "epsilon" else (sigma, alpha)
        x, out = sigma_next * noise_x, sigma_next * noise_out
        steps.append(Step(t, 1.0, x0_x, x0_out, x=x, out=out, x0=alpha_next))
    return steps, steps


def _lcm(scheduler: LCMScheduler, timesteps: list[float]) -> Steps:
    """Luo et al. 2023 (arXiv 2310.04378), algorithm 3, boundaries as in section 3.1."""
    config = scheduler.config
    levels = scheduler.alphas_cumprod.double().numpy()
    steps = []
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, sigma = np.sqrt(levels[int(t)]), np.sqrt(1 - levels[int(t)])
        x0_x, x0_out = _estimate(config.prediction_type, alpha, sigma)
        scaled = t * config.timestep_scaling
        keep = 0.25 / (scaled**2 + 0.25)
        take = scaled / np.sqrt(scaled**2 + 0.25)
        end = 1.0 if following is None else levels[int(following)]
        alpha_next, noise = np.sqrt(end), np.sqrt(1 - end)
        x, x0 = alpha_next * keep, alpha_next * take
        steps.append(Step(t, 1.0, x0_x, x0_out, x=x, out=0.0, x0=x0, noise=noise))
    return steps, steps


def _euler(scheduler: EulerDiscreteScheduler, timesteps: list[float]) -> Steps:
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn."""
    return _along_sigmas(scheduler, timesteps, ancestral=False)


def _euler_ancestral(scheduler: EulerAncestralDiscreteScheduler, timesteps: list[float]) -> Steps:
    """k-diffusion's `sample_euler_ancestral` with η = 1."""
    return _along_sigmas(scheduler, timesteps, ancestral=True)


def _along_sigmas(scheduler: Any, timesteps: list[float], ancestral: bool) -> Steps:
    sigmas = scheduler.sigmas.double().numpy()
    steps = []
    for t, sigma, end in zip(timesteps, sigmas, sigmas[1:], strict=False):
        scale = 1 / np.sqrt(sigma**2 + 1)
        x0_x, x0_out = _estimate(scheduler.config.prediction_type, scale, sigma * scale)
        up = np.sqrt(end**2 * (sigma**2 - end**2) / sigma**2) if ancestral else 0.0
        down = np.sqrt(end**2 - up**2)
        ratio = down / sigma
        steps.append(
            Step(t, scale, x0_x * scale, x0_out, x=ratio, out=0.0, x0=1 - ratio, noise=up)
        )  # fmt: skip
    return steps, steps


def _dpm(scheduler: DPMSolverMultistepScheduler, timesteps: list[float]) -> Steps:
    """Lu et al. 2022 (arXiv 2211.01095), algorithm 2: DPM-Solver++(2M)."""
    config = scheduler.config
    sigmas = scheduler.sigmas.double().numpy()
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    noises = sigmas * alphas
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas) - np.log(noises)
    n = len(timesteps)
    usual, alone = [], []
    for i, t in enumerate(timesteps):
        x0_x, x0_out = _estimate(config.prediction_type, alphas[i], noises[i])
        h = log_snr[i + 1] - log_snr[i]
        x, d = noises[i + 1] / noises[i], -alphas[i + 1] * np.expm1(-h)
        first = Step(t, 1.0, x0_x, x0_out, x=x, out=0.0, x0=d)
        alone.append(first)
        ends_plainly = config.euler_at_final or config.final_sigmas_type == "zero"
        ends_plainly = ends_plainly or (config.lower_order_final and n < 15)
        if i == 0 or config.solver_order == 1 or (i == n - 1 and ends_plainly):
            usual.append(first)
            continue
        ratio = 0.5 * h / (log_snr[i] - log_snr[i - 1])
        usual.append(
            Step(t, 1.0, x0_x, x0_out, x=x, out=0.0, x0=d * (1 + ratio), last=-d * ratio)
        )  # fmt: skip
    return usual, alone


SCHEDULERS: dict[type, Callable[[Any, list[float]], Steps]] = {
    DDIMScheduler: _ddim,
    LCMScheduler: _lcm,
    EulerDiscreteScheduler: _euler,
    EulerAncestralDiscreteScheduler: _euler_ancestral,
    DPMSolverMultistepScheduler: _dpm,
}
_WANTED = {
    "thresholding": False,
    "use_flow_sigmas": False,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
}


def _known() -> str:
    return ", ".join(kind.__name__ for kind in SCHEDULERS)
