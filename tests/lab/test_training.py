from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from argus.core.errors import BadRequest, ModelError
from argus.families.catalog import find_family
from argus.lab import held_out, training
from argus.lab.training import Examples, Trained
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor

COSTS = np.array([1.0, 0.5, 0.4])
MADE_FOR = "this family"


def world(prompts: int = 500) -> Examples:
    """Every second prompt bears the cheap model; skipping is as good as the neighbour is alike."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((prompts, 12)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = rng.uniform(0.4, 1.0, prompts).astype(np.float32)
    aside = rng.standard_normal((prompts, 12)).astype(np.float32)
    aside -= (aside * vectors).sum(1, keepdims=True) * vectors
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    near = similarity[:, None] * vectors + np.sqrt(1 - similarity**2)[:, None] * aside
    beside = near.astype(np.float32)
    bears = vectors[:, 0] > 0
    means = np.stack([np.ones(prompts), similarity, np.where(bears, 1.0, 0.4)], axis=1)
    quality = means[:, :, None] + 0.1 * rng.standard_normal((prompts, 3, 2))
    quality[:, 0] = 1.0
    names = tuple(f"prompt {i}" for i in range(prompts))
    return Examples(
        names, ("exact", "skip-5", "small"), (False, True, False), vectors, beside, quality
    )


@pytest.fixture(scope="module")
def data() -> Examples:
    return world()


@pytest.fixture(scope="module")
def trained(data: Examples) -> Trained:
    return training.train(data, MADE_FOR, epochs=150)


def test_held_out_prompts_are_foretold(data: Examples, trained: Trained) -> None:
    errors = held_out.errors(data, trained)
    assert set(errors) == {"skip-5", "small"}
    for one in errors.values():
        assert one.error < 0.2
        assert one.rank > 0.7
        assert one.covered >= 0.8


def test_decisions_by_predictions_beat_the_same_mix_for_all(
    data: Examples, trained: Trained
) -> None:
    at = {one.load: one for one in held_out.regret(data, trained.mean, COSTS)}
    assert at[1.0].blind == pytest.approx(1.0, abs=0.01)
    assert at[1.5].recovered > 0.8
    blind = held_out.regret(data, np.broadcast_to(trained.mean.mean(0), trained.mean.shape), COSTS)
    assert all(abs(one.predicted - one.blind) < 0.01 for one in blind)


def test_decisions_are_not_judged_on_the_seed_that_they_were_made_by(
    data: Examples, trained: Trained
) -> None:
    one_seed = replace(data, quality=data.quality[:, :, :1])
    assert held_out.regret(one_seed, trained.mean, COSTS) == []


def counted(prompts: int = 600) -> Examples:
    """The same world, whose scorer says right or wrong, and whose exact pictures are right in eight
    of ten."""
    data, rng = world(prompts), np.random.default_rng(1)
    bears = data.vectors[:, 0] > 0
    chances = [np.full(prompts, 0.8), 0.8 * data.similarity, np.where(bears, 0.8, 0.3)]
    right = (rng.random((prompts, 3, 4)) < np.stack(chances, axis=1)[:, :, None]).astype(float)
    gain = float(right[:, 0].mean())
    quality = 1 + (right - right[:, :1]) / gain
    return replace(data, quality=quality, right=right, gain=gain)


def test_right_or_wrong_is_foretold_as_a_probability() -> None:
    data = counted()
    trained = training.train(data, MADE_FOR, epochs=150)
    skip, small = (trained.mean[:, v] for v in (1, 2))
    bears = data.vectors[:, 0] > 0
    assert small[bears].mean() == pytest.approx(1.0, abs=0.15)
    assert small[~bears].mean() == pytest.approx(0.3 / 0.8, abs=0.15)
    assert np.abs(skip - data.similarity).mean() < 0.12
    again = trained.predictor.predict_all(data.vectors, data.near)[0]
    assert (again >= 1 - 1 / data.gain - 1e-6).all()  # no probability is below 0
    assert (again[:, 0] == 1).all()


def test_nine_groups_of_ten_are_above_their_bound_on_average() -> None:
    """A bound that a single picture, which is right or wrong, could not have."""
    data = counted()
    trained = training.train(data, MADE_FOR, epochs=150)
    for one in held_out.errors(data, trained).values():
        assert one.covered >= 0.8
    gap = (trained.mean - trained.low)[:, 1:]
    assert (gap >= 0).all()
    assert gap.mean() < 0.25  # single pictures are half a quality off


def test_prompts_with_a_single_picture_teach_and_others_judge() -> None:
    whole, judged = counted(1500), np.arange(1500) < 100
    assert whole.right is not None
    single = ~judged[:, None, None] & (np.arange(4) > 0)
    quality, right = (np.where(single, np.nan, x) for x in (whole.quality, whole.right))
    data = replace(whole, quality=quality, right=right, judged=judged)
    few = replace(
        whole,
        prompts=whole.prompts[:100],
        vectors=whole.vectors[:100],
        near=whole.near[:100],
        quality=whole.quality[:100],
        right=whole.right[:100],
    )
    taught, alone = (training.train(one, MADE_FOR, epochs=150) for one in (data, few))
    assert not np.isnan(taught.mean).any()
    assert not np.isnan(taught.low).any()
    errors, before = held_out.errors(data, taught), held_out.errors(few, alone)
    truth = np.where(whole.vectors[:100, 0] > 0, 1.0, 0.3 / 0.8)
    off, far_off = (np.abs(one.mean[:100, 2] - truth).mean() for one in (taught, alone))
    assert off < far_off
    assert errors["small"].rank > before["small"].rank
    assert errors["small"].covered >= 0.8
    at = {one.load: one for one in held_out.regret(data, taught.mean, COSTS)}
    told = {one.load: one for one in held_out.regret(few, alone.mean, COSTS)}
    assert at[1.5].blind == pytest.approx(told[1.5].blind)  # judged on the same pictures
    assert at[1.5].predicted > at[1.5].blind


def test_only_what_skips_depends_on_the_neighbour(data: Examples, trained: Trained) -> None:
    most, least = int(data.similarity.argmax()), int(data.similarity.argmin())
    vector, towards = data.vectors[most], data.near[least] - data.vectors[least]
    far, near = (trained.predictor.predict(vector, vector + k * towards) for k in (1.0, 0.1))
    assert near.mean[1] > far.mean[1] + 0.2
    assert near.mean[2] == far.mean[2]
    assert near.mean[0] == near.low[0] == 1.0
    assert (near.low[1:] <= near.mean[1:]).all()
    nobody = trained.predictor.predict(vector, None)
    assert np.isnan(nobody.mean).tolist() == [False, True, False]
    assert nobody.mean[2] == far.mean[2]


def test_a_prompt_that_comes_again_bears_every_skip() -> None:
    """Though pictures beside all measured neighbours were bad."""
    data = world()
    quality = data.quality.copy()
    quality[:, 1] -= quality[:, 1].mean() - 0.2
    near = 0.5 * data.near + 0.5 * np.roll(data.near, 1, axis=0)  # none of them is the same
    bad = replace(data, quality=quality, near=near.astype(np.float32))
    predictor = training.train(bad, MADE_FOR, epochs=150).predictor
    again, _ = predictor.predict_all(bad.vectors, bad.vectors)
    beside, _ = predictor.predict_all(bad.vectors, bad.near)
    assert again[:, 1].mean() > 0.7
    assert beside[:, 1].mean() == pytest.approx(0.2, abs=0.1)


def test_a_predictor_is_kept(data: Examples, trained: Trained, tmp_path: Path) -> None:
    trained.predictor.save(tmp_path / "here", {"prompts": 500})
    kept = Predictor.load(tmp_path / "here", MADE_FOR)
    mean, low = kept.predict_all(data.vectors, data.near)
    expected = trained.predictor.predict_all(data.vectors, data.near)
    np.testing.assert_array_equal(np.stack([mean, low]), np.stack(expected))
    one = kept.predict(data.vectors[3], data.near[3])
    np.testing.assert_allclose(one.mean, mean[3], atol=1e-5)


def test_a_predictor_of_something_else_is_refused(trained: Trained, tmp_path: Path) -> None:
    trained.predictor.save(tmp_path)
    with pytest.raises(ModelError, match="other variants, weights or another text encoder"):
        Predictor.load(tmp_path, "another family")
    (tmp_path / "predictor.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="no predictor that can be read"):
        Predictor.load(tmp_path, MADE_FOR)
    with pytest.raises(ModelError, match="argus train"):
        Predictor.load(tmp_path / "nowhere", MADE_FOR)


def test_examples_are_made_of_the_same_seed_and_nothing_is_lost_on_average(
    tiny_family: Path, tiny_sd: Path
) -> None:
    family = find_family(str(tiny_family))
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            {"prompt": f"prompt {i}", "variant": v, "seed": s, "s0": 0.1,
             "similarity": 0.5 + i / 200 if v.startswith("skip") else None,
             "neighbour": f"prompt {i + 1}" if v.startswith("skip") else None,
             "score": rng.random()}
            for i in range(60) for v in family.variants for s in range(2)
        ]
    )  # fmt: skip
    data = training.examples(rows, family, PromptEncoder.load(tiny_sd))
    assert data.quality.shape == (60, len(family.variants), 2)
    np.testing.assert_array_equal(data.quality[:, 0], 1.0)
    at, beside = data.prompts.index("prompt 7"), data.prompts.index("prompt 8")
    np.testing.assert_allclose(data.near[at], data.vectors[beside], atol=1e-6)
    assert list(data.skips) == [bool(one.skip) for one in family.variants.values()]
    means = rows.groupby("variant")["score"].mean()
    expected = (means[list(data.variants)] - 0.1) / (means["exact"] - 0.1)
    np.testing.assert_allclose(data.quality.mean((0, 2)), expected, atol=1e-6)
    assert data.right is None
    counts = rows.assign(score=(rows["score"] > 0.5).astype(float))
    said = training.examples(counts, family, PromptEncoder.load(tiny_sd))
    assert said.right is not None
    np.testing.assert_allclose(
        said.quality, 1 + (said.right - said.right[:, :1]) / said.gain, atol=1e-6
    )


def test_a_table_of_another_family_is_refused(tiny_family: Path, tiny_sd: Path) -> None:
    family = find_family(str(tiny_family))
    rows = pd.DataFrame(
        {"prompt": ["a"], "variant": ["exact"], "seed": [0], "s0": [0.1], "similarity": [None],
         "score": [0.5]}
    )  # fmt: skip
    with pytest.raises(BadRequest, match="no rows of 'skip"):
        training.examples(rows, family, PromptEncoder.load(tiny_sd))
