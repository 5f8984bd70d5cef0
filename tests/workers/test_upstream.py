"""A server with the API of vLLM-Omni or SGLang as a worker: what it is asked for, and what becomes
of a job when the server refuses, fails, hangs, is busy or goes away."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argus.config import Upstream as Settings
from argus.core.errors import BadRequest, ModelError
from argus.core.job import Job
from argus.workers.images_api import Load
from argus.workers.upstream import UpstreamWorker
from argus.workers.worker import Model, State, Unanswered, WorkerError
from tests.workers.upstreams import Upstream, picture, upstream

JOB = Job("a red fish", seed=7, steps=5, guidance=3.0, width=64, height=48)
Use = Callable[[UpstreamWorker, Upstream], Awaitable[None]]


def with_worker(
    use: Use, api: str = "vllm-omni", settings: dict[str, Any] | None = None, **options: Any
) -> list[str]:
    """Use a worker whose server has `options`. Returns the states that it told of."""
    states: list[str] = []

    async def run(server: Upstream) -> None:
        given = Settings(url=server.url, **(settings or {}))
        worker = UpstreamWorker(
            given, Model("upstream"), lambda: states.append(worker.state.value)
        )  # fmt: skip
        worker.start()
        try:
            await use(worker, server)
        finally:
            await worker.stop(grace_s=0.0)

    with upstream(api, **options) as server:
        asyncio.run(asyncio.wait_for(run(server), 60))
    return states


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("api", ["vllm-omni", "sglang"])
def test_it_asks_for_what_a_job_is_and_answers_with_the_server_s_picture(api: str) -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()
        made = await worker.run(JOB)
        expected = picture("a red fish", 7, 5, 64, 48)
        assert np.array_equal(np.asarray(made.image), np.asarray(expected))
        (asked,) = server.report()["seen"]
        assert asked == {
            "prompt": "a red fish", "n": 1, "size": "64x48", "response_format": "b64_json",
            "output_format": "png", "num_inference_steps": 5, "guidance_scale": 3.0, "seed": 7,
        }  # fmt: skip
        assert made.timings_ms["denoise"] > 0 and made.kept == {}

    with_worker(use, api)


def test_a_variant_s_and_the_upstream_s_own_fields_are_added_renamed_or_left_out() -> None:
    settings = {
        "served_model": "acme/pattern",
        "extra": {"user": "gateway", "generator_device": "cpu"},
        "fields": {"guidance_scale": "true_cfg_scale", "output_format": None},
    }

    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        extra = {"generator_device": "cuda", "lora": {"name": "ink"}}
        job = Job("a fish", negative_prompt="red", steps=2, guidance=4.0, extra=extra)
        await worker.run(job)
        (asked,) = server.report()["seen"]
        assert asked == {
            "prompt": "a fish", "model": "acme/pattern", "n": 1, "response_format": "b64_json",
            "num_inference_steps": 2, "true_cfg_scale": 4.0, "seed": 0, "negative_prompt": "red",
            "user": "gateway", "generator_device": "cuda", "lora": {"name": "ink"},
        }  # fmt: skip

    with_worker(use, settings=settings)


def test_no_more_than_its_concurrency_is_in_flight_and_time_is_shared_among_it() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        begun = time.monotonic()
        made = await asyncio.gather(*(worker.run(JOB) for _ in range(7)))
        took_s = time.monotonic() - begun
        assert server.report()["most"] == 3
        assert sum(one.worker_s for one in made) == pytest.approx(worker.busy_s, rel=0.01)
        assert worker.busy_s <= took_s

    with_worker(use, settings={"concurrency": 3}, batch=8)


def test_a_request_that_the_server_refuses_is_the_client_s_error_in_the_server_s_words() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        with pytest.raises(BadRequest, match="Input should be from 1 to 200"):
            await worker.run(Job("a fish", steps=201))
        assert (await worker.run(JOB)).image.size == (64, 48)

    assert with_worker(use) == ["ready"]


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("fail", r"fails \(500\): Internal Server Error"),
        ("redirect", r"redirects \(307\), which is refused"),
        ("oversized", "more than 1,067,008 bytes"),
        ("endless", "more than 1,067,008 bytes"),
        ("garbage", "no PNG, JPEG or WebP"),
        ("bomb", "picture of 9000x9000, asked for 64x48"),
        ("elsewhere", "URL of another server"),
    ],
)
def test_an_answer_that_is_no_picture_leaves_the_job_to_another_worker(
    mode: str, says: str
) -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        server.control(mode=mode)
        with pytest.raises(Unanswered, match=says):
            await worker.run(JOB)

    with_worker(use)


def test_the_path_of_a_picture_at_the_same_server_is_fetched() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        assert (await worker.run(JOB)).image.size == (64, 48)
        assert server.report()["seen"][0]["response_format"] == "url"

    with_worker(use, "sglang", settings={"extra": {"response_format": "url"}}, stored=1)


def test_a_busy_server_finishes_its_jobs_and_gets_others_later() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()
        running = asyncio.create_task(worker.run(Job("a long fish", steps=40)))
        await until(lambda: len(server.report()["seen"]) == 1)
        server.control(mode="full")
        with pytest.raises(Unanswered, match=r"busy \(429\): busy"):
            await worker.run(JOB)
        assert worker.state is State.FULL
        server.control(mode="ok")
        assert (await worker.run(JOB)).image.size == (64, 48)  # waits for Retry-After
        assert (await running).image.size == (32, 32)

    states = with_worker(use, settings={"concurrency": 2}, batch=4)
    assert states == ["ready", "full", "ready"]


def test_a_server_that_fails_at_every_picture_gets_no_others_for_a_while() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()
        server.control(mode="fail")
        for _ in range(3):
            assert worker.state is State.READY
            with pytest.raises(Unanswered):
                await worker.run(JOB)
        assert worker.state is State.FULL

    with_worker(use)


def test_jobs_of_a_server_that_is_killed_are_asked_again_once_it_is_back() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        jobs = [asyncio.create_task(worker.run(JOB)) for _ in range(2)]
        await until(lambda: len(server.report()["seen"]) == 2)
        server.kill()
        await until(lambda: worker.state is State.STARTING)
        with pytest.raises(WorkerError, match="cannot be reached"):
            await worker.ready()
        await asyncio.to_thread(server.start_again)
        assert [one.image.size for one in await asyncio.gather(*jobs)] == [(64, 48)] * 2
        assert worker.restarts == 1

    states = with_worker(use, settings={"concurrency": 2}, step_s=0.1)
    assert states == ["ready", "starting", "ready"]


def test_a_server_that_hangs_is_out_until_it_makes_the_picture_that_it_hung_at() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.run(JOB)
        worker.silence_s = lambda: 0.5
        server.control(mode="hang")
        job = asyncio.create_task(worker.run(Job("the fish", steps=3)))
        await until(lambda: worker.state is State.STARTING)
        await until(lambda: len(server.report()["seen"]) == 3)  # it is asked for it again
        assert worker.state is State.STARTING  # though its health route answers
        server.control(mode="ok")
        await job
        assert [one["prompt"] for one in server.report()["seen"][1:3]] == ["the fish"] * 2

    with_worker(use)


def test_a_server_is_out_when_its_health_fails_again_and_again() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()
        server.control(mode="unhealthy")
        await until(lambda: worker.state is State.STARTING)
        server.control(mode="ok")
        await until(lambda: worker.state is State.READY)

    with_worker(use)


def test_without_a_health_route_its_list_of_models_is_asked_for() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()

    assert with_worker(use, checked=0) == ["ready"]


def test_a_server_without_the_model_that_it_is_asked_for_is_out() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        with pytest.raises(WorkerError, match="serves acme/pattern, not acme/other"):
            await worker.ready()

    with_worker(use, settings={"served_model": "acme/other"})


def test_it_holds_one_model() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()
        worker.load(Model("another"))
        with pytest.raises(ModelError, match="loads no other"):
            await worker.ready()
        with pytest.raises(WorkerError, match="unusable"):
            await worker.run(JOB)

    with_worker(use)


def test_the_key_is_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GATEWAY_KEY", "the secret")
    caplog.set_level(logging.DEBUG)

    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        assert (await worker.run(JOB)).image.size == (64, 48)
        server.control(key="another")
        with pytest.raises(Unanswered, match=r"refuses the key \(401\)") as error:
            await worker.run(JOB)
        assert "secret" not in str(error.value) + repr(worker.upstream)

    with_worker(use, settings={"key_env": "GATEWAY_KEY"}, key="the secret")
    assert "secret" not in caplog.text


def test_cancelling_closes_the_connection_which_vllm_omni_takes_as_the_end() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        job = asyncio.create_task(worker.run(Job("a fish", steps=200)))
        await until(lambda: server.report()["running"] == 1)
        job.cancel()
        await until(lambda: server.report()["aborted"] == 1)
        assert worker.in_flight == 0

    with_worker(use)


def test_it_says_how_many_requests_the_server_has() -> None:
    async def use(worker: UpstreamWorker, server: Upstream) -> None:
        jobs = [asyncio.create_task(worker.run(Job("a fish", steps=200))) for _ in range(3)]
        await until(lambda: worker.load_said == Load(running=1, waiting=2))
        for job in jobs:
            job.cancel()

    with_worker(use, settings={"concurrency": 3}, step_s=0.05)


def test_a_certificate_is_verified_against_the_ca_file(tmp_path: Path) -> None:
    other = certificate(tmp_path, "other")
    own = certificate(tmp_path, "own")

    async def trusted(worker: UpstreamWorker, server: Upstream) -> None:
        await worker.ready()

    async def untrusted(worker: UpstreamWorker, server: Upstream) -> None:
        with pytest.raises(WorkerError, match="cannot be reached"):
            await worker.ready()

    for use, ca_file in ((trusted, own), (untrusted, other), (untrusted, None)):
        with_worker(use, settings={"ca_file": ca_file}, certificate=own)


def certificate(folder: Path, name: str) -> Path:
    """A file with a key and its certificate for 127.0.0.1, which nobody else has signed."""
    file = folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", f"{file}.key", "-out", f"{file}.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_bytes(Path(f"{file}.crt").read_bytes() + Path(f"{file}.key").read_bytes())
    return file
