"""What the benchmarks compute is tested where a wrong number would look like a right one."""

from __future__ import annotations

import json

import gpu
import numpy as np
import pandas as pd
import pytest
from headroom import by_prompt

from argus.lab.mixes import believed, best_mix, judged, judged_knowing

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
    everyone = np.zeros(len(names), np.int64)
    assert judged(q, COSTS, 0.5, everyone) == pytest.approx(1.0, abs=0.04)
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


def test_the_gpu_benchmark_runs_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(
        device="cpu", dtype="float32", steps=4, requests=8, latency_s=0.5,
        compiled=False, tiny=True, as_json=True,
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["seconds_an_image"]) == {"diffusers", "argus"}
    assert {"of_limit", "vs_grouped", "p95_latency_ratio", "overhead"} <= set(result)
