"""A model's files, in a folder or downloaded by hub id; its fingerprint; devices and dtypes.

Without diffusers, which takes seconds to import: a server uses this file and never loads a UNet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

import argus
from argus.core.errors import BadRequest, ModelError
from argus.core.family import UPSTREAM, Family

PACKAGE = Path(argus.__file__).parent
SHIPPED = "argus:"  # before a path in the package

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
SAMPLE_BYTES = 1 << 20
ENCODER_PARTS = ("text_encoder", "tokenizer")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def portable(source: str) -> str:
    """A model's source as other machines can find it: what this package ships by its path in the
    package."""
    with suppress(ValueError):
        return SHIPPED + Path(source).relative_to(PACKAGE).as_posix()
    return source


def model_folder(source: str) -> Path:
    """The local folder of a model's `source`, downloaded first if it is a hub id.

    Raises ModelError if it is missing, no diffusers pipeline, or cannot be downloaded.
    """
    if source == UPSTREAM:
        raise ModelError("The weights of this model are not here: only an upstream has them.")
    if source.startswith(SHIPPED):
        source = str(PACKAGE / source.removeprefix(SHIPPED))
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
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


def encoder_folder(source: str) -> Path:
    """The local folder of a diffusers pipeline that holds at least `text_encoder` and `tokenizer`;
    only these are downloaded, if it is a hub id. Raises ModelError if they are missing."""
    folder = Path(source).expanduser()
    if not folder.is_dir() and not source.startswith((".", "/", "~")) and source.count("/") == 1:
        with _hub_errors(source):
            patterns = [f"{part}/*" for part in ENCODER_PARTS]
            folder = Path(snapshot_download(source, allow_patterns=patterns))
    for part in ENCODER_PARTS:
        if not (folder / part).is_dir():
            raise ModelError(
                f"The text encoder {source} has no folder {part}: give the folder of a saved "
                "diffusers pipeline, or a hub id such as owner/name."
            )
    return folder


def _download(hub_id: str) -> Path:
    with _hub_errors(hub_id):
        index = Path(hf_hub_download(hub_id, INDEX))
        name = class_name(hub_id, index)  # before gigabytes are downloaded
        import diffusers  # only to download

        return Path(getattr(diffusers, name).download(hub_id, use_safetensors=True))


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Errors of a download as ModelErrors."""
    try:
        yield
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


def class_name(source: str, index: Path) -> str:
    """The pipeline class an index names. Raises ModelError unless it is one of `PIPELINES`."""
    try:
        content: dict[str, Any] = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{index} cannot be read as JSON: {error}") from error
    name = content.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(f"{source} is a {name}; Argus runs {' and '.join(PIPELINES)}.")
    return str(name)


def fingerprint(folder: Path) -> str:
    """A short hash of the model in `folder`, different for other weights or another scheduler.

    Covers the size and the ends of every safetensors file, since whole ones take seconds to read.
    """
    digest = hashlib.sha256()
    for path in [*sorted(folder.rglob("*.safetensors")), folder / SCHEDULER]:
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def weights_of(source: str) -> str:
    """The fingerprint of a model's weights; `UPSTREAM` for those that only an upstream has, which
    cannot be told apart. Raises as `model_folder`."""
    return UPSTREAM if source == UPSTREAM else fingerprint(model_folder(source))


def family_fingerprint(family: Family) -> str:
    """A short hash of what a family's qualities depend on: its variants, its weights, including the
    text encoder's, and which of its scorer's scores it names. Raises as `model_folder`."""
    facts: dict[str, Any] = {
        "variants": {name: variant.facts for name, variant in family.variants.items()},
        "weights": {
            name: weights_of(family.models[name])
            for name in sorted({variant.model for variant in family.variants.values()})
        },
    }
    if family.scorer is not None and family.scorer.score is not None:
        facts["score"] = family.scorer.score
    if family.encoder is not None:
        facts["encoder"] = fingerprint(encoder_folder(family.encoder))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def check_device(device: str, dtype: str) -> None:
    """Raise BadRequest for a device or dtype that cannot be used here."""
    torch_device(device)
    torch_dtype(dtype)


def settled(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Device and dtype, by default those of this machine. Raises as `check_device`."""
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    check_device(device, dtype)
    return device, dtype


def default_device() -> str:
    """`cuda` if torch can use it, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """float32 on a CPU, float16 on CUDA."""
    return "float16" if device.startswith("cuda") else "float32"


def torch_device(device: str) -> torch.device:
    """The device of a name. Raises BadRequest if torch cannot use it here."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise BadRequest(f"There is no device {device!r}: use cpu, cuda or cuda:N.") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BadRequest("This machine has no CUDA device that torch can use: use cpu.")
    if where.type not in ("cpu", "cuda"):
        raise BadRequest(f"Device {device!r} is not supported: use cpu, cuda or cuda:N.")
    return where


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype of a name. Raises BadRequest for a name that is not in `DTYPES`."""
    if dtype not in DTYPES:
        raise BadRequest(f"There is no dtype {dtype!r}: use one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]
