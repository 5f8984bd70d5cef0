"""What an operator does to a server: asks it, kills it, stops it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from argus.config import Settings
from argus.core.errors import ArgusError
from argus.quality.encoder import PromptEncoder
from argus.server import run
from argus.server.app import new_app
from argus.server.service import Service
from tests.server.running import COMMAND, Running, running, served, wait_until

HTTPX_KEEPS_S = 5


def test_health_ready_and_metrics(server: Running) -> None:
    assert server.http.get("/health").json()["status"] == "ok"
    assert server.http.get("/ready").json() == {"status": "ready"}
    server.generate()
    text = server.http.get("/metrics").text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    others = [name for name in names if not name.startswith("argus_")]
    own = {name for name in others if not name.startswith("process_")}  # the usual ones of one
    assert {name.partition(":")[0] for name in own} == {"vllm"}  # what routers read
    assert 'argus_worker_ready{worker="0"} 1.0' in text
    assert 'argus_requests_total{status="200"}' in text
    assert 'argus_stage_seconds_count{stage="denoise"}' in text


def test_a_killed_worker_is_replaced_while_its_requests_wait(server: Running) -> None:
    restarts = server.service.workers[0].restarts
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            server.generate("a sun", num_inference_steps=200, argus={"exact": True})
        )
    )
    asking.start()
    wait_until(lambda: server.service.workers[0].backlog == 1)
    pid = server.service.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    asking.join()
    assert answers[0].status_code == 200
    wait_until(lambda: server.http.get("/ready").status_code == 200)
    assert server.service.workers[0].restarts == restarts + 1


def test_a_request_whose_time_is_over_before_it_begins_is_dropped(
    tiny_family: Path, tmp_path: Path
) -> None:
    with running(Settings(family=str(tiny_family), data=tmp_path, timeout_s=1e-6)) as server:
        answer = server.generate()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "expired"
        assert server.service.dispatcher.in_flight == 0


def test_sigterm_finishes_what_is_in_flight_and_exits_0(tiny_family: Path, tmp_path: Path) -> None:
    log: list[str] = []
    with served(tiny_family, tmp_path, "--drain-s", "0.1", log=log) as (process, url):
        asking, answers = ask(url, steps=100)
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert answers[0].status_code == 200
        assert process.wait(60) == 0
    told = "".join(log)
    assert "Stopping: /ready answers 503, requests are served for another 0.1 s" in told
    assert "new requests are refused; accepted ones have 30 s (requests: 1)" in told
    assert "given up" not in told
    assert "Stopped" in log[-1]
    assert "GET /metrics" not in told  # lines of access are for debugging
    assert "POST /v1" not in told


@pytest.mark.slow
def test_an_idle_connection_stays_open_longer_than_clients_keep_it(
    tiny_family: Path, tmp_path: Path
) -> None:
    """Else a server closes it just when a client sends on it, and that request is lost."""
    with served(tiny_family, tmp_path) as (_, url):
        connection = HTTPConnection(url.removeprefix("http://"))
        for pause_s in (HTTPX_KEEPS_S + 1, 0):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(pause_s)


def test_a_server_killed_without_warning_finds_its_cache_again(
    tiny_family: Path, tmp_path: Path
) -> None:
    body: dict[str, object] = {"prompt": "a fish"}
    with served(tiny_family, tmp_path) as (process, url):
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
        wait_until(lambda: "argus_cache_entries 1" in httpx.get(f"{url}/metrics").text)
        process.kill()
    with served(tiny_family, tmp_path, "--drain-s", "0", "--grace-s", "0.5") as (process, url):
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
        assert answer.json()["argus"][0]["steps_skipped"] == 3

        # What outlasts the grace is answered too.
        asking, answers = ask(url, steps=990)
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert_told_to_ask_again(answers[0])
        assert process.wait(60) == 0


@pytest.mark.slow
def test_during_a_rolling_update_no_request_is_lost(tiny_family: Path, tmp_path: Path) -> None:
    flags = ("--drain-s", "300", "--grace-s", "300")
    with served(tiny_family, tmp_path, *flags) as (process, url):
        streaming, streams = ask(url, steps=600, stream=True, partial_images=1)
        process.send_signal(signal.SIGTERM)

        # At first others are asked, and who asks all the same is served.
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/ready").json()["error"]["code"] == "shutting_down"
        served_still = post(url, {"prompt": "a late fish"})
        assert served_still.status_code == 200
        assert served_still.headers["connection"] == "close"
        assert httpx.get(f"{url}/health").status_code == 200

        # Then, here because of a second signal, new requests are refused until the last is out.
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: post(url, {"prompt": "too late"}).status_code == 503)
        assert_told_to_ask_again(post(url, {"prompt": "too late"}))
        assert streaming.is_alive()
        streaming.join()
        assert "event: image_generation.completed" in streams[0].text
        assert process.wait(60) == 0


def test_ctrl_c_refuses_new_requests_at_once_and_a_second_one_stops_the_others(
    tiny_family: Path, tmp_path: Path
) -> None:
    flags = ("--drain-s", "300", "--grace-s", "300")
    with served(tiny_family, tmp_path, *flags) as (process, url):
        asking, answers = ask(url, steps=990)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: post(url, {"prompt": "too late"}).status_code == 503)
        assert asking.is_alive()
        process.send_signal(signal.SIGINT)
        asking.join()
        assert_told_to_ask_again(answers[0])
        assert process.wait(60) == 0


@pytest.mark.slow
def test_who_waits_for_workers_that_hang_while_loading_is_told_at_the_end(
    tiny_family: Path, tmp_path: Path
) -> None:
    flags, log = ("--drain-s", "0", "--grace-s", "0.1"), list[str]()
    with served(tiny_family, tmp_path, *flags, ready=False, log=log) as (process, url):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGSTOP)
        asking, answers = ask(url)
        assert httpx.get(f"{url}/ready").json()["error"]["code"] == "loading"
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert_told_to_ask_again(answers[0])
        assert process.wait(60) == 0
    assert "Traceback" not in "".join(log)


@pytest.mark.slow
def test_a_read_that_hangs_does_not_keep_the_process(tiny_family: Path, tmp_path: Path) -> None:
    with served(tiny_family, tmp_path, "--drain-s", "0", ready=False) as (process, url):
        name = f"{'a' * 32}.png"
        os.mkfifo(tmp_path / "pictures" / name)
        with pytest.raises(httpx.ReadTimeout):  # nobody ever writes there
            httpx.get(f"{url}/v1/images/{name}", timeout=1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_server_that_is_closed_while_its_encoder_loads_has_no_problem(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()
    load = PromptEncoder.load

    def slowly(folder: Path) -> PromptEncoder:
        loading.set()
        go_on.wait()
        return load(folder)

    monkeypatch.setattr(PromptEncoder, "load", slowly)
    service = Service(Settings(family=str(tiny_family), data=tmp_path, workers=1))

    async def close_early() -> None:
        service.start()
        await service.workers[0].ready()
        await asyncio.to_thread(loading.wait)
        await service.close()

    asyncio.run(close_early())
    assert service.problem is None
    go_on.set()
    assert service._encoder.result(60)  # its thread ends well
    service.cache.close()


def assert_told_to_ask_again(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert answer.json()["error"]["type"] == "server_error"
    assert int(answer.headers["retry-after"]) > 0


def post(url: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)


def ask(
    url: str, steps: int | None = None, **fields: object
) -> tuple[threading.Thread, list[httpx.Response]]:
    """Ask in a thread for a picture, of many steps; it has been accepted when this returns."""
    answers: list[httpx.Response] = []
    exact = {"exact": steps is not None}
    body = {"prompt": "a red fish", "num_inference_steps": steps, "argus": exact, **fields}

    def in_flight() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith("argus_pictures_in_flight ")).split()[1])

    before = in_flight()
    thread = threading.Thread(target=lambda: answers.append(post(url, body)))
    thread.start()
    wait_until(lambda: in_flight() > before)
    return thread, answers


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"family": "nosuch"}, "There is no family 'nosuch'"),
        ({"policy": "best"}, "use price, price-blind"),
        ({"policy": "oracle"}, "needs to know future arrivals"),
        ({"device": "tpu"}, "use cpu, cuda"),
        ({"dtype": "int4"}, "use one of float32"),
        ({"api_key_file": Path("nowhere")}, "argus key NAME"),
    ],
)
def test_settings_that_cannot_be_served_are_refused_before_anything_starts(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgusError, match=message):
        Service(Settings(data=tmp_path, **changed))


def test_a_server_whose_model_cannot_be_loaded_says_why_and_exits(
    tiny_family: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_sd, broken)
    shutil.rmtree(broken / "unet")
    family = tmp_path / "broken.yaml"
    family.write_text(tiny_family.read_text().replace(str(tiny_sd), str(broken)))
    done = subprocess.run(
        [*COMMAND, "serve", "--data", str(tmp_path), "--family", str(family), "--port", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 3
    assert "Error: Cannot load" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_server_that_leaves_waits_for_who_reads_slowly(tiny_family: Path, tmp_path: Path) -> None:
    service = Service(Settings(family=str(tiny_family), data=tmp_path))
    name, size = f"{'a' * 32}.png", 50_000_000
    (tmp_path / "pictures" / name).write_bytes(bytes(size))
    config = uvicorn.Config(
        new_app(service), host="127.0.0.1", port=0, timeout_graceful_shutdown=60, log_config=None
    )
    server = run.Server(config, service)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        connection = HTTPConnection(*server.servers[0].sockets[0].getsockname()[:2])
        connection.request("GET", f"/v1/images/{name}")
        answer = connection.getresponse()
        server.handle_exit(signal.SIGINT, None)
        wait_until(lambda: service.draining)
        time.sleep(10 * run.LOOK_S)
        assert not server.should_exit
        assert len(answer.read()) == size
        connection.close()
        wait_until(lambda: server.should_exit)
    finally:
        server.should_exit = True
        thread.join()
        server.ended()
