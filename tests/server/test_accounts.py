"""What a picture took and cost, and the figures by which others route."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy.exc import IntegrityError

from argus.config import Settings, SloClass
from argus.core.errors import BadRequest
from argus.server import usage
from argus.server.health import StorageHealth
from argus.server.keys import add_key
from argus.server.metrics import Metrics
from argus.server.schema import Amounts
from argus.server.service import Service
from argus.server.usage import HOUR_S, KEPT_S, Account, Usage, UsageStore
from tests.server.running import Running, running, wait_until

BURST = 24


@pytest.fixture(scope="module")
def argus(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        family=str(measured_family),
        data=tmp_path_factory.mktemp("accounts"),
        workers=2,
        max_batch=4,
        slo={"default": SloClass(latency="60s"), "batch": SloClass(latency="90s")},
        cost_per_hour=3.6,
        currency="EUR",
        truth_share=0.0,
    )
    with running(settings) as server:
        yield server


def made(server: Running, **fields: Any) -> dict[str, Any]:
    answer = server.generate(**fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["argus"][0])


def busy_s(server: Running) -> float:
    return sum(worker.busy_s for worker in server.service.workers)


def test_the_shares_of_a_burst_are_the_workers_busy_time(argus: Running) -> None:
    before = busy_s(argus)
    cases: list[dict[str, Any]] = [
        {"prompt": f"fish {number}", "num_inference_steps": 20 + number, "seed": number,
         "argus": {"exact": True}}
        for number in range(BURST)
    ]  # fmt: skip
    with ThreadPoolExecutor(BURST) as pool:
        reports = list(pool.map(lambda fields: made(argus, **fields), cases))
    spent_s = sum(report["gpu_seconds"] for report in reports)
    busy = busy_s(argus) - before  # also until pictures are packed to be sent
    assert 0.8 * busy < spent_s <= busy + 1e-6 * BURST
    assert spent_s < sum(report["timings_ms"]["denoise"] for report in reports) / 1000 / 2
    for report in reports:
        assert report["cost"] == pytest.approx(report["gpu_seconds"] / 1000, abs=1e-8)
        assert report["currency"] == "EUR"


def test_the_answer_s_headers_say_what_it_took(argus: Running) -> None:
    answer = argus.generate("a headed fish", n=2, argus={"cache": False})
    total = sum(report["gpu_seconds"] for report in answer.json()["argus"])
    assert float(answer.headers["x-argus-gpu-seconds"]) == pytest.approx(total, abs=2e-6)
    assert answer.headers["x-argus-variant"] == "exact"
    assert answer.json()["id"] == answer.headers["x-request-id"]
    file = argus.generate("a filed fish", response_format="file", argus={"variant": "quick"})
    assert file.headers["x-argus-variant"] == "quick"
    assert float(file.headers["x-argus-gpu-seconds"]) > 0


def test_a_request_keeps_its_client_s_id(argus: Running) -> None:
    body = {"prompt": "a named fish"}
    for given, kept in (("job-17:a", True), ("x" * 200, False), ("two words", False)):
        answer = argus.http.post(
            "/v1/images/generations", json=body, headers={"X-Request-Id": given}
        )
        assert (answer.headers["x-request-id"] == given) == kept
        assert answer.json()["id"] == answer.headers["x-request-id"]
    wrong = argus.http.post("/v1/images/generations", json={}, headers={"x-request-id": "job-18"})
    assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "job-18")


def test_what_a_variant_saved_is_worth_its_price(argus: Running) -> None:
    report = made(argus, prompt="a cheap fish", argus={"variant": "other"})
    assert report["saved_cost"] == pytest.approx(report["saved_ms"] / 1e6, rel=0.01)
    assert report["saved_cost"] > 0


def test_a_picture_is_expected_when_it_comes(argus: Running) -> None:
    alone = made(argus, prompt="an expected fish", argus={"cache": False})
    assert alone["queued_behind"] == 0
    assert 0 < alone["expected_ms"] < 10_000
    with ThreadPoolExecutor(24) as pool:
        long: dict[str, Any] = {"num_inference_steps": 20, "argus": {"exact": True}}
        cases = [{"prompt": f"fish {i}", **long} for i in range(24)]
        reports = list(pool.map(lambda fields: made(argus, **fields), cases))
    assert max(report["queued_behind"] for report in reports) > 0


def test_usage_is_counted_by_class_and_variant_and_stored(argus: Running) -> None:
    http = argus.http
    before = http.get("/v1/argus/usage").json()["total"]
    reports = [
        made(argus, prompt="a used fish", argus={"slo": "batch", "variant": "quick"}),
        made(argus, prompt="a used fish", argus={"slo": "batch", "exact": True}),
    ]
    answer = http.get("/v1/argus/usage").json()
    assert answer["currency"] == "EUR"
    after = answer["total"]
    assert after["pictures"] == before["pictures"] + 2
    gained = after["gpu_seconds"] - before["gpu_seconds"]
    assert gained == pytest.approx(sum(report["gpu_seconds"] for report in reports), abs=1e-5)
    rows = {(row["slo"], row["variant"]): row for row in answer["data"]}
    quick = rows["batch", "quick"]
    assert (quick["pictures"], quick["key"], quick["family"]) == (1, "everyone", "tiny")
    assert quick["cost"] == pytest.approx(reports[0]["cost"], abs=1e-8)
    labels = {"family": "tiny", "variant": "quick", "slo": "batch", "key": ""}
    assert argus.metric("argus_gpu_seconds_total", **labels) == pytest.approx(
        quick["gpu_seconds"], abs=1e-6
    )
    wait_until(lambda: not argus.service.usage._new)
    stored = http.get("/v1/argus/usage").json()
    assert stored["total"] == pytest.approx(after)
    assert len(stored["data"]) == len(answer["data"])


@pytest.mark.parametrize(
    ("asked", "hours"),
    [
        ({"from": "0", "to": str(HOUR_S)}, (0, HOUR_S)),
        ({"from": "1970-01-01T01:30:00Z", "to": "1970-01-01T03:00:00+01:00"}, (HOUR_S, 2 * HOUR_S)),
        ({"from": "1970-01-01T00:00:00", "to": "1970-01-02"}, (0, 24 * HOUR_S)),
    ],
)
def test_usage_is_asked_for_by_time(
    argus: Running, asked: dict[str, str], hours: tuple[int, int]
) -> None:
    answer = argus.http.get("/v1/argus/usage", params=asked).json()
    assert (answer["from"], answer["to"]) == hours
    assert answer["total"]["pictures"] == 0


def test_wrong_times_are_refused(argus: Running) -> None:
    answer = argus.http.get("/v1/argus/usage", params={"from": "yesterday"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "query.from")
    backwards = argus.http.get("/v1/argus/usage", params={"from": "2", "to": "1"})
    assert backwards.json()["error"]["message"] == "from is not before to."


def test_a_key_sees_its_own_usage_and_an_admin_s_all(tiny_family: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    headers = {
        name: {"Authorization": f"Bearer {add_key(keys, name)}"} for name in ("ann", "bo", "root")
    }
    settings = Settings(
        family=str(tiny_family), data=tmp_path / "data", api_key_file=keys, admin_keys=["root"]
    )
    with running(settings, headers["root"]) as server:
        for name in ("ann", "ann", "bo"):
            body = {"prompt": "a fish"}
            server.http.post("/v1/images/generations", json=body, headers=headers[name])

        def pictures(whose: str, **params: str) -> dict[str, int]:
            answer = server.http.get("/v1/argus/usage", params=params, headers=headers[whose])
            assert answer.status_code == 200, answer.text
            by: dict[str, int] = {}
            for row in answer.json()["data"]:
                by[row["key"]] = by.get(row["key"], 0) + row["pictures"]
            return by

        assert pictures("ann") == {"ann": 2}
        assert pictures("bo", key="bo") == {"bo": 1}
        assert pictures("root") == {"ann": 2, "bo": 1}
        assert pictures("root", key="ann") == {"ann": 2}
        other = server.http.get("/v1/argus/usage?key=bo", headers=headers["ann"])
        assert (other.status_code, other.json()["error"]["code"]) == (403, "not_an_admin_key")
        assert server.http.get("/v1/argus/usage", headers={"Authorization": ""}).status_code == 401
    with running(settings, headers["root"]) as server:  # what was not stored yet was at the end
        answer = server.http.get("/v1/argus/usage").json()
        assert answer["total"]["pictures"] == 3
        assert answer["total"]["cost"] == 0


def test_amounts_of_many_servers_add_up_and_old_ones_go(database: str) -> None:
    stores = [UsageStore(database), UsageStore(database)]
    hour = int(time.time()) // HOUR_S * HOUR_S
    account = Account(hour, "ann", "default", "tiny", "exact")
    old = Account(hour - KEPT_S - HOUR_S, "ann", "default", "tiny", "exact")
    for store in stores:
        store.add({account: Amounts(pictures=2, gpu_seconds=0.5), old: Amounts(pictures=1)})
    later = replace(account, hour=hour + HOUR_S)
    stores[0].add({later: Amounts(pictures=1, gpu_seconds=0.25)})
    whose = ("ann", "default", "tiny", "exact")
    assert stores[0].read(0, hour + 1, None) == {whose: Amounts(pictures=4, gpu_seconds=1.0)}
    both = stores[0].read(hour, hour + 2 * HOUR_S, "ann")
    assert both == {whose: Amounts(pictures=5, gpu_seconds=1.25)}
    assert stores[0].read(0, hour + 1, "bo") == {}
    assert stores[0].read(0, hour, None) == {}


def test_amounts_that_are_no_number_are_not_stored(tmp_path: Path) -> None:
    store = UsageStore(f"sqlite:///{tmp_path / 'catalogue.db'}")
    account = Account(0, "ann", "default", "tiny", "exact")
    with pytest.raises(IntegrityError):
        store.add({account: Amounts(pictures=1, gpu_seconds=math.nan)})
    assert store.read(0, HOUR_S, None) == {}


def test_usage_waits_in_memory_while_it_cannot_be_stored(
    argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = argus.service
    stored = service.usage._opened()
    real = stored.add

    def full(used: dict[Account, Amounts]) -> None:
        if used:
            raise OSError("no space left")

    monkeypatch.setattr(usage, "FLUSH_S", 0.05)
    monkeypatch.setattr(stored, "add", full)
    before = argus.http.get("/v1/argus/usage").json()["total"]["pictures"]
    made(argus, prompt="a kept fish")
    wait_until(lambda: argus.http.get("/ready").json().get("degraded") == ["usage"])
    assert argus.http.get("/v1/argus/usage").json()["total"]["pictures"] == before + 1
    monkeypatch.setattr(stored, "add", real)
    wait_until(lambda: not service.usage._new)
    wait_until(lambda: "degraded" not in argus.http.get("/ready").json())
    assert argus.http.get("/v1/argus/usage").json()["total"]["pictures"] == before + 1


def test_what_is_being_stored_when_the_server_ends_is_stored(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'catalogue.db'}"
    hour = int(time.time()) // HOUR_S * HOUR_S
    account = Account(hour, "ann", "default", "tiny", "exact")
    released = threading.Event()

    async def use(works: bool) -> None:
        counted = Usage(url, "tiny", StorageHealth())
        stored = counted._opened()
        add, calls = stored.add, list[int]()

        def slowly(used: Any) -> None:
            calls.append(len(used))
            if len(calls) == 1:
                released.wait()
                if not works:
                    raise OSError("no space left")
            add(used)

        stored.add = slowly  # type: ignore[method-assign]
        counted._count(account, Amounts(pictures=1))
        running = asyncio.create_task(counted._flush())
        while not calls:
            await asyncio.sleep(0.01)
        running.cancel()
        closing = asyncio.create_task(counted.close(5.0))
        await asyncio.sleep(0.05)
        released.set()
        await closing

    for number, works in enumerate((True, False), 1):
        released.clear()
        asyncio.run(use(works))
        (amounts,) = UsageStore(url).read(hour, hour + 1, None).values()
        assert amounts.pictures == number


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"H100": 3.0}, "given for 'H100'; the types are .*, default"),
        ({}, "lacks"),
    ],
)
def test_costs_are_of_types_that_there_are(
    measured_family: Path, tmp_path: Path, costs: dict[str, float], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        Service(Settings(family=str(measured_family), data=tmp_path, cost_per_hour=costs))


def test_pinned_numbers_of_steps_are_one_account(argus: Running) -> None:
    for steps in (7, 8):
        made(argus, prompt="a pinned fish", num_inference_steps=steps, argus={"exact": True})
    rows = argus.http.get("/v1/argus/usage").json()["data"]
    names = {row["variant"] for row in rows if row["variant"].startswith("steps")}
    assert names == {"steps-pinned"}


@pytest.mark.parametrize("by_key", [False, True])
def test_metrics_have_no_keys_names_unless_the_operator_says(
    tiny_family: Path, tmp_path: Path, by_key: bool
) -> None:
    keys = tmp_path / "keys.txt"
    headers = {"Authorization": f"Bearer {add_key(keys, 'annabel')}"}
    settings = Settings(
        family=str(tiny_family), data=tmp_path / "data", api_key_file=keys, metrics_by_key=by_key
    )
    with running(settings, headers) as server:
        assert server.generate().status_code == 200
        assert ("annabel" in httpx.get(f"{server.url}/metrics").text) == by_key


def test_an_error_that_nobody_expected_has_the_request_s_id(
    argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("argus.server.generate.report", fail)
    answer = httpx.post(  # the server closes the connection
        f"{argus.url}/v1/images/generations",
        json={"prompt": "a fish"},
        headers={"X-Request-Id": "job-19"},
        timeout=60,
    )
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "job-19")


# --- metrics by which others route


def test_routers_read_the_whole_backlog(measured_family: Path, tmp_path: Path) -> None:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "argus_queue_seconds",
             "argus_backlog_gpu_seconds", "vllm:kv_cache_usage_perc")  # fmt: skip
    settings = Settings(family=str(measured_family), data=tmp_path, workers=1, max_batch=2)
    with running(settings) as server, ThreadPoolExecutor(6) as pool:

        def read() -> dict[str, float]:
            server.http.get("/metrics")
            return {name: server.metric(name, model_name="tiny") for name in names}

        assert set(read().values()) == {0.0}
        long: dict[str, Any] = {"num_inference_steps": 60, "argus": {"exact": True}}
        tasks = [pool.submit(made, server, prompt=f"fish {i}", **long) for i in range(6)]
        wait_until(lambda: read()["argus_queue_seconds"] > 0)
        now = read()
        assert now["vllm:num_requests_waiting"] > 0
        assert now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"] <= 6
        assert 0 < now["vllm:num_requests_running"] <= 2
        assert now["argus_backlog_gpu_seconds"] > now["argus_queue_seconds"] > 0
        assert 0 < now["vllm:kv_cache_usage_perc"] <= 1
        for task in tasks:
            task.result()
        assert set(read().values()) == {0.0}


def test_their_names_are_the_operator_s() -> None:
    metrics = Metrics("sd35", {"waiting": "sglang:num_queue_reqs"})
    metrics.signal("waiting", 3)
    value = metrics.registry.get_sample_value("sglang:num_queue_reqs", {"model_name": "sd35"})
    assert value == 3
    for wrong in ("no metric", "argus_price"):
        with pytest.raises(BadRequest, match=f"router_metrics: '{wrong}' cannot be used"):
            Metrics("sd35", {"waiting": wrong})


def test_a_client_of_openai_reads_the_account(argus: Running) -> None:
    client = openai.OpenAI(base_url=f"{argus.url}/v1", api_key="any")
    raw = client.images.with_raw_response.generate(prompt="a raw fish")
    assert float(raw.headers["x-argus-gpu-seconds"]) > 0
    assert raw.parse().argus[0]["gpu_seconds"] > 0  # type: ignore[attr-defined]
