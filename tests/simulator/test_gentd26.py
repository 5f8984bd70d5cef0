from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from argus.cli.main import app
from argus.core.errors import BadRequest
from argus.simulator.gentd26 import DAY_S, RequestLog, prompts_of, read_log
from argus.simulator.runs import Scenario
from argus.simulator.traces import load_trace
from argus.simulator.worlds import load_world

# Ann asks, asks again, and words it anew; an hour later she begins another run. Bob starts from a
# picture once. Cid's request never ran. Dan asks Ann's first words by chance.
ROWS = [
    (100, "text", "ann", 40, 1, "m0"),
    (130, "text", "bob", 40, 8, "m0"),
    (160, "text", "ann", 40, 4, "m0"),
    (170, "image", "bob", 40, 8, "m0"),
    (220, "text", "ann", 45, 2, "m0"),
    (230, "text", "ann", 45, 1, "m1"),
    (300, "text", "cid", None, None, None),
    (4000, "text", "ann", 45, 1, "m1"),
    (4100, "text", "dan", 40, 1, "m0"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    names = ["at_s", "type", "user", "prompt_chars", "n", "model"]
    pd.DataFrame(ROWS, columns=names).to_csv(tmp_path / "log.csv", index=False)
    return tmp_path / "log.csv"


def test_runs_and_rerolls_of_users_are_found(file: Path) -> None:
    log = read_log(file)
    assert log.at_s.tolist() == [0, 30, 60, 120, 130, 3900, 4000]
    assert log.pictures.tolist() == [1, 8, 4, 2, 1, 1, 1]
    assert log.user.tolist() == [0, 1, 0, 0, 0, 0, 2]
    assert log.run.tolist() == [0, 1, 0, 0, 0, 2, 3]
    assert log.again.tolist() == [False, False, True, False, False, False, False]


def test_who_asks_again_gets_the_prompt_of_before(file: Path) -> None:
    log = read_log(file)
    assert prompts_of(log, np.arange(10, 17)).tolist() == [10, 11, 10, 13, 14, 15, 16]


def test_a_log_is_replayed_faster_with_its_bursts(file: Path) -> None:
    log = read_log(file)
    fast = log.at_mean(54.0)  # 18 pictures in 20 seconds instead of 4,000
    assert fast.mean_qpm == pytest.approx(54)
    np.testing.assert_allclose(fast.at_s, log.at_s / 200)
    assert fast.pictures.tolist() == log.pictures.tolist()


def test_copies_have_users_and_runs_of_their_own_and_keep_gaps() -> None:
    at_s = np.array([0.0, 50.0, 3 * DAY_S - 10_000])
    log = RequestLog(
        at_s, np.array([1, 2, 4]), np.array([0, 0, 1]), np.array([0, 0, 1]),
        np.array([False, True, False]), float(at_s[-1]),
    )  # fmt: skip
    both = log.overlaid(2)
    assert (np.diff(both.at_s) >= 0).all() and both.at_s.max() < 3 * DAY_S
    assert both.pictures.sum() == 14 and both.again.sum() == 2
    assert len(set(both.user)) == 4 and both.run.tolist() == sorted(both.run, key=str)[:6]
    gaps = [np.diff(both.at_s[both.run == run]) for run in range(4)]
    assert sorted(len(gap) for gap in gaps) == [0, 0, 1, 1]
    np.testing.assert_allclose([gap[0] for gap in gaps if len(gap)], 50.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": None}, "no requests of type text"),
        ({"n": 0}, "n 0 in a text request of user ann: .* 1 or more"),
        ({"at_s": "noon"}, "at_s nan in a text request of user ann"),
        ({"type": "image"}, "no requests of type text"),
        ({"at_s": 7}, "at once"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_the_value(
    change: dict[str, object], message: str, file: Path
) -> None:
    pd.read_csv(file).assign(**change).to_csv(file, index=False)
    with pytest.raises(BadRequest, match=message):
        load_trace(f"gentd26:{file}")


def test_a_file_of_another_kind_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("at_s,user\n1,ann\n")
    with pytest.raises(BadRequest, match="no column type, prompt_chars, n, model"):
        load_trace(f"gentd26:{tmp_path / 'other.csv'}")
    with pytest.raises(BadRequest, match="no file"):
        load_trace(f"gentd26:{tmp_path / 'nowhere.csv'}")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(BadRequest, match="no CSV file"):
        load_trace(f"gentd26:{tmp_path / 'empty.csv'}")


def test_pictures_of_a_request_come_at_once_and_a_run_shares_its_topic(file: Path) -> None:
    world = load_world("pictogram")
    trace = load_trace(f"gentd26:{file}")
    scenario = Scenario(world, (0, 0), trace.rates, 3.0, load=0.5, log=trace.log)
    requests = scenario.requests()
    assert len(requests.arrived_s) == 18
    assert len(set(requests.arrived_s[1:9])) == len(set(requests.prompt[1:9])) == 1
    first, again, other = 0, 9, 13  # Ann's first request, her second, her third
    assert requests.prompt[again] == requests.prompt[first]
    assert requests.topic[first] == requests.topic[again] == requests.topic[other]
    span_min = requests.arrived_s[-1] / 60
    assert 18 / span_min == pytest.approx(0.5 * scenario.exact_qpm)


def test_the_command_replays_a_log_and_says_how_fast(file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["simulate", "--world", "pictogram", "--workers", "1", "--trace", f"gentd26:{file}",
         "--load", "0.3", "--overlay", "3", "--minutes", "600", "--policies", "clipper-ht",
         "--out", str(tmp_path / "out"), "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "times as fast" in done.output and "exact" in done.output
    result = json.loads(done.stdout.splitlines()[-1])["clipper-ht"]
    assert sum(result["outcomes"].values()) % 18 == 0
    wrong = CliRunner().invoke(app, ["simulate", "--overlay", "2"])
    assert wrong.exit_code != 0 and "gentd26:FILE" in str(wrong.exception or wrong.output)
