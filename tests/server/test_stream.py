"""Unfinished pictures on the way, as the OpenAI client reads them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from argus.workers.local import LocalWorker
from argus.workers.worker import WorkerError
from tests.server.running import Running, wait_until


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def image_of(event: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(event.b64_json)))


def test_the_openai_client_sees_a_picture_come_to_be(server: Running) -> None:
    asked: dict[str, Any] = {"seed": 3, "argus": {"cache": False}}
    events = list(
        client_of(server).images.generate(
            prompt="a green key", stream=True, partial_images=3, extra_body=asked
        )
    )
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [getattr(event, "partial_image_index") for event in partial] == [0, 1, 2]  # noqa: B009
    assert last.type == "image_generation.completed"
    assert len({image_of(event).tobytes() for event in events}) == 4
    assert {event.size for event in events} == {"32x32"}
    (report,) = last.argus  # type: ignore[attr-defined]
    assert (report["variant"], report["steps_run"]) == ("exact", 6)
    plain = server.generate("a green key", **asked).json()["data"][0]["b64_json"]
    assert last.b64_json == plain


def test_a_stream_without_partial_images_is_its_end(server: Running) -> None:
    (event,) = client_of(server).images.generate(
        prompt="a green key", stream=True, output_format="webp"
    )
    assert event.type == "image_generation.completed"
    assert image_of(event).format == "WEBP"


def test_a_short_run_shows_fewer_partial_images(server: Running) -> None:
    events = list(
        client_of(server).images.generate(
            prompt="a green key", stream=True, partial_images=3,
            extra_body={"num_inference_steps": 2, "argus": {"exact": True}},
        )
    )  # fmt: skip
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]


def test_what_cannot_be_served_is_an_error_and_no_stream(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="one picture at a time"):
        client_of(server).images.generate(prompt="a key", stream=True, n=2)
    body = {"prompt": "a key", "stream": True, "model": "tiny/none"}
    answer = server.http.post("/v1/images/generations", json=body)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"


def test_leaving_a_stream_frees_its_work(server: Running) -> None:
    made = server.metric("argus_pictures_total", model="tiny", variant="steps-pinned")
    body = {
        "prompt": "an endless key",
        "stream": True,
        "num_inference_steps": 900,
        "argus": {"exact": True},
    }
    with pytest.raises(httpx.ReadTimeout):  # before the first event
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=0.5)
    body["partial_images"] = 3
    with server.http.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix(": queued "))["queued_behind"] == 0
        assert [next(lines), next(lines)] == ["", "event: image_generation.partial_image"]
    wait_until(lambda: server.service.dispatcher.in_flight == 0)
    assert server.generate(argus={"cache": False}).status_code == 200
    assert server.metric("argus_pictures_total", model="tiny", variant="steps-pinned") == made


def test_a_stream_is_counted_and_timed_when_it_ends(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> tuple[float, float, float, float]:
        ok, left, failed = (
            server.metric("argus_requests_total", status=status) for status in ("200", "499", "503")
        )
        return ok, left, failed, server.metric("argus_request_seconds_count")

    body = {
        "prompt": "a counted key", "stream": True, "partial_images": 1, "num_inference_steps": 40,
        "argus": {"exact": True},
    }  # fmt: skip
    before = ok, left, failed, seconds = counted()
    with server.http.stream("POST", "/v1/images/generations", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": queued ")
        assert [next(lines), next(lines)] == ["", "event: image_generation.partial_image"]
        assert counted() == before
        assert "event: image_generation.completed" in list(lines)
    assert counted() == (ok + 1, left, failed, seconds + 1)

    with server.http.stream("POST", "/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
    wait_until(lambda: counted() == (ok + 1, left + 1, failed, seconds + 1))

    async def fail(*arguments: object) -> None:
        arguments[3](0, Image.new("RGB", (32, 32)))  # type: ignore[operator]
        raise WorkerError("it died three times")

    monkeypatch.setattr(LocalWorker, "run", lambda *of, **more: fail(None, None, None, of[-1]))
    answer = server.http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200
    assert "event: error" in answer.text
    assert counted() == (ok + 1, left + 1, failed + 1, seconds + 1)
