"""What a UNet learns: noise to take away, a larger one's guess, or where a sampler's way ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

SNR_LIMIT = 6.0
THING_WEIGHT, CLEAR_SNR = 3.0, 0.4
STRIDE = 20  # of 1000 timesteps; the grid that LCM's sampler takes its steps from
HUBER = 0.03

# of a UNet, latents (b, 32, h, w), the cells of things (b, h, w) and the prompts' states (b, 40, w)
Loss = Callable[[UNet2DConditionModel, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Teacher:
    """A larger UNet that guides itself. `nothing` (1, 40, w) are the states of the empty prompt."""

    unet: UNet2DConditionModel
    nothing: Tensor
    guidance: float

    @torch.no_grad()
    def velocity(self, noisy: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """Its guided guess (b, 32, h, w)."""
        both = torch.cat([states, self.nothing.expand_as(states)])
        guesses = self.unet(noisy.repeat(2, 1, 1, 1), times.repeat(2), both).sample.float()
        conditional, unconditional = guesses.chunk(2)
        guided: Tensor = unconditional + self.guidance * (conditional - unconditional)
        return guided


@dataclass(frozen=True)
class Denoising:
    """v-prediction, with steps of little noise weighted less, and cells of things more.

    The weight of the implied error of x0 is min(SNR + 1, limit). Min-SNR weights (Hang et al. 2023,
    arXiv 2303.09556), min(SNR, limit), all but ignore the noisiest steps, which is where latents
    this small decide what stands where. Things count three times, but only where the noise leaves
    no doubt of where they are: elsewhere it would teach that there are more of them.

    With a `teacher` the target is its guided guess instead of the noise that was added: what it has
    learnt, without the chance in every example (Kim et al. 2023, arXiv 2305.15798, section 3.2).
    Its guidance becomes part of the UNet, which is then used without and takes half as long (Meng
    et al. 2023, arXiv 2210.03142, section 3.1, for one scale).
    """

    alphas: Tensor
    teacher: Teacher | None = None

    def __call__(
        self, unet: UNet2DConditionModel, latents: Tensor, things: Tensor, states: Tensor
    ) -> Tensor:
        noise = torch.randn_like(latents)
        times = torch.randint(0, len(self.alphas), (len(latents),), device=latents.device)
        alpha = self.alphas[times][:, None, None, None]
        noisy = _laid_out(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        if self.teacher is None:
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        else:
            velocity = self.teacher.velocity(noisy, times, states)
        guess = unet(noisy, times, states).sample.float()
        errors = F.mse_loss(guess, velocity, reduction="none").mean(1)
        clear = (self.alphas[times] > CLEAR_SNR / (1 + CLEAR_SNR))[:, None, None]
        cells = torch.where(things & clear, THING_WEIGHT, 1.0)
        weights = (SNR_LIMIT * (1 - self.alphas[times])).clamp(max=1.0)
        return (weights * (cells * errors).sum((1, 2)) / cells.sum((1, 2))).mean()


@dataclass(frozen=True)
class Consistency:
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, algorithm 1).

    From any point of the way that the guided `teacher` takes with DDIM, the UNet is to guess the
    latents it ends in, and to guess the same from the next point. The guidance becomes part of the
    UNet, which is then used without.
    """

    alphas: Tensor
    teacher: Teacher

    def __call__(
        self, unet: UNet2DConditionModel, latents: Tensor, things: Tensor, states: Tensor
    ) -> Tensor:
        count = len(self.alphas) // STRIDE
        times = STRIDE * torch.randint(1, count + 1, (len(latents),), device=latents.device) - 1
        before = times - STRIDE
        alpha, alpha_before = (self._alpha(at)[:, None, None, None] for at in (times, before))
        noise = torch.randn_like(latents)
        noisy = _laid_out(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        with torch.no_grad():
            velocity = self.teacher.velocity(noisy, times, states)
            clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity
            added = alpha.sqrt() * velocity + (1 - alpha).sqrt() * noisy
            nearer = alpha_before.sqrt() * clean + (1 - alpha_before).sqrt() * added
            target = self._end(unet, nearer, before.clamp(min=0), states)
            target = torch.where((before < 0)[:, None, None, None], clean, target)
        errors = self._end(unet, noisy, times, states) - target
        return ((errors.square() + HUBER**2).sqrt() - HUBER).mean()

    def _end(
        self, unet: UNet2DConditionModel, noisy: Tensor, times: Tensor, states: Tensor
    ) -> Tensor:
        alpha = self._alpha(times)[:, None, None, None]
        velocity: Tensor = unet(noisy, times, states).sample.float()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity

    def _alpha(self, times: Tensor) -> Tensor:
        return torch.where(times < 0, 1.0, self.alphas[times.clamp(min=0)])


def _laid_out(latents: Tensor) -> Tensor:
    return latents.contiguous(memory_format=torch.channels_last)
