"""What a UNet learns: noise to take away, or a larger one's guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from argus.families.pictogram.tokenizer import token_ids

SNR_LIMIT = 6.0
CLEAR_SNR = 0.4


@dataclass(frozen=True)
class Chance:
    """What chance decides of each example: `noise` (b, c, h, w), and a `moment` (b,) in [0, 1) that
    stands for a timestep."""

    noise: Tensor
    moment: Tensor

    @classmethod
    def like(cls, latents: Tensor) -> Chance:
        return cls(torch.randn_like(latents), torch.rand(len(latents), device=latents.device))

    def chunk(self, count: int) -> list[Chance]:
        noises, moments = self.noise.chunk(count), self.moment.chunk(count)
        return [Chance(*both) for both in zip(noises, moments, strict=True)]


# of a UNet, latents (b, c, h, w), the weights of cells (b, h, w), the prompts' states (b, 40, w)
# and what is left to chance
Loss = Callable[[UNet2DConditionModel, Tensor, Tensor, Tensor, Chance], Tensor]


@dataclass(frozen=True)
class Teacher:
    """A larger UNet that guides itself. `nothing` (1, 40, w) are the states of the empty prompt."""

    unet: UNet2DConditionModel
    nothing: Tensor
    guidance: float

    @classmethod
    def of(cls, pipeline: StableDiffusionPipeline, base: Path, guidance: float) -> Teacher:
        """The UNet of the folder `base`, on the device of a pipeline with its text encoder."""
        unet = UNet2DConditionModel.from_pretrained(base / "unet").to(pipeline.device)
        unet.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        with torch.no_grad():
            ids = token_ids(pipeline.tokenizer, [""]).to(pipeline.device)
            nothing = pipeline.text_encoder(ids).last_hidden_state
        return cls(unet, nothing, guidance)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """Its guided guess (b, c, h, w)."""
        if self.guidance == 1:
            guess: Tensor = self.unet(noisy, times, states).sample.float()
            return guess
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
    this small decide what stands where. Things count more, but only where the noise leaves no doubt
    of where they are: elsewhere it would teach that there are more of them.

    With a `teacher` the target is its guided guess instead of the noise that was added: what it has
    learnt, without the chance in every example (Kim et al. 2023, arXiv 2305.15798, section 3.2).
    Its guidance becomes part of the UNet, which is then used without and takes half as long (Meng
    et al. 2023, arXiv 2210.03142, section 3.1, for one scale).
    """

    alphas: Tensor
    teacher: Teacher | None = None

    def __call__(
        self,
        unet: UNet2DConditionModel,
        latents: Tensor,
        things: Tensor,
        states: Tensor,
        chance: Chance,
    ) -> Tensor:
        noise = chance.noise
        times = (chance.moment * len(self.alphas)).long()
        alpha = self.alphas[times][:, None, None, None]
        noisy = _laid_out(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        if self.teacher is None:
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        else:
            velocity = self.teacher.velocity(noisy, times, states)
        guess = unet(noisy, times, states).sample.float()
        errors = F.mse_loss(guess, velocity, reduction="none").mean(1)
        clear = (self.alphas[times] > CLEAR_SNR / (1 + CLEAR_SNR))[:, None, None]
        cells = torch.where(clear, things.float(), 1.0)
        weights = (SNR_LIMIT * (1 - self.alphas[times])).clamp(max=1.0)
        return (weights * (cells * errors).sum((1, 2)) / cells.sum((1, 2))).mean()


def _laid_out(latents: Tensor) -> Tensor:
    return latents.contiguous(memory_format=torch.channels_last)
