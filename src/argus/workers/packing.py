"""Latents as bytes, on their way between a server and its workers."""

from __future__ import annotations

from safetensors.torch import load, save
from torch import Tensor


def pack(latents: Tensor) -> bytes:
    """Latents as bytes, which outlive the process that computed them."""
    return save({"latents": latents.detach().cpu().contiguous()})


def unpack(data: bytes) -> Tensor:
    """The latents that `pack` was given, on the CPU."""
    return load(data)["latents"]
