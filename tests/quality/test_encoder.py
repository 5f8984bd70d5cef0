from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argus.core.errors import ModelError
from argus.engine.sources import model_folder
from argus.families.catalog import default_family
from argus.quality.encoder import PromptEncoder


@pytest.fixture(scope="module")
def bundled() -> PromptEncoder:
    family = default_family()
    return PromptEncoder.load(model_folder(family.models[family.exact.model]))


def test_a_prompt_becomes_a_unit_vector(bundled: PromptEncoder) -> None:
    embedding = bundled.embed("a red house in the snow")
    assert embedding.vector.dtype == np.float32
    assert np.linalg.norm(embedding.vector) == pytest.approx(1, abs=1e-5)
    assert not embedding.truncated
    assert np.array_equal(bundled.embed("a red house in the snow").vector, embedding.vector)


def test_another_wording_is_nearer_than_another_scene(bundled: PromptEncoder) -> None:
    here = bundled.embed("a red house in the snow").vector
    reworded = bundled.embed("in the snow, one red house").vector
    other = bundled.embed("three small blue fish in the sea").vector
    assert here @ reworded > here @ other + 0.1


def test_a_prompt_past_the_limit_is_said_to_be_truncated(bundled: PromptEncoder) -> None:
    long = bundled.embed("a red house " * 60)
    longer = bundled.embed("a red house " * 60 + "and a boat")
    assert long.truncated
    assert np.array_equal(long.vector, longer.vector)


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no CLIP text encoder"):
        PromptEncoder.load(tmp_path)


def test_prompts_together_have_the_embeddings_that_they_have_alone(bundled: PromptEncoder) -> None:
    prompts = ["a red house in the snow", "fish", "a small boat " * 60, "three blue fish, night"]
    for prompt, together in zip(prompts, bundled.embed_all(prompts), strict=True):
        alone = bundled.embed(prompt)
        assert np.allclose(together.vector, alone.vector, atol=1e-5)
        assert together.truncated == alone.truncated
