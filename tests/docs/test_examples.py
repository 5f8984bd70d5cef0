"""The examples of docs/extending.md run, and do what that page says of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from argus.engine.samplers import SAMPLERS, new_scheduler
from argus.families.catalog import find_family
from argus.quality.scorers import load_scorer
from tests.engine.test_schedules import TRAINED, diffusers_way, our_way

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, whose modules can be imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return EXAMPLES


def imported(name: str) -> ModuleType:
    return __import__(name)


def test_a_policy_of_one_s_own_is_simulated_beside_others(examples: Path) -> None:
    reports = imported("new_policy").compare(minutes=2)
    whole = {name: report.whole for name, report in reports.items()}
    assert whole["two-level"].violation_ratio < whole["clipper-ha"].violation_ratio
    assert whole["two-level"].effective_quality < whole["price"].effective_quality
    assert set(whole["two-level"].outcomes) == set(whole["price"].outcomes)


def test_a_sampler_more_makes_diffusers_steps(
    examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = imported("new_sampler")
    monkeypatch.setitem(SAMPLERS, example.NAME, example.SAMPLER)
    scheduler = new_scheduler(example.NAME, DDIMScheduler(**TRAINED))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = diffusers_way(type(scheduler).from_config(scheduler.config), x, 6, 0)
    torch.testing.assert_close(our_way(scheduler, x, 6, 0), expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(our_way(new_scheduler("dpm++2m", scheduler), x, 6, 0), expected)


def test_a_family_file_names_models_beside_it_and_a_scorer(examples: Path) -> None:
    family = find_family(str(examples / "family.yaml"))
    assert list(family.variants) == ["exact", "skip-4", "skip-8", "steps-6", "small"]
    pictures = imported("new_family").pictures(family, "a large red fish in the sea")
    assert list(pictures) == ["exact", "steps-6", "small"]
    assert family.scorer is not None
    scorer = load_scorer(family.scorer)
    images = [pictures["exact"]] * 2
    red, yellow = scorer.score(["a large red fish", "a large yellow fish"], images)
    assert red > 0.05 > yellow


def test_a_scorer_of_one_s_own_judges_by_the_prompt(examples: Path) -> None:
    scorer = imported("new_scorer").NamedColour.load(None, "cpu")
    red = Image.new("RGB", (8, 8), "red")
    scores = scorer.score(["a red fish", "a blue fish", "a fish"], [red, red, red])
    assert scores.dtype == np.float32 and scores.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new_policy", "new_sampler", "new_family", "new_scorer"])
def test_an_example_runs_as_its_first_lines_say(name: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
