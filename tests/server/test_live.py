"""What a server shows of itself second by second, and what an operator changes while it runs."""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from argus.config import Settings, SloClass
from argus.control.policies import POLICIES
from argus.server import keys, live, run
from argus.server.app import new_app
from argus.server.bursts import ramped
from argus.server.keys import add_key
from argus.server.live import BURST, EVENTS, LIVE, POLICY
from argus.server.service import Service
from tests.server.running import Running, running, served, wait_until

OUTCOMES = ("on_time", "late", "shed", "dropped", "failed", "cancelled")


@pytest.fixture(scope="module")
def argus(family_with_ideas: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        family=str(family_with_ideas),
        data=tmp_path_factory.mktemp("live"),
        workers=2,
        slo={"default": SloClass(latency="60s")},
        queue_limit=64,
        window_s=2.0,
    )
    with running(settings) as server:
        yield server


def report(server: Running) -> dict[str, Any]:
    answer = server.http.get(LIVE)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def now(server: Running) -> float:
    """When a sample was taken that has all that happened so far."""
    last = report(server)["history"]["at"][-1]
    wait_until(lambda: report(server)["history"]["at"][-1] > last)
    return float(report(server)["history"]["at"][-1])


def totals(server: Running, since: float) -> dict[str, int]:
    """The sums over later samples."""
    history = report(server)["history"]
    first = sum(at <= since for at in history["at"])
    names = ("offered", *OUTCOMES, "hits", "misses")
    sums = {name: sum(history[name][first:]) for name in names}
    return sums | {"made": sum(map(sum, history["variants"][first:]))}


def begin_burst(server: Running, **fields: float) -> dict[str, Any]:
    answer = server.http.post(BURST, json=fields)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def burst(server: Running) -> dict[str, Any]:
    return dict(report(server)["state"]["burst"])


def assert_accounted_for(burst: dict[str, Any]) -> None:
    assert not burst["running"]
    assert burst["sent"] > 0
    assert sum(burst["outcomes"].values()) == burst["sent"]


def test_samples_add_up_to_the_requests_that_were_sent(argus: Running) -> None:
    begun = now(argus)
    assert argus.generate("a pair of fish", n=2).status_code == 200
    assert argus.generate("a pinned fish", argus={"variant": "quick"}).status_code == 200
    assert argus.generate(
        "a fish of 5 steps", argus={"exact": True}, num_inference_steps=5
    ).is_success
    wait_until(lambda: totals(argus, begun)["on_time"] == 4)
    sums = totals(argus, begun)
    assert sums["offered"] == sums["made"] == 4
    assert sums["hits"] + sums["misses"] == 2  # what pins steps is not looked up

    found = report(argus)
    history, names = found["history"], [one["name"] for one in found["variants"]]
    quick, pinned = names.index("quick"), names.index("steps-pinned")
    assert sum(counts[quick] for counts in history["variants"]) >= 1
    assert sum(counts[pinned] for counts in history["variants"]) >= 1
    assert {len(column) for column in history.values()} == {len(history["at"])}
    known = [one for one in history["predicted"] if one is not None]
    assert known and all(0.7 <= one <= 1.0 for one in known)
    assert max(one or 0.0 for one in history["latency_p95_s"]) > 0
    assert found["state"]["cache"]["entries"] == len(argus.service.cache)
    assert [one["latency_s"] for one in found["slos"]] == [60.0]


def test_a_worker_shows_what_it_holds_and_makes(argus: Running) -> None:
    def working() -> list[dict[str, Any]]:
        return [one for one in report(argus)["state"]["workers"] if one["running"]]

    with ThreadPoolExecutor(1) as pool:
        fields: dict[str, Any] = {"num_inference_steps": 150, "argus": {"exact": True}}
        asked = pool.submit(argus.generate, "a slow fish", **fields)
        wait_until(lambda: bool(working()))
        (worker,) = working()
        assert worker["running"] == {"exact": 1}
        assert (worker["state"], worker["model"]) == ("ready", "tiny")
        assert asked.result().status_code == 200
    wait_until(lambda: not working())
    assert max(report(argus)["history"]["busy"]) > 0


def test_only_the_latest_samples_are_kept(argus: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.0005)
    wait_until(lambda: len(report(argus)["history"]["at"]) == live.KEPT)
    first = report(argus)["history"]["at"][0]
    wait_until(lambda: report(argus)["history"]["at"][0] > first)
    assert len(report(argus)["history"]["at"]) == live.KEPT


def test_every_new_sample_is_an_event(argus: Running) -> None:
    events: list[dict[str, Any]] = []
    with argus.http.stream("GET", EVENTS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == 2:
                break
    first, second = (event["sample"]["at"] for event in events)
    assert first < second
    at = report(argus)["history"]["at"]
    assert at[at.index(first) + 1] == second
    assert events[0]["state"]["policy"] == "price"
    assert argus.service.accepted == 0


def test_prices_are_those_of_the_policy_for_the_models_that_workers_hold(argus: Running) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(argus.generate, [f"a dear fish {number}" for number in range(24)]))
    assert argus.service.router is not None
    held = set(argus.service.fleet.cluster().models)
    assert set(argus.service.router.prices()) == held - {-1}
    last = report(argus)["history"]["prices"][-1]
    assert all(price is None or price >= 0 for price in last)


def test_another_policy_decides_and_nothing_in_flight_is_lost(
    argus: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "argus.server.service")
    with ThreadPoolExecutor(32) as pool:
        for name in ("clipper-ht", "clipper-ha", "argus", "price"):
            asked = [pool.submit(argus.generate, f"{name} {n}") for n in range(24)]
            wait_until(lambda: argus.service.dispatcher.in_flight > 0)
            answer = argus.http.post(POLICY, json={"policy": name})
            assert answer.json()["policy"] == name
            assert not [one.result().text for one in asked if not one.result().is_success]
            assert report(argus)["state"]["policy"] == name

            # Its rule for batches is in force too, and its plan.
            batching = {type(queue.batching) for queue in argus.service.fleet.queues}
            assert argus.service.router is not None
            policy = argus.service.router.planning.controller.policy
            assert isinstance(policy, type(POLICIES[name](policy.table, policy.slos)))  # type: ignore[attr-defined]
            assert batching == {type(policy.batching)}
            if name == "clipper-ht":  # no worker has what the next policy wants
                wait_until(lambda: set(argus.service.fleet.cluster().models) == {1})
    said = [record.getMessage() for record in caplog.records]
    assert said.count("The policy is now clipper-ha; it was clipper-ht") == 1
    wait_until(lambda: report(argus)["history"]["policy"][-1] == "price")


def test_to_switch_to_the_same_policy_changes_nothing(argus: Running) -> None:
    assert argus.service.router is not None
    before = argus.service.router.planning.controller.policy
    assert argus.http.post(POLICY, json={"policy": "price"}).json()["before"] == "price"
    assert argus.service.router.planning.controller.policy is before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"policy": "best"}, "There is no policy 'best': use price"),
        ({"policy": "oracle"}, "needs to know future arrivals"),
        ({"name": "price"}, "policy"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused(
    argus: Running, body: dict[str, str], message: str
) -> None:
    answer = argus.http.post(POLICY, json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert report(argus)["state"]["policy"] == "price"


def test_a_family_that_was_not_measured_says_which_policies_it_cannot_have(server: Running) -> None:
    problems = {one["name"]: one["problem"] for one in report(server)["policies"]}
    assert problems["nirvana"] is problems["clipper-ha"] is None
    assert "needs predictions" in problems["price"]
    assert "has no profile" in problems["proteus"]
    answer = server.http.post(POLICY, json={"policy": "price"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "policy")
    assert answer.json()["error"]["message"] == problems["price"]


def test_every_request_of_a_burst_is_accounted_for(argus: Running) -> None:
    begun, offered = now(argus), argus.service.dispatcher.offered
    assert begin_burst(argus, rate=200.0, seconds=1.0, ramp_s=0.0)["running"]
    again = argus.http.post(BURST, json={})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "burst_runs")
    wait_until(lambda: not burst(argus)["running"])
    done = burst(argus)
    assert_accounted_for(done)
    assert "failed" not in done["outcomes"]
    assert argus.service.dispatcher.offered == offered + done["sent"]

    def ended() -> int:
        sums = totals(argus, begun)
        return sum(sums[name] for name in OUTCOMES)

    wait_until(lambda: ended() == done["sent"])
    assert totals(argus, begun)["offered"] == done["sent"]
    assert any(report(argus)["history"]["burst"])

    # It has an account of its own, that no API key can have.
    usage = argus.http.get("/v1/argus/usage", params={"key": keys.BURST}).json()
    served = done["outcomes"]["on time"] + done["outcomes"].get("late", 0)
    assert usage["total"]["pictures"] == served


def test_a_burst_that_is_stopped_sends_no_more(argus: Running) -> None:
    begin_burst(argus, rate=20.0, seconds=600.0)
    wait_until(lambda: burst(argus)["sent"] >= 3)
    stopped = argus.http.delete(BURST).json()
    assert_accounted_for(stopped)
    wait_until(lambda: argus.service.dispatcher.in_flight == 0)
    assert argus.http.delete(BURST).json() == stopped  # and to stop none is no error
    assert argus.generate().status_code == 200


def test_a_burst_without_a_rate_is_more_than_exact_pictures_allow(argus: Running) -> None:
    usual = report(argus)["burst"]["rate"]
    wait_until(lambda: report(argus)["history"]["exact_rate"][-1] is not None)
    exact = report(argus)["history"]["exact_rate"][-1]
    assert exact > 0
    assert usual > 1.5 * exact
    assert begin_burst(argus)["rate"] == usual
    wait_until(lambda: burst(argus)["sent"] > 0)
    assert_accounted_for(argus.http.delete(BURST).json())


def test_a_burst_s_usual_rate_is_the_same_when_workers_are_slow_for_a_moment(
    argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = report(argus)["burst"]["rate"]
    for queue in argus.service.fleet.queues:
        monkeypatch.setattr(queue, "slowness", 5 * queue.slowness)
    assert report(argus)["burst"]["rate"] == usual


def test_a_burst_rises_linearly_to_its_rate() -> None:
    steady = [number / 100 for number in range(2000)]  # 100 a second
    times = [ramped(at_s, 10.0) for at_s in steady]
    per_second = Counter(int(at_s) for at_s in times)
    assert [per_second[second] for second in (0, 1, 5, 9)] == pytest.approx([5, 15, 55, 95], abs=1)
    assert [per_second[second] for second in (10, 11, 20)] == pytest.approx([100] * 3, abs=1)
    assert [ramped(at_s, 0.0) for at_s in steady] == steady


def test_a_server_that_others_reach_is_changed_with_keys_only(
    argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = argus.service.settings.model_copy(update={"host": "0.0.0.0"})
    monkeypatch.setattr(argus.service, "settings", reached)
    for path, body in ((BURST, {}), (POLICY, {"policy": "price"})):
        answer = argus.http.post(path, json=body)
        assert answer.status_code == 403
        assert "set api_key_file and admin_keys" in answer.json()["error"]["message"]
    assert argus.http.get(LIVE).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": 1e6}, "at most 500 a second"),
        ({"seconds": 1e6}, "at most 600"),
        ({"seconds": 5, "ramp_s": 6}, "no longer than the burst, 5 s"),
        ({"duration": 3}, "duration"),
    ],
)
def test_a_burst_beyond_the_limits_is_refused(
    argus: Running, body: dict[str, float], message: str
) -> None:
    answer = argus.http.post(BURST, json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_family_without_prompts_of_its_own_has_no_bursts(server: Running) -> None:
    problem = report(server)["burst"]["problem"]
    assert "has no prompts of its own" in problem
    answer = server.http.post(BURST, json={})
    assert answer.status_code == 400
    assert "has no prompts of its own" in answer.json()["error"]["message"]


def test_with_keys_an_admin_s_is_needed(tiny_family: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    root, other = (add_key(file, name) for name in ("root", "other"))
    settings = Settings(
        family=str(tiny_family), data=tmp_path / "data", api_key_file=file, admin_keys=["root"]
    )
    routes = [
        ("GET", LIVE, 200), ("GET", EVENTS, 200), ("POST", POLICY, 400), ("POST", BURST, 400),
        ("DELETE", BURST, 200),
    ]  # fmt: skip
    with running(settings) as server:
        for method, path, status in routes:

            def ask(key: str | None, method: str = method, path: str = path) -> int:
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                body = None if method == "GET" else {"policy": "best"}
                with server.http.stream(method, path, headers=headers, json=body) as answer:
                    return answer.status_code

            assert (ask(None), ask(other), ask(root)) == (401, 403, status)


def test_a_server_that_leaves_ends_streams_and_bursts_at_once(
    family_with_ideas: Path, tmp_path: Path
) -> None:
    flags, lines = ("--drain-s", "300", "--grace-s", "300"), list[str]()
    with served(family_with_ideas, tmp_path, *flags) as (process, url):
        assert httpx.post(f"{url}{BURST}", json={"rate": 5, "seconds": 600}).status_code == 202

        def read() -> None:
            with httpx.stream("GET", f"{url}{EVENTS}", timeout=60) as answer:
                lines.extend(answer.iter_lines())

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: len(lines) > 0)
        process.send_signal(signal.SIGTERM)
        reading.join(60)
        assert not reading.is_alive()  # long before the drain is over

        refused = httpx.get(f"{url}{EVENTS}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.post(f"{url}{BURST}", json={}).status_code == 503
        assert httpx.post(f"{url}{POLICY}", json={"policy": "nirvana"}).status_code == 503
        ended = httpx.get(f"{url}{LIVE}").json()["state"]["burst"]
        assert_accounted_for(ended)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_who_reads_no_samples_holds_up_no_shutdown(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.0005)
    service = Service(Settings(family=str(tiny_family), data=tmp_path, grace_s=300, workers=1))
    config = uvicorn.Config(
        new_app(service), host="127.0.0.1", port=0, timeout_graceful_shutdown=1, log_config=None
    )
    server = run.Server(config, service)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            reader.connect(server.servers[0].sockets[0].getsockname()[:2])
            reader.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: argus\r\n\r\n".encode())

            def unread() -> bool:
                found = [one.transport for one in server.server_state.connections]
                return any(one and one.get_write_buffer_size() for one in found)

            wait_until(unread)
            server.handle_exit(signal.SIGINT, None)
            thread.join(60)
            assert not thread.is_alive()
    finally:
        server.should_exit = True
        thread.join()
        server.ended()
