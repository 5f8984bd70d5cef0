"""How worker processes are started."""

from __future__ import annotations

import multiprocessing
import sys
from contextlib import suppress
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Literal

PRELOADED = ["argus.workers.patient", "argus.engine.engine"]
GPUS = ("nvidia*", "kfd", "dxg")  # in /dev


def method(device: str) -> Literal["forkserver", "spawn"]:
    """How processes for a device are started."""
    return "forkserver" if sys.platform == "linux" and device == "cpu" else "spawn"


def context(device: str) -> SpawnContext | ForkServerContext:
    """The multiprocessing context for workers on a device (`cpu`, `cuda:0`).

    On Linux, processes for the CPU are forked from a server process that has imported the libraries
    and done nothing else: seconds sooner than a new interpreter, and they share the libraries'
    memory. CUDA cannot be used in a fork once anything has asked for its devices, as imports may.
    """
    if method(device) == "spawn":
        return spawning()
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    return forking


def spawning() -> SpawnContext:
    """The context that starts a new interpreter."""
    return multiprocessing.get_context("spawn")


def prepare(device: str | None) -> None:
    """Start to import the libraries for workers, beside what this process does meanwhile; nothing
    for devices that do not need it. `device` as in the settings: None is the GPU if there is
    one."""
    on_cpu = device == "cpu" or (
        device is None and not any(any(Path("/dev").glob(name)) for name in GPUS)
    )
    if on_cpu and isinstance(context("cpu"), ForkServerContext):
        from multiprocessing import forkserver  # exists on POSIX only

        with suppress(OSError):  # workers are started without it then
            forkserver.ensure_running()
