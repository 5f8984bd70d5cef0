"""Decodes latents to pictures, several at once and, on a GPU, beside the denoising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from argus.engine.loading import AnyPipeline
from argus.engine.transfer import to_host


class Decoding:
    """Pictures that are being decoded. `done` is None if they are done already."""

    def __init__(self, processor: Any, pixels: Tensor, done: torch.cuda.Event | None) -> None:
        self._processor, self._pixels, self._done = processor, pixels, done

    @property
    def ready(self) -> bool:
        """Whether `images` returns without waiting."""
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def images(self) -> list[Image.Image]:
        if self._done is not None:
            self._done.synchronize()
        images: list[Image.Image] = self._processor.postprocess(self._pixels, output_type="pil")
        return images


class Decoder:
    """A pipeline's VAE. On a GPU it runs in a stream of its own, so that denoising goes on."""

    def __init__(self, pipeline: AnyPipeline) -> None:
        self._pipeline = pipeline
        vae, device = pipeline.vae, pipeline.unet.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        overflows = isinstance(pipeline, StableDiffusionXLPipeline) and vae.config.force_upcast
        if vae.dtype == torch.float16 and overflows:
            vae.to(torch.float32)  # as the stock pipeline does for every picture
        vae.to(memory_format=torch.channels_last)  # a quarter faster, on a CPU too
        self._dtype: torch.dtype = vae.dtype

    def start(self, latents: Sequence[Tensor]) -> Decoding:
        """Begin to decode latents (1, c, h, w) of one size, as the stock pipeline decodes them."""
        processor = self._pipeline.image_processor
        if self._stream is None:
            return Decoding(processor, self._pixels(latents), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for one in latents:
                one.record_stream(self._stream)
            pixels = to_host(self._pixels(latents))
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return Decoding(processor, pixels, done)

    def decode(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """The pictures of latents (1, c, h, w) of one size."""
        return self.start(latents).images()

    def _pixels(self, latents: Sequence[Tensor]) -> Tensor:
        vae = self._pipeline.vae
        pixels: Tensor = vae.decode(_scaled(vae, latents, self._dtype), return_dict=False)[0]
        return pixels


def _scaled(vae: Any, latents: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The latents as the VAE's decoder takes them."""
    batch: Tensor = torch.cat(list(latents)).to(dtype)
    scale: float = vae.config.scaling_factor
    mean, deviation = vae.config.latents_mean, vae.config.latents_std
    if mean is None or deviation is None:
        return batch / scale
    shape = (1, -1, 1, 1)
    batch = batch * batch.new_tensor(deviation).view(shape)
    return batch / scale + batch.new_tensor(mean).view(shape)
