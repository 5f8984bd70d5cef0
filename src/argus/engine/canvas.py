"""The shape of a pipeline's latents, and which jobs fit them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from argus.core.errors import BadRequest
from argus.core.job import Job
from argus.engine.loading import AnyPipeline


class Canvas:
    """Sizes are width and height in pixels."""

    def __init__(self, pipeline: AnyPipeline) -> None:
        self._config, self._scale = pipeline.unet.config, int(pipeline.vae_scale_factor)
        self._device, self._dtype = pipeline.unet.device, pipeline.unet.dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """The size that the model was trained for."""
        side = self._config.sample_size
        high, wide = (side, side) if isinstance(side, int) else side
        return wide * self._scale, high * self._scale

    def size_of(self, job: Job) -> tuple[int, int]:
        wide, high = self.default_size
        return job.width or wide, job.height or high

    def shape(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The shape of the latents of one picture."""
        width, height = size
        channels: int = self._config.in_channels
        return 1, channels, height // self._scale, width // self._scale

    def noise(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Noise of `shape` from a generator, as the stock pipeline draws it."""
        noise: Tensor = randn_tensor(
            self.shape(size), generator=generator, device=self._device, dtype=self._dtype
        )
        return noise

    def check(self, job: Job, start: Tensor | None, keep: Collection[int]) -> None:
        """Raise BadRequest for a job, or latents for it, that do not fit."""
        size = self.size_of(job)
        for name, side in zip(("width", "height"), size, strict=True):
            if side % self._scale:
                raise BadRequest(f"{name} is {side}; this model needs a multiple of {self._scale}.")
        if job.skip and start is None:
            raise BadRequest(f"A job that skips {job.skip} steps needs the latents to start from.")
        if start is not None and not job.skip:
            raise BadRequest("Latents to start from were given, but the job skips no step.")
        shape = self.shape(size)
        if start is not None and tuple(start.shape) != shape:
            raise BadRequest(f"The given latents are {tuple(start.shape)}; they must be {shape}.")
        wrong = [k for k in keep if not job.skip <= k <= job.steps]
        if wrong:
            raise BadRequest(
                f"Cannot keep latents at {wrong}: this run passes {job.skip} to {job.steps}."
            )
