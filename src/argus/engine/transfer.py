"""Asynchronous copies between host and device memory, and a limit on queued steps."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`value` on the device; the copy comes before all work queued on the device later."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, dtype, non_blocking=True)


def to_host(value: Tensor) -> Tensor:
    """A copy in host memory, complete once the device has finished the work queued so far."""
    if value.device.type == "cpu":
        return value.clone()
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return copy.copy_(value, non_blocking=True)


class Pace:
    """Limits the device to one queued step beside the running one, so that new jobs do not wait
    behind steps that were queued too early."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: torch.cuda.Event | None = None

    def keep(self) -> None:
        """Call after queueing a step: waits for the step before it."""
        if self._device.type != "cuda":
            return
        before = self._asked
        self._asked = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._asked.record(torch.cuda.current_stream(self._device))
        if before is not None:
            before.synchronize()
