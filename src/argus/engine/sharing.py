"""Shares an engine's time and its device's energy among the jobs that use them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """A job's seconds of its engine, each of which is divided among the jobs that shared it, and
    joules of the device; None where the device does not measure them."""

    seconds: float = 0.0
    joules: float | None = None

    def more(self, seconds: float, joules: float | None) -> Share:
        if joules is None:
            return Share(self.seconds + seconds, self.joules)
        return Share(self.seconds + seconds, (self.joules or 0.0) + joules)


NOTHING = Share()


class Sharing(Protocol):
    """Whoever has a share."""

    share: Share


class Meter:
    """Divides the time since `start`, all of it, among the groups of jobs that `charge` names. The
    energy is the whole device's, whoever else uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = _nvml_handle(device)
        self.start()

    def start(self) -> None:
        """Begin to count: the engine was idle."""
        self._charged_s, self._charged_j = time.perf_counter(), self._joules()

    def charge(self, group: Sequence[Sharing]) -> None:
        """Divide what was used since the last charge evenly among a group. An empty one leaves it
        to the next."""
        if not group:
            return
        now_s, now_j = time.perf_counter(), self._joules()
        seconds = (now_s - self._charged_s) / len(group)
        known = now_j is not None and self._charged_j is not None
        joules = (now_j - self._charged_j) / len(group) if known else None  # type: ignore[operator]
        self._charged_s, self._charged_j = now_s, now_j
        for one in group:
            one.share = one.share.more(seconds, joules)

    def _joules(self) -> float | None:
        if self._device is None:
            return None
        nvml, handle = self._device
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it has mJ
        except nvml.NVMLError as error:
            log.info("This device does not measure its energy: %s", error)
            self._device = None
            return None


def _nvml_handle(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and its handle of a CUDA device, by the UUID: NVML does not know CUDA_VISIBLE_DEVICES.
    None without the library (`pip install nvidia-ml-py`) or its driver."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        uuid = torch.cuda.get_device_properties(device).uuid
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception as error:
        log.info("Energy is not measured: %s", error)
        return None
