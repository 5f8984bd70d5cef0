"""Loads Stable Diffusion pipelines from a folder or a hub id: safetensors only, no remote code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypeAlias

import diffusers
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils.logging import disable_progress_bar
from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

from argus.core.errors import ModelError, NotEnoughMemory
from argus.engine.memory import free_and_total, loading_errors
from argus.engine.sources import INDEX, class_name, model_folder, torch_device, torch_dtype

AnyPipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"


def load_pipeline(source: str, device: str = "cpu", dtype: str = "float32") -> AnyPipeline:
    """A diffusers pipeline on `device` with weights of `dtype`, its progress bar off.

    `source` is a folder that `save_pretrained` wrote, or the id of one on the Hugging Face hub.
    Raises BadRequest for an unknown device or dtype, ModelError for a missing folder, a class
    other than those in `PIPELINES`, weights that are not safetensors or a hub out of reach, and
    NotEnoughMemory when the weights do not fit.
    """
    where, precision = torch_device(device), torch_dtype(dtype)
    folder = model_folder(source)
    name = class_name(source, folder / INDEX)
    _check_memory(source, folder, where, precision)
    unchecked = name == StableDiffusionPipeline.__name__
    disable_progress_bar()  # loading takes a second or two, and often writes to a log
    disable_transformers_bar()
    try:
        with loading_errors(device, source):
            pipeline: AnyPipeline = getattr(diffusers, name).from_pretrained(
                folder,
                dtype=precision,
                use_safetensors=True,
                local_files_only=True,
                **({"safety_checker": None, "requires_safety_checker": False} if unchecked else {}),
            )
            pipeline.to(where)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"Cannot load {source}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_memory(source: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    need = _weight_bytes(folder, dtype)
    free, _ = free_and_total(device)
    if need > free:
        raise NotEnoughMemory(
            f"The weights of {source} take {need / 1e9:.1f} GB as {dtype}, "
            f"and {device} has {free / 1e9:.1f} GB free. Use a smaller dtype or another device."
        )


def _weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the loaded weights, from the headers of the files alone."""
    total = 0
    for path in folder.glob("*/*.safetensors"):
        if ".fp16." in path.name or path.parent.name == "safety_checker":
            continue  # a second copy of weights, and a part that is not loaded
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                total += math.prod(tensor["shape"]) * dtype.itemsize
    return total
