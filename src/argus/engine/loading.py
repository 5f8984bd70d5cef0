"""Loads Stable Diffusion pipelines from a folder or a hub id: safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from argus.core.errors import BadRequest, ModelError, NotEnoughMemory

AnyPipeline: TypeAlias = "StableDiffusionPipeline | StableDiffusionXLPipeline"
PIPELINES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
SAMPLE_BYTES = 1 << 20
SCHEDULER = "scheduler/scheduler_config.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pipeline(source: str, device: str = "cpu", dtype: str = "float32") -> AnyPipeline:
    """A diffusers pipeline on `device` with weights of `dtype`, its progress bar off.

    `source` is a folder that `save_pretrained` wrote, or the id of one on the Hugging Face hub.
    Raises BadRequest for an unknown device or dtype, ModelError for a missing folder, a class
    other than those in `PIPELINES`, weights that are not safetensors or a hub out of reach, and
    NotEnoughMemory when the weights do not fit.
    """
    where, precision = _device(device), _dtype(dtype)
    folder = model_folder(source)
    pipeline_class = PIPELINES[_class_name(source, folder / "model_index.json")]
    _check_memory(source, folder, where, precision)
    unchecked = pipeline_class is StableDiffusionPipeline
    try:
        pipeline: AnyPipeline = pipeline_class.from_pretrained(
            folder,
            dtype=precision,
            use_safetensors=True,
            local_files_only=True,
            **({"safety_checker": None, "requires_safety_checker": False} if unchecked else {}),
        )
        pipeline.to(where)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{device} ran out of memory while loading {source}.") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"Cannot load {source}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _device(device: str) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError:
        raise BadRequest(f"There is no device {device!r}: use cpu, cuda or cuda:N.") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BadRequest("This machine has no CUDA device that torch can use: use cpu.")
    if where.type not in ("cpu", "cuda"):
        raise BadRequest(f"Device {device!r} is not supported: use cpu, cuda or cuda:N.")
    return where


def _dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise BadRequest(f"There is no dtype {dtype!r}: use one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def check_device(device: str, dtype: str) -> None:
    """Raise BadRequest for a device or dtype that cannot be used here."""
    _device(device)
    _dtype(dtype)


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """float32 on a CPU, float16 on CUDA."""
    return "float16" if device.startswith("cuda") else "float32"


def fingerprint(folder: Path) -> str:
    """A short name for the model in `folder`, another for other weights or another scheduler.

    Covers the size and the ends of every safetensors file, since whole ones take seconds to read.
    """
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*/*.safetensors")), folder / SCHEDULER]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def model_folder(source: str) -> Path:
    """The local folder of a model's `source`, downloaded first if it is a hub id.

    Raises ModelError if there is none.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"The folder {source} holds no model_index.json. "
                "It must be one that a diffusers pipeline saved with save_pretrained."
            )
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(
            f"There is no folder {source}. Give the folder of a saved diffusers pipeline, "
            "or a hub id such as owner/name."
        )
    return _download(source)


def _download(hub_id: str) -> Path:
    try:
        index = Path(hf_hub_download(hub_id, "model_index.json"))
        name = _class_name(hub_id, index)  # before gigabytes travel
        return Path(PIPELINES[name].download(hub_id, use_safetensors=True))
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{hub_id} is no folder here and no valid hub id: {error}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"There is no folder and no hub model {hub_id}.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(
            f"{hub_id} is not on this machine and the model hub cannot be reached. "
            "Check the network, or give a folder."
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{hub_id} is not a diffusers pipeline: no model_index.json.") from error
    except HfHubHTTPError as error:
        raise ModelError(f"The model hub refused {hub_id}: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot download {hub_id} as safetensors: {error}") from error


def _class_name(source: str, index: Path) -> str:
    try:
        content: dict[str, Any] = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read as JSON: {error}") from error
    name = content.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(f"{source} is a {name}; Argus runs {' and '.join(PIPELINES)}.")
    return str(name)


def _check_memory(source: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    need = _weight_bytes(folder, dtype)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    if need > free:
        raise NotEnoughMemory(
            f"The weights of {source} take {need / 1e9:.1f} GB as {dtype}, "
            f"and {device} has {free / 1e9:.1f} GB free. Use a smaller dtype or another device."
        )


def _weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes the weights take once loaded, from the headers of the files alone."""
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
