from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import pytest
import torch

from argus.core.errors import BadRequest, ModelError, NotEnoughMemory
from argus.engine.loading import load_pipeline
from argus.engine.samplers import new_scheduler


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match=r"no folder \./nowhere"):
        load_pipeline("./nowhere")


def test_a_folder_without_an_index_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model_index"):
        load_pipeline(str(tmp_path))


def test_a_pipeline_of_another_class_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    shutil.copytree(tiny_sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "FluxPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is a FluxPipeline; Argus runs StableDiffusionPipeline"):
        load_pipeline(str(folder))


def test_pickled_weights_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_sd, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="Cannot load"):
        load_pipeline(str(folder))


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr("argus.engine.sources.hf_hub_download", unreachable)
    with pytest.raises(ModelError, match="hub cannot be reached"):
        load_pipeline("nobody/nothing")


def test_a_model_larger_than_memory_is_refused(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available, total = 1000, 2000

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    with pytest.raises(NotEnoughMemory, match="free"):
        load_pipeline(str(tiny_sd))


def test_an_unknown_device_dtype_or_sampler_says_which_there_are(tiny_sd: Path) -> None:
    with pytest.raises(BadRequest, match="use cpu, cuda"):
        load_pipeline(str(tiny_sd), device="toaster")
    with pytest.raises(BadRequest, match="float32, float16, bfloat16"):
        load_pipeline(str(tiny_sd), dtype="float8")
    with pytest.raises(BadRequest, match="ddim"):
        new_scheduler("magic", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_says_so(tiny_sd: Path) -> None:
    with pytest.raises(BadRequest, match="no CUDA device"):
        load_pipeline(str(tiny_sd), device="cuda")
