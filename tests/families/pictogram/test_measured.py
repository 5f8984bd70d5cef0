"""What ships beside the weights was measured of these weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argus.core.family import EXACT
from argus.core.profile import Profile
from argus.engine.sources import family_fingerprint, fingerprint
from argus.families.catalog import default_family
from argus.quality import table
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor
from argus.simulator.worlds import load_world

FAMILY = default_family()
FOLDER = Path(FAMILY.folder)


def test_the_table_holds_every_variant_of_every_prompt() -> None:
    rows = table.read(FOLDER / "quality.parquet")
    assert set(rows["variant"]) == set(FAMILY.variants)
    assert not rows.duplicated(["prompt", "variant", "seed"]).any()
    whole = rows.groupby(["prompt", "seed"])["variant"].count()
    assert (whole == len(FAMILY.variants)).all()
    assert rows["prompt"].nunique() >= 5000
    judged = table.judged(rows)
    assert judged["prompt"].nunique() >= 1500
    assert judged["seed"].nunique() == 4
    assert FAMILY.scorer is not None
    assert FAMILY.scorer.unrelated == pytest.approx(float(rows["s0"].iloc[0]), abs=5e-4)


def test_the_profile_is_of_these_weights() -> None:
    profile = Profile.read(FOLDER / "profile.json")
    assert profile.weights == {
        name: fingerprint(Path(folder)) for name, folder in FAMILY.models.items()
    }
    steps = {name: model.step_s[8] for name, model in profile.models.items()}
    assert steps["small"] < steps["base"]


def test_the_predictor_knows_easy_prompts_from_hard_ones() -> None:
    predictor = Predictor.load(FOLDER / "predictor", family_fingerprint(FAMILY))
    encoder = PromptEncoder.load(Path(FAMILY.models[FAMILY.exact.model]))
    assert list(predictor.variants) == list(FAMILY.variants)
    vector = encoder.embed("a red house in the snow").vector
    others = ("four blue boats at sea", "red house in the snow")
    far, near = (predictor.predict(vector, encoder.embed(one).vector) for one in others)
    deepest = predictor.variants.index(f"skip-{max(FAMILY.skips)}")
    assert near.mean[deepest] > far.mean[deepest] + 0.05
    assert near.mean[predictor.variants.index(EXACT)] == 1.0


def test_everything_measured_is_small() -> None:
    files = [FOLDER / "profile.json", FOLDER / "quality.parquet", *(FOLDER / "predictor").iterdir()]
    assert sum(file.stat().st_size for file in files) <= 10e6


def test_the_family_is_a_world_to_simulate() -> None:
    world = load_world("pictogram")
    assert world.table.variants == tuple(FAMILY.variants)
    assert world.truth.shape == world.predicted.shape
    assert not np.isnan(world.predicted).any()
    costs = world.table.cost_s(world.slo * world.table.slo_s)[:, 0]
    assert costs[world.table.variants.index("small")] < 0.5 * costs[0]
