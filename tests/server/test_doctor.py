"""What `argus doctor` finds on a machine that is in order, and on some that are not."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from argus.cache.migrations import HEAD
from argus.config import Settings, Upstream
from argus.server.doctor import checkup
from argus.server.doctor.checkup import CHECKS, Check, check_all
from argus.server.doctor.finding import Finding, Level
from argus.server.keys import add_key
from argus.server.lock import DataLock
from tests.postgres import Postgres
from tests.s3 import S3Endpoint
from tests.workers.clusters import ray_nodes

# Of the hub, an upstream, or whatever else answers HTTP: a status and a body by path.
Routes = dict[str, tuple[int, Any]]


@contextmanager
def answering(routes: Routes) -> Iterator[str]:
    """A server that gives these answers, and 404 else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, content = routes.get(self.path, (404, None))
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed() -> Iterator[int]:
    """A port on which nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def sound(measured_family: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings that are in order."""
    data = tmp_path / "data"
    return {"family": str(measured_family), "data": data, "port": 0, "cache_limit": 1_000_000}


def all_of(settings: Settings) -> list[Finding]:
    async def collected() -> list[Finding]:
        return [one async for one in check_all(settings)]

    return asyncio.run(collected())


def found(
    check: str, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> tuple[Level, str, str]:
    """The worst finding of one check: its level, what it says, and its advice."""
    (wanted,) = (one for one in CHECKS if one.name == check)
    monkeypatch.setattr(checkup, "CHECKS", (wanted,))
    ranks = list(Level)
    worst = max(all_of(settings), key=lambda one: ranks.index(one.level))
    return worst.level, worst.says, worst.advice


def test_a_machine_that_is_in_order_has_no_problem(sound: dict[str, Any]) -> None:
    findings = all_of(Settings(**sound))
    assert [one for one in findings if one.level is Level.PROBLEM] == []
    subjects = {one.check for one in findings}
    assert {"python", "device", "memory", "family", "models", "profile", "predictor"} <= subjects
    assert {"processes", "data folder", "database", "latent store", "port", "keys"} <= subjects
    assert not sound["data"].exists()


def test_what_keeps_from_serving_is_a_problem_with_advice(sound: dict[str, Any]) -> None:
    wrong = sound | {"policy": "best", "predictor": Path("nowhere"), "profile": Path("nowhere")}
    problems = [one for one in all_of(Settings(**wrong)) if one.level is Level.PROBLEM]
    assert {one.check for one in problems} == {"policy", "predictor", "profile"}
    assert all(one.advice for one in problems)


def test_a_check_that_hangs_is_given_up_and_the_others_go_on(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hang(*_: object) -> list[Finding]:
        go_on.wait()
        return []

    hangs = Check("a database", hang, 0.05)
    python, *_, port = CHECKS[0], *(one for one in CHECKS if one.name == "port")
    monkeypatch.setattr(checkup, "CHECKS", (python, hangs, port))
    findings = {one.check: one for one in all_of(Settings(**sound))}
    go_on.set()
    assert findings["a database"].level is Level.PROBLEM
    assert "not done within 0.05 s" in findings["a database"].says
    assert findings["port"].level is Level.OK


def test_a_check_that_fails_is_a_finding_without_passwords(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[Finding]:
        raise RuntimeError("postgresql://argus:hunter2@db/argus is odd")

    monkeypatch.setattr(checkup, "CHECKS", (Check("odd", broken),))
    (one,) = all_of(Settings(**sound))
    assert one.says == "the check failed: RuntimeError: postgresql://argus:***@db/argus is odd"


def test_a_package_that_the_settings_need_is_named_with_its_extra(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    level, says, advice = found("python", monkeypatch, Settings(**sound, workers="ray"))
    assert level is Level.PROBLEM
    assert says.startswith("ray cannot be imported")
    assert advice == "pip install 'argus-t2i[ray]'"


def test_a_device_that_is_not_there_is_a_problem(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    level, says, _ = found("device", monkeypatch, Settings(**sound, device="tpu"))
    assert (level, "use cpu, cuda" in says) == (Level.PROBLEM, True)


# --- the family


def test_a_family_that_cannot_be_read_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(family="nosuch", data=tmp_path)
    assert found("family", monkeypatch, settings)[0] is Level.PROBLEM


def test_a_model_s_folder_that_is_gone_is_a_problem(
    tiny_family: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tmp_path / "gone.yaml"
    family.write_text(tiny_family.read_text().replace(str(tiny_sd), str(tmp_path / "gone")))
    level, says, _ = found("models", monkeypatch, Settings(family=str(family), data=tmp_path))
    assert level is Level.PROBLEM
    assert says.startswith(f"There is no folder {tmp_path}/gone")


@pytest.mark.parametrize(
    ("status", "level", "advice"),
    [
        (200, Level.WARNING, "hf download owner/tiny"),
        (401, Level.PROBLEM, "hf auth login"),
        (404, Level.PROBLEM, "Check the id"),
        (None, Level.PROBLEM, "HF_ENDPOINT"),
    ],
)
def test_models_that_are_not_here_are_asked_for_on_the_hub(
    tiny_family: Path, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    closed: int, status: int | None, level: Level, advice: str,
) -> None:  # fmt: skip
    family = tmp_path / "hub.yaml"
    family.write_text(tiny_family.read_text().replace(str(tiny_sd), "owner/tiny"))
    settings = Settings(family=str(family), data=tmp_path)
    with answering({"/owner/tiny/resolve/main/model_index.json": (status or 404, {})}) as url:
        endpoint = url if status is not None else f"http://127.0.0.1:{closed}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        told = found("models", monkeypatch, settings)
    assert told[0] is level
    assert advice in told[2]


def test_a_profile_of_another_device_is_not_used(
    measured_family: Path, sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((measured_family.parent / "profile.json").read_text())
    content["device"] = {"device": "cuda", "name": "A100"}
    file = tmp_path / "a100.json"
    file.write_text(json.dumps(content))
    level, says, advice = found("profile", monkeypatch, Settings(**sound, profile=file))
    assert (level, "is of cuda, and is not used on cpu" in says) == (Level.WARNING, True)
    assert "argus profile" in advice


def test_a_predictor_of_another_family_is_a_problem_if_it_was_chosen(
    measured_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(measured_family.parent, tmp_path / "other")
    family = tmp_path / "other" / measured_family.name
    family.write_text(family.read_text().replace("quick: {steps: 3}", "quick: {steps: 2}"))
    settings = Settings(family=str(family), data=tmp_path)
    assert found("predictor", monkeypatch, settings)[0] is Level.WARNING
    chosen = settings.model_copy(update={"predictor": tmp_path / "other" / "predictor"})
    level, says, _ = found("predictor", monkeypatch, chosen)
    assert (level, "was trained for other variants" in says) == (Level.PROBLEM, True)


# --- what it keeps


def test_a_data_folder_that_is_a_file_and_one_that_is_in_use(
    sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    wrong = Settings(**sound | {"data": tmp_path / "file" / "data"})
    assert found("data folder", monkeypatch, wrong)[0] is Level.PROBLEM
    lock = DataLock(sound["data"])
    level, says, _ = found("data folder", monkeypatch, Settings(**sound))
    assert (level, f"pid {os.getpid()} on" in says) == (Level.WARNING, True)
    lock.release()
    assert found("data folder", monkeypatch, Settings(**sound))[0] is Level.OK
    DataLock(sound["data"]).release()


def test_a_disk_with_less_room_than_the_cache_may_take(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Settings(**sound | {"cache_limit": 10**18})
    level, says, advice = found("data folder", monkeypatch, large)
    assert level is Level.WARNING
    assert "cache_limit" in says
    assert "lower" in advice


@pytest.mark.parametrize(
    ("version", "level"), [(HEAD, Level.OK), ("0001", Level.WARNING), ("9999", Level.PROBLEM)]
)
def test_tables_of_another_version(
    sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch, version: str, level: Level
) -> None:
    sound["data"].mkdir()
    with sqlite3.connect(sound["data"] / "catalogue.db") as catalogue:
        catalogue.execute("CREATE TABLE alembic_version (version_num TEXT)")
        catalogue.execute("INSERT INTO alembic_version VALUES (?)", (version,))
    assert found("database", monkeypatch, Settings(**sound))[0] is level
    with sqlite3.connect(sound["data"] / "catalogue.db") as catalogue:
        tables = catalogue.execute("SELECT name FROM sqlite_master").fetchall()
    assert tables == [("alembic_version",)]


def test_a_database_that_answers_and_one_that_does_not(
    sound: dict[str, Any], postgres: Postgres, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Settings(**sound, cache_catalogue=postgres.new_database())
    assert found("database", monkeypatch, there)[:1] == (Level.OK,)
    url = f"postgresql://argus:hunter2@127.0.0.1:{closed}/argus"
    level, says, _ = found("database", monkeypatch, Settings(**sound, cache_catalogue=url))
    assert level is Level.PROBLEM
    assert "hunter2" not in says
    with postgres.frozen():
        hung = Settings(**sound, cache_catalogue=f"{postgres.url}?connect_timeout=2")
        assert found("database", monkeypatch, hung)[0] is Level.PROBLEM


def test_a_bucket_that_is_there_and_one_that_is_not(
    sound: dict[str, Any], s3: S3Endpoint, bucket: str, new_clients: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = Settings(**sound, cache_latents=f"s3://{bucket}/latents")
    assert found("latent store", monkeypatch, there)[0] is not Level.PROBLEM
    gone = Settings(**sound, cache_latents="s3://no-such-bucket/latents")
    level, says, advice = found("latent store", monkeypatch, gone)
    assert level is Level.PROBLEM
    assert says.startswith("s3://no-such-bucket/latents takes no object")
    assert "bucket exists" in advice


# --- what it listens on and talks to


def test_a_port_that_is_taken(sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with answering({"/health": (200, {"version": "1"})}) as url:
        taken = sound | {"port": int(url.rpartition(":")[2])}
        level, says, _ = found("port", monkeypatch, Settings(**taken))
    assert (level, "is taken by an Argus" in says) == (Level.PROBLEM, True)


def test_an_open_server_without_keys(
    sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = Settings(**sound, host="0.0.0.0")
    assert found("keys", monkeypatch, public)[0] is Level.WARNING
    file = tmp_path / "keys.txt"
    add_key(file, "alice")
    assert found("keys", monkeypatch, Settings(**sound, api_key_file=file))[0] is Level.OK
    file.write_text("alice: secret")
    assert found("keys", monkeypatch, Settings(**sound, api_key_file=file))[0] is Level.PROBLEM


def test_upstreams_that_work_and_others(
    sound: dict[str, Any], tmp_path: Path, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tmp_path / "remote.yaml"
    family.write_text(
        "name: remote\ndescription: Elsewhere.\nmodels: {big: upstream}\n"
        "exact: {model: big, sampler: default, width: 64, height: 64, steps: 8, guidance: 1}\n"
    )

    def told(*upstreams: Upstream) -> tuple[Level, str, str]:
        settings = sound | {"family": str(family), "upstreams": list(upstreams)}
        return found("upstreams", monkeypatch, Settings(**settings))

    models = {"data": [{"id": "big-model"}]}
    with answering({"/health": (200, {}), "/v1/models": (200, models)}) as url:
        assert told(Upstream(url=url, served_model="big-model"))[0] is Level.OK
        level, says, _ = told(Upstream(url=url, served_model="other"))
        assert (level, "it serves big-model, not other" in says) == (Level.PROBLEM, True)
        gone = Upstream(url=f"http://127.0.0.1:{closed}")
        level, says, _ = told(Upstream(url=url), gone)
        assert (level, "cannot be reached" in says) == (Level.PROBLEM, True)
    level, says, _ = told()
    assert (level, "No upstream holds 'big'" in says) == (Level.PROBLEM, True)


def test_a_ray_cluster_that_is_not_there(
    sound: dict[str, Any], closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**sound, workers="ray", ray_address=f"127.0.0.1:{closed}")
    level, says, _ = found("Ray", monkeypatch, settings)
    assert (level, "cannot be reached" in says) == (Level.PROBLEM, True)


def test_a_ray_cluster_without_its_token(
    sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    level, says, _ = found("Ray", monkeypatch, Settings(**sound, workers="ray"))
    assert (level, "There is no token" in says) == (Level.PROBLEM, True)


@pytest.mark.cluster
def test_a_ray_cluster_with_room(sound: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with ray_nodes(num_cpus=2) as cluster:
        settings = Settings(
            **sound, workers="ray", ray_auth="disabled", ray_address=cluster.address
        )
        told = found("Ray", monkeypatch, settings)
    assert told[:2] == (Level.OK, "the cluster has room for 1 workers")


def test_a_collector_that_is_out_is_no_problem(
    sound: dict[str, Any], closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**sound, otlp_endpoint=f"http://127.0.0.1:{closed}")
    assert found("traces", monkeypatch, settings)[0] is Level.WARNING
