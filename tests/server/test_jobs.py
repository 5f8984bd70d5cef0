"""Requests in the background: accepted, run when workers have time, and never lost."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from argus.config import Settings, SloClass
from argus.server import health, job_runner, stored_jobs
from argus.server.job_runner import JobRunner
from argus.server.jobs import _fingerprint
from argus.server.keys import add_key
from argus.server.schema import ArgusOptions, GenerationRequest, GenerationResponse
from tests.postgres import Postgres
from tests.server.running import Running, running, served, wait_until

JSON = "application/json"
GENERATIONS, JOBS = "/v1/images/generations", "/v1/argus/jobs"
LONG: dict[str, Any] = {"num_inference_steps": 900, "argus": {"exact": True, "background": True}}


@pytest.fixture(scope="module")
def server(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        family=str(measured_family), data=tmp_path_factory.mktemp("jobs"), workers=1,
        slo={"default": SloClass(latency="60s")}, truth_share=0.0,
    )  # fmt: skip
    with running(settings) as server:
        yield server


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "POLL_S", 0.05)
    monkeypatch.setattr(job_runner, "SWEEP_EVERY_S", 0.05)
    monkeypatch.setattr(job_runner, "YIELD_S", 0.05)


def sent(
    http: httpx.Client, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    fields = {"prompt": "a fish", **fields}
    fields["argus"] = {"background": True, **fields.get("argus", {})}
    return http.post(GENERATIONS, json=fields, headers=headers)


def accepted(http: httpx.Client, **fields: Any) -> str:
    """The id of a new job."""
    answer = sent(http, **fields)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"{JOBS}/{job['id']}"
    return str(job["id"])


def read(http: httpx.Client, job: str) -> dict[str, Any]:
    answer = http.get(f"{JOBS}/{job}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    """A job that has ended."""
    wait_until(lambda: read(http, job)["status"] not in ("queued", "in_progress"))
    return read(http, job)


def is_running(http: httpx.Client, job: str) -> bool:
    return bool(read(http, job)["status"] == "in_progress")


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# --- a job and its result


def test_a_job_s_result_is_the_answer_to_its_request(server: Running) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 7, "size": "32x32", "dpi": 300}
    waited = server.generate("a whale", **fields, argus={"exact": True}).json()
    job = ended(
        server.http, accepted(server.http, prompt="a whale", **fields, argus={"exact": True})
    )
    assert job["status"] == "completed"
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] < job["expires_at"]
    result = job["result"]
    assert result["data"] == waited["data"]
    assert result.keys() == waited.keys()
    assert result["id"] == job["id"]
    assert result["ignored_fields"] == ["dpi"]
    assert [one["seed"] for one in result["argus"]] == [7, 8]
    assert "deadline_ms" not in result["argus"][0]
    assert result["argus"][0]["on_time"]
    GenerationResponse.model_validate(result)


def test_the_urls_of_a_job_work_from_when_it_is_read(server: Running) -> None:
    job = accepted(server.http, prompt="a carp", response_format="url", output_format="webp")
    (picture,) = ended(server.http, job)["result"]["data"]
    assert picture["url"].startswith(server.url)
    assert httpx.get(picture["url"]).headers["content-type"] == "image/webp"
    assert read(server.http, job)["result"]["data"] == [picture]  # no further file
    pictures = server.service.settings.data / "pictures"
    (pictures / picture["url"].rpartition("/")[2]).unlink()
    server.service.jobs._names.clear()  # as long after, or on another server
    (again,) = read(server.http, job)["result"]["data"]
    assert httpx.get(again["url"]).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"response_format": "file"}, "response_format"),
        ({"size": "7x7"}, "size"),
        ({"argus": {"slo": "unknown"}}, "argus.slo"),
        ({"argus": {"webhook": "https://example.com"}}, "argus.webhook"),
        ({"argus": {"webhook": "https://example.com", "background": False}}, "argus.webhook"),
    ],
)
def test_what_cannot_be_a_job_is_refused_at_once(
    server: Running, fields: dict[str, Any], param: str
) -> None:
    answer = sent(server.http, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_text_that_cannot_be_read_again_is_refused(server: Running) -> None:
    body = json.dumps({"prompt": "a fish", "user": "\ud800", "argus": {"background": True}})
    answer = server.http.post(GENERATIONS, content=body, headers={"content-type": JSON})
    assert error(answer) == (400, "invalid_value")
    assert "not Unicode" in answer.json()["error"]["message"]


def test_unknown_jobs_are_not_found(server: Running) -> None:
    for job in (f"job_{'0' * 32}", "job_1", "%00"):
        assert error(server.http.get(f"{JOBS}/{job}")) == (404, "not_found")
        assert error(server.http.post(f"{JOBS}/{job}/cancel")) == (404, "not_found")
        assert error(server.http.get(f"{JOBS}?after={job}")) == (404, "not_found")


def test_a_job_that_can_no_longer_be_made_fails_with_the_reason(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(family=str(tiny_family), data=tmp_path, workers=1, slo={"slow": SloClass()})
    with monkeypatch.context() as patch, running(settings) as server:
        patch.setattr(JobRunner, "_may_begin", False)
        job = accepted(server.http, argus={"slo": "slow"})
    with running(settings.model_copy(update={"slo": {}})) as server:
        failed = ended(server.http, job)
        assert failed["status"] == "failed"
        assert failed["error"]["param"] == "argus.slo"
        assert "result" not in failed


# --- one job for an idempotency key


def test_a_request_that_is_sent_again_is_the_same_job(server: Running) -> None:
    first = sent(server.http, {"Idempotency-Key": '"8e03978e"'}, prompt="once")
    ended(server.http, first.json()["id"])
    again = sent(server.http, {"Idempotency-Key": "8e03978e"}, prompt="once")  # as many send it
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.json()["status"] == "completed"
    other = sent(server.http, {"Idempotency-Key": '"8e03978e"'}, prompt="twice")
    assert error(other) == (422, "idempotency_key_reused")
    wrong = sent(server.http, {"Idempotency-Key": "x" * 300})
    assert error(wrong) == (400, "invalid_value")


def test_a_request_that_is_sent_many_times_at_once_is_one_job(server: Running) -> None:
    with ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(sent, server.http, {"Idempotency-Key": "at-once"}) for _ in range(12)]
        answers = [task.result() for task in asking]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_body_is_the_same_in_a_version_that_knows_more_fields() -> None:
    class LaterOptions(ArgusOptions):
        colours: int = 3

    class Later(GenerationRequest):
        argus: LaterOptions | None = None
        paper: str = "white"

    sent = {"prompt": "a", "n": 2, "argus": {"background": True}}
    known, later = (_fingerprint(one.model_validate(sent)) for one in (GenerationRequest, Later))
    assert known == later
    assert known != _fingerprint(GenerationRequest.model_validate(sent | {"n": 3}))


# --- whose jobs


def test_a_key_sees_its_own_jobs(tiny_family: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    ann, bo = ({"Authorization": f"Bearer {add_key(keys, name)}"} for name in ("ann", "bo"))
    settings = Settings(
        family=str(tiny_family), data=tmp_path / "data", api_key_file=keys, workers=1
    )
    with running(settings, ann) as server:
        ids = [accepted(server.http, prompt=f"fish {n}") for n in range(3)]
        assert error(server.http.get(f"{JOBS}/{ids[0]}", headers=bo)) == (404, "not_found")
        cancelled = server.http.post(f"{JOBS}/{ids[0]}/cancel", headers=bo)
        assert error(cancelled) == (404, "not_found")
        assert server.http.get(JOBS, headers=bo).json()["data"] == []
        same = server.http.post(
            GENERATIONS, json={"prompt": "a", "argus": {"background": True}},
            headers=bo | {"Idempotency-Key": "k"},
        )  # fmt: skip
        assert sent(server.http, {"Idempotency-Key": "k"}).json()["id"] != same.json()["id"]
        page = server.http.get(JOBS, params={"limit": 2, "after": ids[2]}).json()
        assert [job["id"] for job in page["data"]] == [ids[1], ids[0]]
        assert not page["has_more"]
        assert server.http.get(JOBS, params={"limit": 2}).json()["has_more"]
        assert server.http.get(JOBS, headers={"Authorization": ""}).status_code == 401
        for job in ids:
            assert ended(server.http, job)["status"] == "completed"
        rows = server.http.get("/v1/argus/usage").json()["data"]
        assert sum(row["pictures"] for row in rows if row["key"] == "ann") >= 3
        result = server.http.get(JOBS).json()["data"][0]
        assert "result" not in result


# --- beside other requests


def test_other_requests_come_first(server: Running) -> None:
    yielded = server.metric("argus_jobs_yielded_total")
    shed = server.metric("argus_outcomes_total", slo="default", outcome="shed")
    job = accepted(server.http, **LONG)
    wait_until(lambda: server.service.fleet.running == 1)
    made = server.generate("an urgent fish").json()["argus"][0]
    assert made["queued_behind"] == 0
    assert read(server.http, job)["status"] in ("queued", "in_progress")
    assert server.metric("argus_jobs_yielded_total") == yielded + 1
    wait_until(lambda: is_running(server.http, job))  # again
    assert server.http.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
    wait_until(lambda: server.service.fleet.idle)
    assert server.metric("argus_outcomes_total", slo="default", outcome="shed") == shed


def test_a_job_that_made_room_often_is_made_at_last(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_runner, "MOST_YIELDS", 1)
    yielded = server.metric("argus_jobs_yielded_total")
    job = accepted(server.http, **LONG | {"num_inference_steps": 100})
    wait_until(lambda: server.service.fleet.running == 1)
    assert server.generate("a first fish").status_code == 200
    wait_until(lambda: server.service.jobs.runner._steady is not None)
    while read(server.http, job)["status"] != "completed":
        assert server.generate("the next fish").status_code == 200
    assert server.metric("argus_jobs_yielded_total") == yielded + 1


def test_jobs_are_no_outcomes_and_take_no_place_in_the_queue(
    measured_family: Path, tmp_path: Path
) -> None:
    settings = Settings(family=str(measured_family), data=tmp_path, workers=1, queue_limit=2)
    with running(settings) as server:
        many = [accepted(server.http, prompt=f"{n}", n=2) for n in range(4)]
        assert server.generate(n=2).status_code == 200
        for job in many:
            assert ended(server.http, job)["status"] == "completed"
        (outcomes,) = server.service.metrics.outcomes.collect()
        counted = [one.value for one in outcomes.samples if one.name == "argus_outcomes_total"]
        assert sum(counted) == 2
        wait_until(lambda: server.metric("argus_jobs_ended_total", status="completed") == 4)
        wait_until(lambda: server.metric("argus_jobs", status="queued") == 0)


def test_in_shadow_mode_jobs_are_made_exactly(measured_family: Path, tmp_path: Path) -> None:
    settings = Settings(family=str(measured_family), data=tmp_path, workers=1, shadow=True)
    with running(settings) as server:
        (report,) = ended(server.http, accepted(server.http))["result"]["argus"]
        assert (report["variant"], report["steps_run"]) == ("exact", 6)
        assert "shadow" in report["reason"]


def test_a_job_s_slo_class_sets_the_least_quality(measured_family: Path, tmp_path: Path) -> None:
    settings = Settings(
        family=str(measured_family), data=tmp_path, workers=1,
        slo={"default": SloClass(latency="60s"), "fine": SloClass(latency="1s", quality=1.0)},
    )  # fmt: skip
    with running(settings) as server:
        (report,) = ended(server.http, accepted(server.http, argus={"slo": "fine"}))["result"][
            "argus"
        ]
        assert (report["slo"], report["variant"]) == ("fine", "exact")


@pytest.mark.parametrize("step_s", [1000.0, -1000.0])
def test_a_job_is_not_begun_twice_when_the_clock_steps(
    server: Running, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    job = accepted(server.http, **LONG)
    wait_until(lambda: is_running(server.http, job))
    now, monotonic = time.time, time.monotonic
    stepped = SimpleNamespace(time=lambda: now() + step_s, monotonic=monotonic)
    monkeypatch.setattr(job_runner, "time", stepped)

    def row() -> tuple[float, int]:
        with sqlite3.connect(server.service.settings.data / "catalogue.db") as catalogue:
            query = "SELECT due_at, tries FROM jobs WHERE id = ?"
            return tuple(catalogue.execute(query, (job,)).fetchone())

    wait_until(lambda: abs(row()[0] - stepped.time()) < 100)  # renewed, or taken again
    assert row()[1] == 1
    server.http.post(f"{JOBS}/{job}/cancel")
    wait_until(lambda: server.service.fleet.idle)


# --- cancelled, expired, refused


def test_a_cancelled_job_is_not_made(server: Running) -> None:
    first, second = (accepted(server.http, prompt=f"{n}", **LONG) for n in range(2))
    wait_until(lambda: is_running(server.http, first))
    for job in (second, first, first):
        answer = server.http.post(f"{JOBS}/{job}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    wait_until(lambda: server.service.fleet.idle)
    done = accepted(server.http)
    assert ended(server.http, done)["status"] == "completed"
    assert server.http.post(f"{JOBS}/{done}/cancel").json()["status"] == "completed"
    assert read(server.http, first)["status"] == "cancelled"


def test_a_job_is_gone_when_its_time_is_over(tiny_family: Path, tmp_path: Path) -> None:
    settings = Settings(family=str(tiny_family), data=tmp_path, workers=1, jobs_ttl_s=0.5)
    with running(settings) as server:
        job = accepted(server.http)
        wait_until(lambda: server.http.get(f"{JOBS}/{job}").status_code == 404)
        with sqlite3.connect(tmp_path / "catalogue.db") as catalogue:
            wait_until(lambda: not catalogue.execute("SELECT id FROM jobs").fetchall())


def test_jobs_have_limits(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobRunner, "_may_begin", False)
    settings = Settings.model_validate(
        {"family": str(tiny_family), "data": tmp_path, "workers": 1, "jobs_limit": 2,
         "jobs_bytes": "400kB"}
    )  # fmt: skip
    with running(settings) as server:
        accepted(server.http)
        full = sent(server.http, n=2)
        assert error(full) == (507, "jobs_full")
        accepted(server.http)
        many = sent(server.http)
        assert error(many) == (429, "too_many_jobs")
        assert many.headers["retry-after"] == "60"


def test_what_cannot_be_stored_is_not_accepted(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.05)
    with running(Settings(family=str(tiny_family), data=tmp_path, workers=1)) as server:
        accepted(server.http)  # the table is there
        with sqlite3.connect(tmp_path / "catalogue.db") as catalogue:
            catalogue.execute("BEGIN IMMEDIATE")
            monkeypatch.setattr(stored_jobs, "LIMIT_S", 0.2)
            assert error(sent(server.http)) == (503, "storage_unavailable")
            assert "jobs" in server.http.get("/ready").json()["degraded"]
            assert server.generate().status_code == 200
            catalogue.rollback()
        monkeypatch.setattr(stored_jobs, "LIMIT_S", 10.0)
        wait_until(lambda: "degraded" not in server.http.get("/ready").json())
        assert ended(server.http, accepted(server.http))["status"] == "completed"


# --- servers that stop, die, or share a database


@pytest.mark.slow
def test_the_jobs_of_a_server_that_stops_are_queued_for_others_at_once(
    tiny_family: Path, tmp_path: Path
) -> None:
    log: list[str] = []
    flags = ("--drain-s", "0", "--grace-s", "0.1", "--workers", "1")
    with (
        served(tiny_family, tmp_path, *flags, log=log) as (process, url),
        httpx.Client(base_url=url) as http,
    ):
        job = accepted(http, prompt="a stopped xylograph", **LONG)
        wait_until(lambda: is_running(http, job))
        process.terminate()
        assert process.wait(60) == 0
    with sqlite3.connect(tmp_path / "catalogue.db") as catalogue:
        (row,) = catalogue.execute("SELECT status, tries, lease FROM jobs").fetchall()
    assert row == ("queued", 0, None)
    assert "xylograph" not in "".join(log)


@pytest.mark.cluster
def test_the_job_of_a_killed_server_is_made_by_the_next(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_JOBS_LEASE_S", "2")
    long = LONG | {"num_inference_steps": 300}
    with (
        served(tiny_family, tmp_path, "--workers", "1") as (process, url),
        httpx.Client(base_url=url) as http,
    ):
        many = [accepted(http, prompt=f"fish {n}", seed=n, **long) for n in range(3)]
        wait_until(lambda: any(is_running(http, job) for job in many))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    with (
        served(tiny_family, tmp_path, "--workers", "1") as (_, url),
        httpx.Client(base_url=url) as http,
    ):
        for n, job in enumerate(many):
            done = ended(http, job)
            assert done["status"] == "completed"
            assert [one["seed"] for one in done["result"]["argus"]] == [n]


@pytest.mark.cluster
def test_servers_on_one_database_share_the_jobs(
    tiny_family: Path, tmp_path: Path, postgres: Postgres
) -> None:
    database = postgres.new_database()
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                running(
                    Settings(
                        family=str(tiny_family), data=tmp_path / name, workers=1,
                        cache_catalogue=database, cache_latents=str(tmp_path / "latents"),
                    )
                )
            )
            for name in ("a", "b")
        ]  # fmt: skip
        a, b = servers
        many = [accepted(a.http, prompt=f"fish {n}", n=2) for n in range(24)]
        for job in many:
            assert ended(b.http, job)["status"] == "completed"

        def made() -> list[float]:
            return [one.metric("argus_jobs_ended_total", status="completed") for one in servers]

        wait_until(lambda: sum(made()) == len(many))
        assert min(made()) > 0

        # A job that runs on one of them is cancelled by the other.
        job = accepted(a.http, **LONG)
        wait_until(lambda: a.service.fleet.running + b.service.fleet.running == 1)
        other = b if a.service.fleet.running else a
        assert other.http.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
        wait_until(lambda: a.service.fleet.idle and b.service.fleet.idle)
