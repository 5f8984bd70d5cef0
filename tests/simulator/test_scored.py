"""Worlds from tables of scores: `argus train --table`, `argus simulate --table` and `sd35`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from argus.cli.main import app
from argus.control.cascades import Cascade, CascadeTuning
from argus.core.errors import BadRequest, ModelError
from argus.lab import training
from argus.quality.scores import read_scores
from argus.quality.sentences import load_encoder
from argus.simulator.requests import ON_TIME
from argus.simulator.runs import Scenario, simulate
from argus.simulator.scored import Source, predicted_by, world_of_table
from argus.simulator.worlds import load_world, reference

COSTS = """
exact: large
workers: 4
variants:
  large: {seconds: 10, load_s: 5}
  half: {seconds: 5, model: large}
  small: {seconds: 1, load_s: 3}
"""
THINGS = ("fish", "boat", "house", "tree", "bird", "clock", "chair", "horse")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """144 prompts: the small model cannot draw fish, boats, houses and trees."""
    rng, rows = np.random.default_rng(0), []
    for thing in THINGS:
        for colour in COLOURS:
            for place in ("sea", "road", "hill"):
                hard = THINGS.index(thing) < 4
                for seed in range(2):
                    noise = rng.normal(0, 0.1, 3)
                    rows.append(
                        (f"a {colour} {thing} by the {place}", seed,
                         *(np.array([1.0, 0.9, 0.3 if hard else 1.0]) + noise))
                    )  # fmt: skip
    file = tmp_path_factory.mktemp("scores") / "scores.parquet"
    columns = ["prompt", "seed", "large", "half", "small"]
    pd.DataFrame(rows, columns=columns).to_parquet(file)
    (file.parent / "costs.yaml").write_text(COSTS)
    return file


@pytest.fixture(scope="module")
def predictor(table: Path) -> Path:
    folder = table.parent / "predictor"
    run("train", "--table", table, "--exact", "large", "--unrelated", 0, "--out", folder)
    return folder


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_is_said_of_a_prompt_does_not_depend_on_its_own_scores(table: Path) -> None:
    scores = read_scores(table, "large")
    data = training.scored(scores, scores.quality(1.0), load_encoder("words", scores.prompts))
    before = training.train(data, "this", epochs=0, kernel=True)
    fold = training.folds(len(data.prompts), 0) == 2
    other = data.quality.copy()
    other[fold, 1:] -= 5.0
    after = training.train(replace(data, quality=other), "this", epochs=0, kernel=True)
    np.testing.assert_allclose(before.mean[fold], after.mean[fold], atol=1e-4)
    assert np.abs(before.mean[~fold, 2] - after.mean[~fold, 2]).max() > 0.1


def test_a_saved_predictor_says_of_its_prompts_what_it_said_when_they_were_held_out(
    table: Path, predictor: Path
) -> None:
    scores = read_scores(table, "large")
    told = pd.read_parquet(predictor / "held_out.parquet")
    wide = told.pivot_table(index="prompt", columns="variant", values="mean")
    unit = scores.unit(0.0)
    known = predicted_by(predictor, scores, unit)
    np.testing.assert_allclose(known[:, 2], wide["small"][list(scores.prompts)], atol=1e-5)
    np.testing.assert_allclose(predicted_by(predictor, scores, 2 * unit)[:, 2],
                               1 + (known[:, 2] - 1) / 2, atol=1e-5)  # fmt: skip
    new = replace(scores, prompts=tuple(f"{prompt} today" for prompt in scores.prompts))
    hard = np.array([any(t in p for t in THINGS[:4]) for p in new.prompts])
    said = predicted_by(predictor, new, unit)[:, 2]
    assert said[~hard].min() > said[hard].max()


def test_a_file_says_what_argus_would_bring(table: Path, predictor: Path) -> None:
    output = run(
        "simulate", "--table", table, "--profile", table.parent / "costs.yaml", "--unrelated", 0,
        "--predictor", predictor, "--trace", "step", "--load", 1.5, "--policies",
        "price,price-blind", "--minutes", 45, "--json",
    )  # fmt: skip
    found = json.loads(output.splitlines()[-1])
    assert found["price"]["effective_quality"] > found["price-blind"]["effective_quality"] + 0.05


def test_variants_of_one_model_share_its_workers(table: Path) -> None:
    world, workers = world_of_table(Source(table), table.parent / "costs.yaml", 0.0)
    assert workers == [4]
    assert world.table.variants == ("exact", "half", "small")
    assert world.table.strategies == ("exact", "steps", "model")
    assert world.table.model.tolist() == [0, 0, 1]
    np.testing.assert_allclose(world.table.alone_s[:, 0], [10, 5, 1])
    np.testing.assert_allclose(world.truth[:, 0], 1)
    by_rank, _ = world_of_table(Source(table, ranks=True), table.parent / "costs.yaml", 0.0)
    lost = world.truth.mean(0).min()
    assert by_rank.truth.mean(0).min() == pytest.approx(lost)


def test_a_cascade_sees_the_picture_and_not_what_another_would_have_been(table: Path) -> None:
    """Half of the small model's pictures are unlucky, which no prompt tells."""
    world, _ = world_of_table(Source(table), table.parent / "costs.yaml", 0.0)
    assert world.pictures is not None
    pictures = world.pictures
    quality, judged = pictures.quality.copy(), pictures.judged.copy()
    quality[:, 2], judged[:, 2] = (0.2, 1.0), (0.0, 1.0)
    world = replace(
        world,
        truth=quality.mean(2),
        pictures=replace(pictures, quality=quality, judged=judged),
        judging_error=0.05,
    )
    scenario = Scenario(world, (0,) * 8, np.full(40, 110.0), 3.0, own=True)
    policy = Cascade(world.table, [scenario.slo], CascadeTuning(heavy=1))
    _, done = simulate(scenario, "cascade", policy=policy)
    requests = done.requests
    small = (requests.variant == 2) & (requests.outcome == ON_TIME)
    assert small.any() and (requests.variant == 1).any()
    assert not (requests.variant == 0)[50:].any()
    assert requests.quality[small].mean() > 0.85
    # the oracle knows the mean alone
    _, oracle = simulate(scenario, "oracle")
    small = (oracle.requests.variant == 2) & (oracle.requests.outcome == ON_TIME)
    assert not small.any() or oracle.requests.quality[small].mean() == pytest.approx(0.6, abs=0.1)


LARGE = "variants: {large: {seconds: 5}}\n"


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ("exact: large", "has no `variants`"),
        ("variants: {large: {load_s: 1}}", "needs `seconds`"),
        ("variants: {large: {seconds: fast}}", "must be a number"),
        ("variants: {large: {seconds: 0}}", "must be a number"),
        ("variants: {large: {seconds: 5}, tiny: {seconds: 1}}", "no scores of 'tiny'"),
        ("exact: large\nvariants: {small: {seconds: 5}}", "name another variant as `exact`"),
        ("exact: large\nworkers: many\nvariants: {large: {seconds: 5}}", "workers is 'many'"),
        ("variants: [", "cannot be read"),
        ("variants: {large: {seconds: 5, steps: 0}}", "steps of large is 0"),
        (LARGE + "batching: 4", "write batching as"),
        (LARGE + "batching: {batches: [1, 2]}", "write batching as"),
        (LARGE + "batching: {batches: [1, 2], gain: [1, 0]}", "gain of batching is 0"),
        (LARGE + "discriminator: 0.3", "write discriminator as"),
    ],
)
def test_costs_that_do_not_fit_are_refused(
    costs: str, message: str, table: Path, tmp_path: Path
) -> None:
    (tmp_path / "costs.yaml").write_text(costs)
    with pytest.raises(BadRequest, match=message):
        world_of_table(Source(table), tmp_path / "costs.yaml")


def test_a_predictor_of_other_variants_is_refused(table: Path, predictor: Path) -> None:
    scores = read_scores(table, "half")
    with pytest.raises(ModelError, match="was not trained for this exact variant"):
        predicted_by(predictor, scores, 1.0)


def test_without_its_scores_the_world_of_real_models_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARGUS_REFERENCE", raising=False)
    with pytest.raises(BadRequest, match=r"--scores.*HADIS authors' artifact"):
        load_world("sd35")


def test_the_world_of_real_models_keeps_their_published_order(tmp_path: Path) -> None:
    try:
        given = pd.read_csv(reference("hadis_scores.csv"))
    except BadRequest as error:
        pytest.skip(str(error))  # public data that is not part of the project
    given[given["prompt"].isin(given["prompt"].unique()[:400])].to_csv(tmp_path / "s.csv")
    few = pd.read_csv(tmp_path / "s.csv").iloc[:, 1:]
    few.to_csv(tmp_path / "s.csv", index=False)
    world = load_world("sd35", Source(tmp_path / "s.csv"))
    means = dict(zip(world.table.variants, world.truth.mean(0), strict=True))
    assert means["exact"] == 1
    assert means["sdxl_lightning_2"] < means["sd35_large_turbo_4"] < means["sd35_medium_50"]
    assert 0.5 < means["sdxl_lightning_2"] < 0.8
    np.testing.assert_allclose(world.table.alone_s[:, 0], [27, 13, 1.3, 0.5])
    assert len(world.sources) > 5


def test_variants_may_be_called_by_numbers_and_prompts_spelled_otherwise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (f"a {'red' if i % 2 else 'blue'} thing number {i}", rng.normal(9, 1), rng.normal(4, 1))
        for i in range(60)
    ]
    file, costs = tmp_path / "scores.csv", tmp_path / "costs.yaml"
    pd.DataFrame(rows, columns=["prompt", "50", "20"]).to_csv(file, index=False)
    costs.write_text("exact: 50\nvariants: {50: {seconds: 5}, 20: {seconds: 2, model: 50}}\n")
    world, _ = world_of_table(Source(file), costs)
    assert world.table.variants == ("exact", "20")


def test_a_prompt_in_other_spelling_is_predicted_as_when_it_was_held_out(
    table: Path, predictor: Path
) -> None:
    scores = read_scores(table, "large")
    spelled = replace(scores, prompts=tuple(f"{one.title()}." for one in scores.prompts))
    as_held_out, found = (predicted_by(predictor, one, 1.0) for one in (scores, spelled))
    assert found == pytest.approx(as_held_out)
