"""Latents to pictures, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from argus.engine.loading import AnyPipeline


def decode(pipeline: AnyPipeline, latents: Sequence[Tensor]) -> list[Image.Image]:
    """The pictures of latents (1, c, h, w) of one size, as the stock pipeline decodes them."""
    vae = pipeline.vae
    upcast = vae.dtype == torch.float16 and bool(vae.config.force_upcast)
    upcast = upcast and isinstance(pipeline, StableDiffusionXLPipeline)
    try:
        if upcast:  # SDXL's VAE overflows in float16
            vae.to(torch.float32)
        pixels = vae.decode(_scaled(vae, latents), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    images: list[Image.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images


def _scaled(vae: Any, latents: Sequence[Tensor]) -> Tensor:
    """The latents as the VAE's decoder takes them."""
    batch: Tensor = torch.cat(list(latents)).to(vae.dtype)
    scale: float = vae.config.scaling_factor
    mean, deviation = vae.config.latents_mean, vae.config.latents_std
    if mean is None or deviation is None:
        return batch / scale
    shape = (1, -1, 1, 1)
    batch = batch * batch.new_tensor(deviation).view(shape)
    return batch / scale + batch.new_tensor(mean).view(shape)
