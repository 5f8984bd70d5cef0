from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from argus.cli.main import app
from argus.core.errors import BadRequest
from argus.simulator.traces import TRACES, arrivals, load_trace, rates_of, topics
from argus.simulator.world import Drawing
from argus.simulator.worlds import FOLDER, load_world, world_names


@pytest.mark.parametrize("name", [name for name in world_names() if name != "sd35"])
def test_every_parameter_of_a_world_says_where_it_is_from(name: str) -> None:
    try:
        world = load_world(name)
    except BadRequest as error:
        pytest.skip(str(error))  # public data that is not part of the project
    assert len(world.sources) > 5
    assert (world.truth[:, 0] == 1).all()
    assert world.table.variants[0] == "exact"


def test_a_parameter_without_its_mark_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load((FOLDER / "paper-a100.yaml").read_text())
    content["slo"]["is"] = "guessed"
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(BadRequest, match="slo must say whether it `is` one of sourced"):
        load_world(str(file))


def test_an_unknown_world_is_refused_with_what_there_is() -> None:
    with pytest.raises(BadRequest, match="paper-a100"):
        load_world("nowhere")


def test_the_published_world_has_the_published_means() -> None:
    world = load_world("paper-a100")
    means = dict(zip(world.table.variants, world.truth.mean(axis=0), strict=True))
    assert means["skip-25"] == pytest.approx(0.9152, abs=1e-6)
    assert means["skip-5"] == pytest.approx(0.97046, abs=1e-6)
    alone = 60 / world.table.alone_s[:, 0]
    np.testing.assert_allclose(alone[:6], [14.29, 15.87, 17.86, 20.41, 23.81, 28.57], rtol=2e-3)


@pytest.mark.parametrize("name", TRACES)
def test_traces_arrive_at_their_rates(name: str) -> None:
    rates = rates_of(name)
    times = arrivals(rates, np.random.default_rng(0))
    assert (np.diff(times) >= 0).all()
    assert len(times) == pytest.approx(rates.sum(), rel=0.02)
    assert times[-1] <= 60 * len(rates)


def test_a_trace_of_ones_own(tmp_path: Path) -> None:
    pd.DataFrame({"per_minute": [10, 20]}).to_csv(tmp_path / "rates.csv", index=False)
    assert rates_of(str(tmp_path / "rates.csv")).tolist() == [10, 20]
    pd.DataFrame({"at_s": [1.0, 2.0, 61.0]}).to_csv(tmp_path / "times.csv", index=False)
    assert rates_of(str(tmp_path / "times.csv")).tolist() == [2, 1]
    pd.DataFrame({"second": [0, 1], "requests": [100, 200]}).to_csv(
        tmp_path / "curve.csv", index=False
    )
    curve = rates_of(str(tmp_path / "curve.csv"))
    assert (curve[0], curve[-1], len(curve)) == (80, 210, 800)
    pd.DataFrame({"x": [1]}).to_csv(tmp_path / "else.csv", index=False)
    with pytest.raises(BadRequest, match="at_s"):
        rates_of(str(tmp_path / "else.csv"))
    with pytest.raises(BadRequest, match="bursty"):
        rates_of("sometimes")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"at_s": [-3.0, 5.0]}, "at_s .*-3.*0 or more"),
        ({"at_s": ["noon"]}, "at_s .*noon"),
        ({"at_s": [1.0, None]}, "at_s .*nan"),
        ({"per_minute": [10.0, -1.0]}, "per_minute .*-1.*0 or more"),
        ({"per_minute": []}, "no rows"),
        ({"requests": [1.0, float("inf")]}, "requests .*inf"),
    ],
)
def test_a_trace_that_cannot_be_is_refused_with_the_value(
    columns: dict[str, list[object]], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "trace.csv"
    pd.DataFrame(columns).to_csv(file, index=False)
    with pytest.raises(BadRequest, match=message):
        load_trace(str(file))


def simulated(trace: dict[str, list[float]], folder: Path, *options: str) -> pd.DataFrame:
    """The requests of a run of one's own trace."""
    pd.DataFrame(trace).to_csv(folder / "mine.csv", index=False)
    done = CliRunner().invoke(
        app,
        ["simulate", "--world", "pictogram", "--workers", "2",
         "--trace", str(folder / "mine.csv"), "--policies", "clipper-ht",
         "--out", str(folder / "out"), *options],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return pd.read_parquet(folder / "out" / "requests.parquet")


def test_ones_own_arrivals_come_when_they_came(tmp_path: Path) -> None:
    at_s = [100.25, 3.0, 3.0, 61.5, 130.0]
    assert simulated({"at_s": at_s}, tmp_path)["arrived_s"].tolist() == sorted(at_s)
    first = simulated({"at_s": at_s}, tmp_path, "--minutes", "2")["arrived_s"]
    assert first.tolist() == [3.0, 3.0, 61.5, 100.25]


def to_capacity(requests: int) -> float:
    """So many requests for the published cluster's 189 exact pictures a minute, as many more as two
    of these workers make more of them."""
    return requests * 60 * load_world("pictogram").capacity_rps([0, 0]) / 189


def test_ones_own_rates_are_used_as_they_are(tmp_path: Path) -> None:
    rates = {"per_minute": [100.0] * 5}
    assert len(simulated(rates, tmp_path)) == pytest.approx(500, rel=0.15)
    assert len(simulated(rates, tmp_path, "--load", "2")) == pytest.approx(1000, rel=0.15)
    scaled = simulated(rates, tmp_path, "--scale-to-capacity")
    assert len(scaled) == pytest.approx(to_capacity(500), rel=0.05)


def test_ones_own_arrivals_are_drawn_at_their_rates_for_another_load(tmp_path: Path) -> None:
    at_s = np.linspace(0, 299, 500).tolist()
    twice = simulated({"at_s": at_s}, tmp_path, "--load", "2")
    assert len(twice) == pytest.approx(1000, rel=0.15)
    scaled = simulated({"at_s": at_s}, tmp_path, "--scale-to-capacity")
    assert len(scaled) == pytest.approx(to_capacity(500), rel=0.05)


def test_a_curve_is_scaled_whatever_its_numbers(tmp_path: Path) -> None:
    curves = [
        simulated({"requests": [height, 2 * height]}, tmp_path, "--minutes", "5")
        for height in (1.0, 1000.0)
    ]
    assert len(curves[0]) == len(curves[1]) > 0


def test_topics_repeat_recent_ones() -> None:
    drawing = Drawing(novel=0.1, alive=100, capacity=50)
    drawn = topics(20_000, drawing, np.random.default_rng(0))
    newest = np.maximum.accumulate(drawn)
    assert len(np.unique(drawn[drawn >= 0])) == pytest.approx(2000, rel=0.1)
    assert (newest[1000:] - drawn[1000:]).max() < 100


def test_the_command_compares_policies(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["simulate", "--trace", "step", "--policies", "price,clipper-ha", "--minutes", "40",
         "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["price"]["high_load"]["violation_ratio"] < 0.1
    assert result["clipper-ha"]["high_load"]["violation_ratio"] > 0.3
    assert result["clipper-ha"]["quality"] == 1.0
    keys = {"throughput_qpm", "violation_ratio", "quality", "effective_quality", "p99_s"}
    assert keys <= set(result["price"]) and keys <= set(result["price"]["high_load"])
    table = pd.read_parquet(tmp_path / "out" / "requests.parquet")
    assert set(table["policy"]) == {"price", "clipper-ha"}
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000


def test_the_command_simulates_a_load_so_small_that_nobody_comes(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["simulate", "--policies", "price", "--load", "0.00001", "--minutes", "2",
         "--out", str(tmp_path / "out"), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["price"]["outcomes"].values()) == {0}
    assert len(pd.read_parquet(tmp_path / "out" / "requests.parquet")) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "best"], "There is no policy"),
        (["--workers", "many"], "--workers takes numbers"),
        (["--workers", "4,4"], "give as many numbers"),
        (["--slo", "fast"], "--slo takes 3x or 12s"),
        (["--load", "0"], "more than 0"),
    ],
)
def test_what_cannot_be_simulated_is_said(options: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        CliRunner().invoke(app, ["simulate", *options], catch_exceptions=False)
