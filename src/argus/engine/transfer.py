"""Copies between this machine's memory and the device's that hold up neither."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`value` on the device, ordered before whatever is asked of the device next."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, dtype, non_blocking=True)


def to_host(value: Tensor) -> Tensor:
    """A copy in this machine's memory, complete once the device is done with what it was asked."""
    if value.device.type == "cpu":
        return value.clone()
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return copy.copy_(value, non_blocking=True)


class Pace:
    """Lets the device be asked for one step while it is at another, but not for more: what arrives
    then does not wait behind steps that nobody needed to ask for yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: torch.cuda.Event | None = None

    def keep(self) -> None:
        """Call after asking for a step: waits for the step before it."""
        if self._device.type != "cuda":
            return
        before = self._asked
        self._asked = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._asked.record(torch.cuda.current_stream(self._device))
        if before is not None:
            before.synchronize()
