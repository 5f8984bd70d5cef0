"""The load client: what it reads, when it sends, and what it says of the answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import argus as package
from argus.cli.main import app
from argus.config import Settings, SloClass
from argus.core.errors import ArgusError, BadRequest
from argus.lab.prompts import prompt_lines
from argus.loadgen.sender import Answered, Target, _times, figures, send, warm_up
from argus.loadgen.traces import TraceRequest, read_gentd26, read_trace
from tests.server.running import Running, running


@pytest.fixture(scope="module")
def argus(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        family=str(measured_family), data=tmp_path_factory.mktemp("load"), workers=1,
        slo={"default": SloClass(latency="60s")}, cost_per_hour=3.6, queue_limit=8,
        truth_share=0.0,
    )  # fmt: skip
    with running(settings) as server:
        yield server


def test_traces_of_vllm_omni_and_sglang_are_read(tmp_path: Path) -> None:
    file = tmp_path / "trace.txt"
    file.write_text(
        "Request(request_id='a', timestamp=5.0, prompt='a big city', width=1536, height=1024, "
        "num_inference_steps=20, slo_ms=3000)\n\n"
        '{"request_id": "b", "prompt": "a cup", "timestamp": 4, "seed": 7, "sampling_params": '
        '{"guidance_scale": 3.5, "seed": 8}, "num_outputs_per_prompt": 2}\n'
    )
    city, cup = read_trace(file)
    assert city.body == {"prompt": "a big city", "size": "1536x1024", "num_inference_steps": 20}
    assert (city.at_s, city.slo_ms) == (1.0, 3000)
    assert cup.body == {"prompt": "a cup", "seed": 7, "guidance_scale": 3.5, "n": 2}
    assert (cup.at_s, cup.slo_ms) == (0.0, None)
    (tmp_path / "prompts.txt").write_text("a fish\n\n a boat \n")
    assert prompt_lines(tmp_path / "prompts.txt") == [
        "a fish", "a boat",
    ]  # fmt: skip


def test_a_production_service_s_requests_get_prompts(tmp_path: Path) -> None:
    file = tmp_path / "requests.csv"
    columns = "at_s,type,status,user,prompt_chars,negative_chars,n,steps,model"
    rows = [
        "100,text,succeed,a,20,0,4,30,m1",
        "101,image,succeed,a,20,0,1,30,m1",
        "110,text,failed,b,20,0,1,30,m1",
        "130.5,text,succeed,b,20,0,,,m1",
        "160,text,succeed,a,20,0,2,30,m1",
        "170,text,succeed,a,21,0,1,30,m1",
    ]
    file.write_text("\n".join([columns, *rows]))
    found = read_gentd26(file, ["a fish", "a boat", "a star"])
    assert [one.at_s for one in found] == [0.0, 30.5, 60.0, 70.0]
    assert [one.body for one in found] == [
        {"prompt": "a fish", "n": 4, "num_inference_steps": 30},
        {"prompt": "a boat", "n": 1},
        {"prompt": "a fish", "n": 2, "num_inference_steps": 30},
        {"prompt": "a star", "n": 1, "num_inference_steps": 30},
    ]
    with pytest.raises(BadRequest, match="has more requests than there are prompts"):
        read_gentd26(file, ["a fish", "a boat"])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadRequest, match="no table of GenTD26's requests"):
        read_gentd26(tmp_path / "other.csv", [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no requests"),
        ("a fish", r"Line 1 of .* is neither Request\(…\) nor a JSON object"),
        ("Request(prompt='a fish')\nRequest(oops", r"Line 2 of .* is no Request\(name=value"),
        ("Request(prompt=__import__('os'))", "is no Request"),
        ("[1]", "is not a JSON object"),
        ('{"width": 64}', "has no prompt"),
        ('{"prompt": "a", "timestamp": "noon"}', "timestamp is 'noon', not a number"),
        ('{"prompt": "a", "timestamp": 1}\n{"prompt": "b"}', "timestamp for some"),
    ],
)
def test_a_wrong_trace_says_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "trace.txt"
    file.write_text(content)
    with pytest.raises(BadRequest, match=message):
        read_trace(file)
    with pytest.raises(BadRequest, match="cannot be read"):
        read_trace(tmp_path / "none")


def test_a_trace_is_sent_at_its_times(argus: Running) -> None:
    requests = [TraceRequest({"prompt": f"fish {i}"}, at_s=i * 1.0) for i in range(4)]
    answers, duration_s = asyncio.run(send(Target(argus.url), requests, speed=2.0))
    assert [answer.status for answer in answers] == [200] * 4
    assert duration_s >= 1.5
    assert answers[-1].latency_s <= duration_s - 1.4  # it was sent after 1.5 s


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    requests = [TraceRequest({})] * 4000
    times = list(itertools.islice(_times(requests, 20.0, 1.0, seed=3), len(requests)))
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)
    assert times == list(itertools.islice(_times(requests, 20.0, 1.0, seed=3), len(requests)))
    assert set(itertools.islice(_times(requests, None, 1.0, seed=3), 9)) == {0.0}


def test_no_more_requests_than_allowed_are_sent_at_a_time(argus: Running) -> None:
    requests = [TraceRequest({"prompt": f"bird {i}"}) for i in range(24)]
    answers, _ = asyncio.run(send(Target(argus.url), requests, concurrency=4))
    assert {answer.status for answer in answers} == {200}
    many, _ = asyncio.run(send(Target(argus.url), requests))
    assert 429 in {answer.status for answer in many}  # the queue has room for eight


def test_figures_are_those_that_others_print() -> None:
    answers = [Answered(200, latency, slo_ms=300) for latency in (0.1, 0.2, 0.3, 0.4)]
    answers += [Answered(429, 0.01, slo_ms=300, error="full"), Answered(0, 1.0, error="gone")]
    found = figures(answers, 2.0)
    latencies = [0.1, 0.2, 0.3, 0.4]
    assert found == {
        "duration": 2.0, "completed_requests": 4, "failed_requests": 2, "throughput_qps": 2.0,
        "latency_mean": pytest.approx(0.25), "latency_median": pytest.approx(0.25),
        "latency_p50": pytest.approx(0.25),
        "latency_p95": pytest.approx(np.percentile(latencies, 95)),
        "latency_p99": pytest.approx(np.percentile(latencies, 99)),
        "slo_attainment_rate": 3 / 5, "slo_met_success": 3, "failures": {"429": 1, "gone": 1},
    }  # fmt: skip
    assert figures([], 1.0)["throughput_qps"] == 0


def test_a_server_that_makes_no_pictures_is_told_before(argus: Running) -> None:
    with pytest.raises(ArgusError, match=r"No server answers at .*:9 .*--url"):
        asyncio.run(warm_up(Target("http://127.0.0.1:9"), TraceRequest({"prompt": "a"})))
    with pytest.raises(ArgusError, match="size is 'huge'"):
        body = {"prompt": "a", "size": "huge"}
        asyncio.run(warm_up(Target(argus.url), TraceRequest(body)))


def test_the_command_prints_what_came_back(argus: Running, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fish\na boat\n")
    begun = time.perf_counter()
    ran = CliRunner().invoke(
        app,
        ["load", "--url", f"{argus.url}/v1", "--prompts", str(prompts), "--num-prompts", "6",
         "--max-concurrency", "2", "--slo", "30", "--model", "default", "--steps", "50",
         "--output-file", str(tmp_path / "figures.json")],
        env={"COLUMNS": "140"},
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["completed_requests"], found["failed_requests"]) == (6, 0)
    assert found["slo_attainment_rate"] == 1
    assert 0 < found["duration"] < time.perf_counter() - begun
    assert sum(found["variants"].values()) == 6
    assert found["cost"] == pytest.approx(found["gpu_seconds"] / 1000, abs=1e-6)
    assert "Successful requests" in ran.output
    assert f"{found['latency_mean']:.4f}" in ran.output
    for wrong in (["--trace", "a", "--prompts", "b"], ["--request-rate", "0"]):
        assert isinstance(CliRunner().invoke(app, ["load", *wrong]).exception, BadRequest)
    assert not math.isnan(found["latency_p99"])
    assert callable(package.load)  # which a module of that name would hide
