"""What memory there is, and what to do when a batch does not fit: try its halves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from argus.core.errors import NotEnoughMemory
from argus.core.machine import memory

T = TypeVar("T")


def in_halves(
    group: Sequence[T],
    work: Callable[[Sequence[T]], None],
    device: torch.device,
    on_shortage: Callable[[int], None],
) -> list[tuple[T, Exception]]:
    """Do the work for a group or, if that fails, for its halves, so that an item that cannot be
    done fails alone; returns the items that failed.

    `work` must leave everything unchanged when it raises. `on_shortage` is called with the size
    that is tried next when memory runs out. Raises only errors after which CUDA does not work in
    this process.
    """
    if not group:
        return []
    half = len(group) // 2
    try:
        with memory_errors(device):
            work(group)
        return []
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        if not half:
            return [(group[0], error)]
        if isinstance(error, NotEnoughMemory):
            on_shortage(half)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    parts = group[:half], group[half:]
    return [one for part in parts for one in in_halves(part, work, device, on_shortage)]


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn the errors that torch raises when memory runs out into NotEnoughMemory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{device} ran out of memory. Ask for a smaller picture.") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise NotEnoughMemory("This machine ran out of memory. Ask for less.") from error


@contextmanager
def loading_errors(device: torch.device | str, source: str) -> Iterator[None]:
    """Turn the errors that are raised when memory runs out while a model is loaded into
    NotEnoughMemory."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise NotEnoughMemory(f"{device} ran out of memory while loading {source}.") from error
        raise


def free_and_total(device: torch.device) -> tuple[int, int]:
    """The free bytes and all bytes of a GPU's memory, or of the machine's for another device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return memory()


def clean_up(device: torch.device) -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
