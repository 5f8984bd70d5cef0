"""Disks that are full and stores that hang, under load on a real server."""

from __future__ import annotations

import base64
import io
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from argus.server import health, retrieval
from tests.faults.conftest import Disk, Serve
from tests.faults.harness import Load
from tests.faults.test_soak import MINUTES
from tests.server.running import Running, wait_until


def degraded(server: Running) -> list[str]:
    answer = server.http.get("/ready")
    assert answer.status_code == 200
    found: list[str] = answer.json().get("degraded", [])
    return found


def said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


def test_on_a_full_disk_pictures_go_out_in_the_answers_and_come_by_url_once_there_is_room(
    serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.2)
    server = serve(data=disk.folder)
    with Load(server, 30, per_second=8, response_format="url") as load:
        wait_until(lambda: any((disk.folder / "pictures").glob("*.png")))
        disk.fill()
        wait_until(lambda: {"pictures"} < set(degraded(server)))
    assert load.account() == {"on time": 30}
    by_url = [one for one in load.pictures if "url" in one["data"][0]]
    assert 0 < len(by_url) < 30
    for one in load.pictures:
        assert one["argus"][0].get("inline", False) == ("b64_json" in one["data"][0])

    assert "pictures" in degraded(server)
    assert 'argus_storage_ok{what="pictures"} 0.0' in server.http.get("/metrics").text
    assert not list(disk.folder.rglob("*.new"))
    openai = OpenAI(base_url=f"{server.url}/v1", api_key="any")
    (answer,) = openai.images.generate(prompt="a boat", response_format="url").data or []
    assert answer.url is None
    assert answer.b64_json is not None
    assert Image.open(io.BytesIO(base64.b64decode(answer.b64_json))).size == (32, 32)

    disk.free()
    wait_until(lambda: not degraded(server))
    assert 'argus_storage_ok{what="pictures"} 1.0' in server.http.get("/metrics").text
    url = server.generate("a hat", response_format="url").json()["data"][0]["url"]
    assert httpx.get(url).status_code == 200
    assert said(caplog, "Degraded: pictures") == said(caplog, "Recovered: pictures") == 1
    assert said(caplog, "cannot be stored") < 10  # not once a request


@pytest.fixture
def store_that_hangs(serve: Serve, tmp_path: Path) -> Iterator[Running]:
    """A server that has stored ten prompts, whose latents hang whoever reads them."""
    server = serve()
    with Load(server, 10, per_second=10):
        pass
    wait_until(lambda: server.service.retrieval.storing == 0)
    files = list((tmp_path / "latents").iterdir())
    assert len(files) == 20
    for file in files:
        file.unlink()
        os.mkfifo(file)
    yield server
    for file in files:
        os.close(os.open(file, os.O_RDWR))  # whoever hangs reads nothing and goes on


def test_a_latent_store_that_hangs_costs_no_request_its_picture(
    store_that_hangs: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "LIMIT_S", 0.5)
    server = store_that_hangs
    for _ in range(3):
        with Load(server, 10, per_second=10, model="tiny/skip-3") as load:
            wait_until(lambda: degraded(server) == ["latents"])
            assert 'argus_storage_ok{what="latents"} 0.0' in server.http.get("/metrics").text
        assert load.account() == {"on time": 10}
        assert all(one["argus"][0]["steps_skipped"] == 0 for one in load.pictures)


@pytest.mark.soak
def test_whenever_the_disk_is_full_every_request_has_its_picture(serve: Serve, disk: Disk) -> None:
    server, chance = serve(data=disk.folder, url_ttl_s=5, cache_limit=500_000), random.Random(1)
    until_s = time.monotonic() + 60 * MINUTES
    while time.monotonic() < until_s:
        with Load(server, 100, per_second=5, response_format="url") as load:
            for _ in range(2):
                time.sleep(3 * chance.random())
                disk.fill()
                time.sleep(5 * chance.random())
                disk.free()
        assert load.account() == {"on time": 100}
        wait_until(lambda: not degraded(server))
