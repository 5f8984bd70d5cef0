"""What the benchmarks compute is tested where a wrong number would look like a right one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gpu
import numpy as np
import pandas as pd
import pytest
import real_models
from headroom import by_prompt

from argus.lab import training
from argus.lab.mixes import believed, best_mix, judged, judged_knowing
from argus.quality.scores import Scores

COSTS = np.array([1.0, 0.6, 0.3])


def test_the_best_mix_gives_the_cheap_variant_to_whom_it_costs_least() -> None:
    q = np.array([[1.0, 0.9, 0.9, 0.0], [1.0, 0.5, 0.1, 0.0]])
    shares = best_mix(q, np.append(COSTS, 0.0), budget=0.65, weights=np.ones(2))
    np.testing.assert_allclose(shares @ np.append(COSTS, 0.0), [0.3, 1.0], atol=1e-6)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8, 1.5])
def test_the_best_mix_keeps_to_its_budget_and_sheds_the_rest(budget: float) -> None:
    random = np.random.default_rng(0).random((50, 3))
    q = np.c_[random + np.array([1, 0.8, 0.6]), np.zeros(50)]
    costs = np.append(COSTS, 0.0)
    shares = best_mix(q, costs, budget, np.ones(50))
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (shares @ costs).mean() <= budget + 1e-6
    np.testing.assert_allclose(shares[:, 3].mean() > 0, budget < 0.3)


def test_who_chooses_gains_nothing_from_noise() -> None:
    """Variants that are all alike: knowing each prompt's noisy scores is worth nothing."""
    rng = np.random.default_rng(1)
    prompts, variants = 600, ["exact", "half", "third"]
    truth = rng.choice([0.05, 0.4, 0.9], prompts)
    rows = pd.DataFrame(
        [
            {"prompt": f"p{i}", "variant": v, "seed": s, "s0": 0.05,
             "score": truth[i] + 0.15 * rng.standard_normal()}
            for i in range(prompts) for v in variants for s in range(2)
        ]
    )  # fmt: skip
    names, q = by_prompt(rows, variants)
    one_group = np.zeros(len(names), np.int64)
    assert judged(q, COSTS, 0.5, one_group) == pytest.approx(1.0, abs=0.04)
    assert judged_knowing(q, believed(q), COSTS, 0.5) == pytest.approx(1.0, abs=0.04)


def test_who_has_seen_one_picture_of_each_knows_better_than_who_has_seen_none() -> None:
    """Every second prompt bears the cheap variant; scores are mostly chance."""
    rng = np.random.default_rng(2)
    truth = np.ones((800, 3))
    truth[::2, 2] = 0.2
    q = truth[:, :, None] + 0.5 * rng.standard_normal((800, 3, 2))
    blind = judged(q, COSTS, 0.45, np.zeros(800, np.int64))
    naive = judged(q, COSTS, 0.45, np.arange(800))
    knowing = judged_knowing(q, believed(q), COSTS, 0.45)
    assert knowing > blind + 0.05
    assert knowing > naive + 0.02


@pytest.mark.slow
def test_the_gpu_benchmark_runs_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(
        device="cpu", dtype="float32", steps=4, requests=8, latency_s=0.5,
        compiled=False, tiny=True, as_json=True,
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["seconds_an_image"]) == {"diffusers", "argus"}
    assert {"of_limit", "vs_grouped", "p95_latency_ratio", "overhead"} <= set(result)


def test_the_share_of_the_gain_is_that_of_hindsight_over_chance() -> None:
    gain = np.array([4.0, 3.0, 2.0, 1.0])
    assert real_models.share(gain, gain) == pytest.approx(1)
    assert real_models.share(-gain, gain) == pytest.approx(-1)
    assert real_models.share(np.array([1.0, 0.0, 0.0, 1.0]), gain) == pytest.approx(0)


def test_prompts_that_were_learned_from_are_not_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FEWEST", 1)
    known = Scores(("A fish", "a boat"), ("large", "small"), (0,), np.zeros((2, 2, 1)))
    new = Scores(("a fish", "a tree"), ("large", "small"), (0,), np.ones((2, 2, 1)))
    left = real_models.without_known(new, known)
    assert left.prompts == ("a tree",)
    assert left.values.shape == (1, 2, 1)
    with pytest.raises(SystemExit, match="0 prompts that are not in"):
        real_models.without_known(known, known)


def test_the_load_carried_lies_where_the_first_promise_breaks() -> None:
    def run(violations: float, effective: float) -> dict[str, float]:
        return {"violations": violations, "effective": effective}

    grid = real_models.GRIDS["bursty"]
    runs = [run(0.02, 1.0), run(0.0, 0.96), run(0.02, 0.86), *[run(0.5, 0.4)] * (len(grid) - 3)]
    # of the way from the second load to the third, violations allow a half and quality 0.6
    expected = grid[1] + 0.5 * (grid[2] - grid[1])
    assert real_models.carried(runs, "bursty", 0.90) == pytest.approx(expected)
    assert real_models.carried(runs, "bursty", 0.99) == 0
    assert real_models.carried([run(0, 1)] * len(grid), "bursty", 0.90) == grid[-1]


def test_paired_differences_of_the_same_runs_are_nothing() -> None:
    rng = np.random.default_rng(0)
    count = rng.integers(1, 5, (3, 50)).astype(float)
    first = [{"count": c, "value": c * rng.random(50)} for c in count]
    lower = [{"count": one["count"], "value": one["value"] - 0.1 * one["count"]} for one in first]
    lead = real_models.over(first, lower)
    assert (lead.mean, lead.low, lead.high) == pytest.approx((0.1, 0.1, 0.1))
    alone = real_models.over(first)
    assert alone.low < alone.mean < alone.high


def test_a_regression_says_nothing_of_a_prompt_by_its_own_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_models, "KEPT", tmp_path)
    rng = np.random.default_rng(0)
    prompts = tuple(f"a {c} {t} {i}" for c in ("red", "blue") for t in ("fish", "boat")
                    for i in range(25))  # fmt: skip
    values = rng.normal(size=(100, 4, 2))
    values[:50, 3] -= 3  # the light model loses what is red
    scores = Scores(prompts, real_models.VARIANTS, (0, 1), values)
    told, _ = real_models.regressed(scores, None, "words", real_models.words_alike)
    assert told[:50].min() > told[50:].max() - 1
    moved = values.copy()
    moved[7, 3] -= 100
    again, _ = real_models.regressed(
        replace(scores, values=moved), None, "words", real_models.words_alike
    )
    assert again[7] == pytest.approx(told[7])
    assert np.abs(again - told).max() > 0.1
