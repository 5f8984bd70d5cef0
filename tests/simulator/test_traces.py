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
