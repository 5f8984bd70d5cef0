"""A UNet's forward pass, eager or compiled for a few batch sizes to which others are padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# numbers of rows; a guided picture has two
BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SIZES = 8  # picture sizes for which all buckets may be compiled


class Forward:
    """Calls a UNet for a batch of rows.

    If `compiled`, every bucket's first batch of a picture size takes up to two minutes; `backend`
    is torch.compile's. On a GPU the compiled pass is replayed as a CUDA graph.
    """

    def __init__(
        self, unet: Any, compiled: bool = False, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self.compiled = compiled
        # kept, because diffusers looks through all modules whenever it is asked
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        if self.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        self._run = unet
        if compiled:
            limit = len(BUCKETS) * SIZES
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self._run = torch.compile(unet, dynamic=False, backend=backend, mode=mode)

    def __call__(
        self,
        inputs: Tensor,
        times: Tensor,
        states: Tensor,
        added: dict[str, Tensor] | None = None,
        guidance_embedding: Tensor | None = None,
    ) -> Tensor:
        """The UNet's output (rows, c, h, w) in float32 for `inputs` of the same shape."""
        rows = len(inputs)
        excess = bucket(rows) - rows if self.compiled else 0
        if self.device.type == "cuda":
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        out: Tensor = self._run(
            _padded(inputs, excess),
            _padded(times, excess),
            encoder_hidden_states=_padded(states, excess),
            timestep_cond=None
            if guidance_embedding is None
            else _padded(guidance_embedding, excess),
            added_cond_kwargs=added
            and {key: _padded(value, excess) for key, value in added.items()},
            return_dict=False,
        )[0]
        return out[:rows].to(torch.float32, copy=self.compiled)  # a graph's output is overwritten


def bucket(rows: int) -> int:
    """The batch size that `rows` rows are padded to; above the largest bucket they are not."""
    return next((size for size in BUCKETS if size >= rows), rows)


def _padded(value: Tensor, excess: int) -> Tensor:
    """The rows, with the last one repeated `excess` times."""
    if not excess:
        return value
    return torch.cat([value, value[-1:].expand(excess, *value.shape[1:])])
