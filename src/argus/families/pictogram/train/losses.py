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
SCALES = (2, 4, 8)  # cells a side
ROLLED, ROLLED_STEP, ROLLED_GUIDANCE = (250, 600), (20, 200), 2.5  # timesteps of 1000
STRIDE = 20  # of 1000 timesteps; the grid that LCM's sampler takes its steps from
HUBER = 0.03

# of a UNet, latents (b, 32, h, w), the cells of things (b, h, w) and the prompts' states (b, 40, w)
Loss = Callable[[UNet2DConditionModel, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Denoising:
    """v-prediction, with steps of little noise weighted less, and cells of things more.

    The weight of the implied error of x0 is min(SNR + 1, limit). Min-SNR weights (Hang et al. 2023,
    arXiv 2303.09556), min(SNR, limit), all but ignore the noisiest steps, which is where latents
    this small decide what stands where. Things count three times, but only where the noise leaves
    no doubt of where they are: elsewhere it would teach that there are more of them.

    Errors count alike at every scale, from single cells to the whole picture (`coarse_errors`).

    With a `teacher` the target is its guess instead of the noise that was added: what it has
    learnt, without the chance in every example (Kim et al. 2023, arXiv 2305.15798, section 3.2).

    With `nothing` (1, 40, w), the empty prompt's states, half of a batch are latents that the UNet
    itself has taken a guided step from, begun where the noise still hides details but no thing
    (`ROLLED`). What it saw in the noise by mistake is in them, and it learns to take that back:
    true noisy latents never show half a thing that is not there (exposure bias; Ning et al. 2023,
    arXiv 2301.11706). Begun in more noise this would teach it the mean of all it could paint.
    """

    alphas: Tensor
    teacher: UNet2DConditionModel | None = None
    nothing: Tensor | None = None

    def __call__(
        self, unet: UNet2DConditionModel, latents: Tensor, things: Tensor, states: Tensor
    ) -> Tensor:
        noise = torch.randn_like(latents)
        times = torch.randint(0, len(self.alphas), (len(latents),), device=latents.device)
        if self.nothing is not None:
            rolled = len(latents) // 2
            times[:rolled] = torch.randint(*ROLLED, (rolled,), device=latents.device)
        alpha = self._alpha(times)
        noisy = _laid_out(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        if self.nothing is not None:
            noisy, times = self._rolled(unet, noisy, times, states, rolled)
            alpha = self._alpha(times)
        if self.teacher is None:
            velocity = (alpha.sqrt() * noisy - latents) / (1 - alpha).sqrt()
        else:
            with torch.no_grad():
                velocity = self.teacher(noisy, times, states).sample.float()
        misses = unet(noisy, times, states).sample.float() - velocity
        errors = misses.square().mean(1)
        clear = (self.alphas[times] > CLEAR_SNR / (1 + CLEAR_SNR))[:, None, None]
        cells = torch.where(things & clear, THING_WEIGHT, 1.0)
        weights = (SNR_LIMIT * (1 - self.alphas[times])).clamp(max=1.0)
        fine = (cells * errors).sum((1, 2)) / cells.sum((1, 2))
        every: Tensor = weights * (fine + coarse_errors(misses)) / (1 + len(SCALES))
        return every.mean()

    @torch.no_grad()
    def _rolled(
        self, unet: UNet2DConditionModel, noisy: Tensor, times: Tensor, states: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The first `count` of a batch after a guided DDIM step, and the times they are at then."""
        assert self.nothing is not None
        x, at = noisy[:count], times[:count]
        both = torch.cat([states[:count], self.nothing.expand_as(states[:count])])
        guesses = unet(_laid_out(x.repeat(2, 1, 1, 1)), at.repeat(2), both).sample.float()
        conditional, unconditional = guesses.chunk(2)
        velocity = unconditional + ROLLED_GUIDANCE * (conditional - unconditional)
        alpha = self._alpha(at)
        clean = alpha.sqrt() * x - (1 - alpha).sqrt() * velocity
        added = alpha.sqrt() * velocity + (1 - alpha).sqrt() * x
        later = at - torch.randint(*ROLLED_STEP, (count,), device=at.device)
        alpha = self._alpha(later)
        x = alpha.sqrt() * clean + (1 - alpha).sqrt() * added
        return _laid_out(torch.cat([x, noisy[count:]])), torch.cat([later, times[count:]])

    def _alpha(self, times: Tensor) -> Tensor:
        alpha: Tensor = self.alphas[times][:, None, None, None]
        return alpha


@dataclass(frozen=True)
class Consistency:
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, algorithm 1).

    From any point of the way that the guided `teacher` takes with DDIM, the UNet is to guess the
    latents it ends in, and to guess the same from the next point. `nothing` (1, 40, w) are the
    states of the empty prompt; `guidance` becomes part of the UNet, which is then used without.
    """

    alphas: Tensor
    teacher: UNet2DConditionModel
    nothing: Tensor
    guidance: float

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
            both = torch.cat([states, self.nothing.expand_as(states)])
            guesses = self.teacher(noisy.repeat(2, 1, 1, 1), times.repeat(2), both).sample.float()
            conditional, unconditional = guesses.chunk(2)
            velocity = unconditional + self.guidance * (conditional - unconditional)
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


def coarse_errors(misses: Tensor) -> Tensor:
    """The misses' (b, c, h, w) squared averages over squares of `SCALES` cells, (b,).

    Each is taken times its number of cells, so that noise is as large at every scale. How many
    things there are is what pure noise must be told by the prompt, and shows in the sum of all
    cells alone: a hundredth of the error of single cells, most of which is chance. Weighted so, a
    squared error has the same optimum (the multiscale loss of Hoogeboom et al. 2023, arXiv
    2301.11093, section 3.3).
    """
    sides = [side for side in SCALES if side <= misses.shape[-1]]  # a close-up has 4 cells a side
    parts = [F.avg_pool2d(misses, side).square().mean((1, 2, 3)) * side**2 for side in sides]
    return torch.stack(parts).sum(0)


def _laid_out(latents: Tensor) -> Tensor:
    return latents.contiguous(memory_format=torch.channels_last)
