"""Makes pictures: a denoising loop of our own over the parts of a diffusers pipeline."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from argus.core.errors import BadRequest, NotEnoughMemory
from argus.core.job import Job
from argus.engine.conditioning import Conditioning, encode
from argus.engine.loading import AnyPipeline, load_pipeline
from argus.engine.samplers import DEFAULT, new_scheduler

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """A picture and how it was made.

    `final` are the last latents (1, c, h, w). `kept` maps K to the latents after K steps, from
    which a job with `skip` K resumes. `timings_ms` has encode, denoise and decode.
    """

    image: Image.Image
    job: Job
    final: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)


class Engine:
    """One loaded model. A result depends on its job and the given latents alone."""

    def __init__(self, pipeline: AnyPipeline, sampler: str = DEFAULT) -> None:
        self.pipeline = pipeline
        pipeline.scheduler = new_scheduler(sampler, pipeline.scheduler)
        step = inspect.signature(pipeline.scheduler.step).parameters
        self._step_takes_generator = "generator" in step

    @classmethod
    def load(
        cls, source: str, device: str = "cpu", dtype: str = "float32", sampler: str = DEFAULT
    ) -> Engine:
        """Load a model; arguments and errors as for `load_pipeline` and `new_scheduler`."""
        return cls(load_pipeline(source, device, dtype), sampler)

    @property
    def default_size(self) -> tuple[int, int]:
        """The width and height in pixels that the model was made for."""
        side = self.pipeline.unet.config.sample_size
        high, wide = (side, side) if isinstance(side, int) else side
        scale = self.pipeline.vae_scale_factor
        return wide * scale, high * scale

    @torch.inference_mode()
    def run(
        self,
        job: Job,
        start: Tensor | None = None,
        keep: Collection[int] = (),
        on_step: OnStep | None = None,
    ) -> Result:
        """Make a job's picture.

        `start` are the latents (1, c, h, w) after `job.skip` steps of a run with the same steps
        and sampler; a job that skips needs them. `keep` lists the K whose latents are handed up,
        each in [job.skip, job.steps]. `on_step(done, steps_run)` is called after every step.
        Raises BadRequest for what this model cannot make, NotEnoughMemory when it runs out.
        """
        width, height = self._size(job)
        self._check(job, start, keep, width, height)
        with _memory_errors(self.pipeline.unet.device):
            t0 = time.perf_counter()
            conditioning = encode(self.pipeline, job, width, height)
            t1 = self._now()
            final, kept = self._denoise(job, conditioning, start, keep, on_step, width, height)
            t2 = self._now()
            image = self._decode(final)
            t3 = self._now()
        timings = {"encode": t1 - t0, "denoise": t2 - t1, "decode": t3 - t2}
        return Result(image, job, final, kept, {k: 1000 * v for k, v in timings.items()})

    def _denoise(
        self,
        job: Job,
        conditioning: Conditioning,
        start: Tensor | None,
        keep: Collection[int],
        on_step: OnStep | None,
        width: int,
        height: int,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        unet = self.pipeline.unet
        generator = torch.Generator().manual_seed(job.seed)
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(job.steps, device=unet.device)
        if len(scheduler.timesteps) != job.steps:
            raise BadRequest(
                f"{type(scheduler).__name__} makes {len(scheduler.timesteps)} timesteps "
                f"of {job.steps} steps; Argus runs samplers with one timestep a step."
            )
        if scheduler.timesteps.max() >= scheduler.config.num_train_timesteps:
            raise BadRequest(f"steps is {job.steps}; this model's sampler has room for fewer.")
        if start is None:
            latents = self._noise(generator, width, height) * scheduler.init_noise_sigma
        else:
            latents = start.to(unet.device, unet.dtype)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(job.skip)
        extra = {"generator": generator} if self._step_takes_generator else {}
        kept = {job.skip: latents.clone()} if job.skip in keep else {}
        for i, timestep in enumerate(scheduler.timesteps[job.skip :], job.skip + 1):
            rows = torch.cat([latents] * len(conditioning.states))
            rows = scheduler.scale_model_input(rows, timestep)
            guess = unet(
                rows,
                timestep,
                encoder_hidden_states=conditioning.states,
                timestep_cond=conditioning.guidance_embedding,
                added_cond_kwargs=conditioning.added,
                return_dict=False,
            )[0]
            if conditioning.guided:
                negative, positive = guess.chunk(2)
                guess = negative + job.guidance * (positive - negative)
            latents = scheduler.step(guess, timestep, latents, **extra, return_dict=False)[0]
            latents = latents.to(unet.dtype)
            if i in keep:
                kept[i] = latents.clone()
            if on_step is not None:
                on_step(i - job.skip, job.steps_run)
        return latents, kept

    def _noise(self, generator: torch.Generator, width: int, height: int) -> Tensor:
        unet, shape = self.pipeline.unet, self._latent_shape(width, height)
        noise: Tensor = randn_tensor(
            shape, generator=generator, device=unet.device, dtype=unet.dtype
        )
        return noise

    def _decode(self, latents: Tensor) -> Image.Image:
        pipeline, vae = self.pipeline, self.pipeline.vae
        upcast = vae.dtype == torch.float16 and bool(vae.config.force_upcast)
        upcast = upcast and isinstance(pipeline, StableDiffusionXLPipeline)
        if upcast:  # SDXL's VAE overflows in float16
            vae.to(torch.float32)
        latents = latents.to(vae.dtype)
        mean, deviation = vae.config.latents_mean, vae.config.latents_std
        if mean is not None and deviation is not None:
            shape = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(deviation).view(shape)
            latents = latents / vae.config.scaling_factor + latents.new_tensor(mean).view(shape)
        else:
            latents = latents / vae.config.scaling_factor
        pixels = vae.decode(latents, return_dict=False)[0]
        if upcast:
            vae.to(torch.float16)
        image: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
        return image

    def _size(self, job: Job) -> tuple[int, int]:
        width, height = self.default_size
        return job.width or width, job.height or height

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        scale = self.pipeline.vae_scale_factor
        return 1, self.pipeline.unet.config.in_channels, height // scale, width // scale

    def _check(
        self, job: Job, start: Tensor | None, keep: Collection[int], width: int, height: int
    ) -> None:
        scale = self.pipeline.vae_scale_factor
        for name, side in (("width", width), ("height", height)):
            if side % scale:
                raise BadRequest(f"{name} is {side}; this model needs a multiple of {scale}.")
        if job.skip and start is None:
            raise BadRequest(f"A job that skips {job.skip} steps needs the latents to start from.")
        if start is not None and not job.skip:
            raise BadRequest("Latents to start from were given, but the job skips no step.")
        shape = self._latent_shape(width, height)
        if start is not None and tuple(start.shape) != shape:
            raise BadRequest(f"The given latents are {tuple(start.shape)}; they must be {shape}.")
        wrong = [k for k in keep if not job.skip <= k <= job.steps]
        if wrong:
            raise BadRequest(
                f"Cannot keep latents at {wrong}: this run passes {job.skip} to {job.steps}."
            )

    def _now(self) -> float:
        if self.pipeline.unet.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{device} ran out of memory. Ask for a smaller picture.") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise NotEnoughMemory("This machine ran out of memory. Ask for less.") from error
