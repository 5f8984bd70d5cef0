from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from argus.core.errors import BadRequest
from argus.simulator.runs import Scenario
from argus.simulator.traces import PAPER_CAPACITY, load_trace
from argus.simulator.worlds import load_world

GENTD26 = """at_s,type,status,exec_s,user,prompt_chars,negative_chars,n,steps,model,loras
0,text,succeed,32,G0,63,26,1,30,M0,0
100,text,succeed,43,G1,93,,4,40,M1,0
110,text,succeed,43,G1,93,,2,40,M1,0
120,image,succeed,43,G1,93,,2,40,M1,0
130,text,failed,43,G1,93,,2,40,M1,0
140,text,succeed,43,G0,93,,1,40,M1,0
200,text,succeed,43,G1,94,,1,40,M1,0
"""


def test_a_production_service_is_replayed_picture_by_picture_in_less_time(tmp_path: Path) -> None:
    file = tmp_path / "gentd26.csv"
    file.write_text(GENTD26)
    trace = load_trace(f"gentd26:{file}")
    assert trace.at_s is not None
    assert trace.topics is not None
    assert trace.compressed
    assert trace.topics.tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 3]  # G1's second is a re-roll
    gaps = np.diff(np.unique(trace.at_s))
    assert gaps / gaps[0] == pytest.approx([1, 0.1, 0.3, 0.6])  # as in the file
    assert 60 * len(trace.at_s) / trace.at_s[-1] == pytest.approx(PAPER_CAPACITY / 2)
    with pytest.raises(BadRequest, match="no table of GenTD26"):
        load_trace(f"gentd26:{tmp_path / 'nowhere.csv'}")


def test_twice_the_load_gets_the_same_arrivals_in_half_of_the_time(tmp_path: Path) -> None:
    file = tmp_path / "gentd26.csv"
    file.write_text(GENTD26)
    trace, world = load_trace(f"gentd26:{file}"), load_world("paper-a100")
    once = Scenario(
        world, (0,), trace.rates, 6.0, at_s=trace.at_s, topics=trace.topics, compressed=True
    )
    twice = replace(once, load=2.0)
    assert twice.requests().arrived_s == pytest.approx(once.requests().arrived_s / 2)
    found = once.requests()
    assert found.topic.tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 3]
    assert len(set(found.prompt[1:7].tolist())) == 1
    assert once.scaled.sum() == 9


def test_times_that_count_from_1970_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "arrivals.csv"
    file.write_text("at_s\n1750000000\n1750000010\n")
    with pytest.raises(BadRequest, match="seconds from there, not from 1970"):
        load_trace(str(file))


def test_a_trace_gets_a_height() -> None:
    trace = load_trace("bursty").at_peak(400)
    assert trace.own
    assert (trace.rates.max(), trace.rates[0]) == (
        pytest.approx(400),
        pytest.approx(400 * 50 / 390),
    )


def test_ones_own_arrivals_stay_at_their_own_height_and_are_drawn_at_another(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("at_s\n1\n2\n3\n61\n")
    trace = load_trace(str(file))
    same, twice = trace.at_peak(3), trace.at_peak(6)
    assert same.at_s is not None and same.at_s.tolist() == [1, 2, 3, 61]
    assert (twice.at_s, twice.rates.tolist()) == (None, [6, 2])


def test_a_production_service_meets_a_height_by_coming_in_less_time(tmp_path: Path) -> None:
    file = tmp_path / "gentd26.csv"
    rows = [f"{37 * i % 10_000},text,succeed,32,G{i},63,26,1,30,M0,0" for i in range(400)]
    file.write_text(GENTD26.splitlines()[0] + "\n" + "\n".join(rows))
    for qpm in (5, 40):
        trace = load_trace(f"gentd26:{file}").at_peak(qpm)
        assert trace.at_s is not None and trace.topics is not None
        assert trace.rates.max() == pytest.approx(qpm, rel=0.2)
        assert trace.rates.sum() == len(trace.at_s) == len(trace.topics) == 400


def test_the_busiest_minutes_are_cut_out_with_what_comes_before(tmp_path: Path) -> None:
    cut, lead = load_trace("bursty").at_peak(390).busiest(20, lead=5)
    assert lead == 5
    assert cut.rates.round(6).tolist() == [50] * 5 + [390] * 20
    cut, lead = load_trace("poisson").at_peak(60).busiest(500, lead=5)
    assert (lead, len(cut.rates)) == (5, 125)
    file = tmp_path / "mine.csv"
    file.write_text("at_s\n1\n70\n130\n140\n150\n190\n")
    cut, lead = load_trace(str(file)).at_peak(3).busiest(1, lead=5)
    assert cut.at_s is not None
    assert (lead, cut.rates.tolist(), cut.at_s.tolist()) == (2, [1, 1, 3], [1, 70, 130, 140, 150])
