"""argus plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from argus.cli.main import app
from argus.core.errors import BadRequest

SMALL = ["--minutes", "5", "--seeds", "2", "--processes", "1", "--trace", "poisson"]


def plan(*options: str) -> str:
    done = CliRunner().invoke(app, ["plan", *SMALL, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_it_says_how_many_workers_a_load_needs_and_what_they_cost(tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    output = plan(
        "--peak-qpm", "80", "--policies", "price", "--gpu-price", "a100=2.5", "--plot", str(file),
        "--json",
    )  # fmt: skip
    told = json.loads(output.splitlines()[-1])
    price, exact = told["answers"]
    assert price["workers"]["value"] < exact["workers"]["value"]
    assert price["cost_per_hour"] == 2.5 * price["workers"]["value"]
    assert price["judged"]["effective_quality"]["value"] >= 0.95
    assert price["judged"]["violations"]["value"] <= 0.01
    assert told["sentence"] in output
    assert f"needs {exact['workers']['value']:.0f} GPUs [" in told["sentence"]
    for line in told["assumptions"]:
        assert line in output
    assert "seeds 100 to 101" in output
    assert file.stat().st_size > 10_000


def test_it_says_what_load_workers_carry(tmp_path: Path) -> None:
    output = plan("--workers", "2", "--policies", "clipper-ht", "--min-quality", "0.85", "--json")
    told = json.loads(output.splitlines()[-1])
    light, exact = (one["peak_qpm"]["value"] for one in told["answers"])
    assert light > 1.5 * exact > 0
    assert "2 GPUs carry" in told["sentence"]
    assert all(one["judged"]["workers"] == 2 for one in told["answers"])


def test_ones_own_trace_has_its_own_height(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("per_minute\n" + "20\n" * 3 + "60\n" * 3 + "20\n" * 2)
    output = plan("--trace", str(file), "--policies", "clipper-ha", "--minutes", "4")
    assert "60 requests in its highest minute" in output
    assert "its busiest 4 minutes in a row, after 5 minutes" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --peak-qpm, the requests in the highest minute, or --workers"),
        (["--peak-qpm", "-5"], "--peak-qpm is -5; it must be a number above 0"),
        (["--peak-qpm", "nan"], "it must be a number above 0"),
        (["--peak-qpm", "40", "--workers", "3"], "each is the answer to the other"),
        (["--peak-qpm", "1e7"], "more than the 1000 that are simulated"),
        (["--peak-qpm", "40", "--min-quality", "1.2"], "gives a mean of 1.000"),
        (["--peak-qpm", "40", "--max-violations", "1"], "it is a share, such as 0.01"),
        (["--peak-qpm", "40", "--slo", "0.1x"], "give a longer --slo"),
        (["--peak-qpm", "40", "--trace", "nowhere"], "There is no trace 'nowhere'"),
        (["--peak-qpm", "40", "--policies", "best"], "There is no policy 'best'"),
        (["--peak-qpm", "40", "--gpu-price", "h100=3"], "there are workers of a100"),
        (["--peak-qpm", "40", "--plot", "nowhere/plan.png"], "There is no folder"),
        (["--workers", "0"], "at least one worker"),
        (["--peak-qpm", "1", "--minutes", "3"], "it takes 100 to judge"),
    ],
)
def test_what_cannot_be_planned_is_said(options: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        CliRunner().invoke(app, ["plan", *SMALL, *options], catch_exceptions=False)


def test_a_trace_without_requests_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("per_minute\n0\n0\n")
    with pytest.raises(BadRequest, match="The trace has no requests"):
        plan("--trace", str(file))
