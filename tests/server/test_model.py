"""What the server decides before it starts: how many pictures its worker makes at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from argus.config import Settings
from argus.core.errors import ModelError
from argus.core.profile import MAX_BATCH, ModelProfile, Profile
from argus.server.model import ServedFamily


def profile_of(family: str, device: str, file: Path) -> Path:
    """A profile of a model that gains nothing from batches above four."""
    model = ModelProfile(
        step_s={1: 0.01, 2: 0.015, 4: 0.02, 8: 0.04}, decode_s={1: 0.01}, encode_s=0.01,
        picture_s=0.001, load_s={"disk": 1.0, "page_cache": 0.5}, peak_bytes=1,
    )  # fmt: skip
    models = {"tiny": model, "other": model}
    profile = Profile(family, {"device": device}, 32, 32, {}, models)
    file.write_text(json.dumps(profile.to_json()))
    return file


def test_the_worker_s_batch_is_the_best_one_of_the_profile(
    tiny_family: Path, tmp_path: Path
) -> None:
    def served(**more: object) -> int:
        settings = Settings(family=str(tiny_family), device="cpu", **more)  # type: ignore[arg-type]
        return ServedFamily.of(settings).models[0][0].max_batch

    here = profile_of("tiny", "cpu", tmp_path / "here.json")
    elsewhere = profile_of("tiny", "cuda:0", tmp_path / "elsewhere.json")
    assert served() == MAX_BATCH
    assert served(profile=here) == 4
    assert served(profile=elsewhere) == MAX_BATCH  # a GPU's says nothing of a CPU
    assert served(profile=here, max_batch=7) == 7
    with pytest.raises(ModelError, match="is of 'other', not of 'tiny'"):
        served(profile=profile_of("other", "cpu", tmp_path / "other.json"))
    with pytest.raises(ModelError, match="cannot be read"):
        served(profile=tmp_path / "none.json")
