"""What an OpenAI client gets."""

from __future__ import annotations

import base64
import io
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from argus.core.job import MAX_SEED
from tests.server.running import Running, wait_until


def settled(server: Running) -> Running:
    """Once the latents of earlier answers are stored."""
    wait_until(lambda: not server.service.retrieval.storing)
    return server


def picture(answer: httpx.Response, index: int = 0) -> Image.Image:
    data = base64.b64decode(answer.json()["data"][index]["b64_json"])
    return Image.open(io.BytesIO(data))


def test_the_openai_client_gets_a_picture_and_how_it_was_made(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(
        model="tiny",
        prompt="a red fish for the client",
        size="auto",
        response_format="b64_json",
        extra_body={"seed": 5, "argus": {"cache": True}},
    )
    assert answer.data is not None
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).size == (32, 32)
    (report,) = answer.argus  # type: ignore[attr-defined]
    assert report["variant"] == "exact"
    assert report["seed"] == 5
    assert report["steps_run"] == 6
    assert set(report["timings_ms"]) == {"queue", "encode", "retrieve", "denoise", "decode"}
    assert [model.id for model in client.models.list()] == [
        "tiny", "tiny/exact", "tiny/skip-2", "tiny/skip-3", "tiny/quick", "tiny/other",
        "default",
    ]  # fmt: skip
    assert client.models.retrieve("tiny/skip-2").id == "tiny/skip-2"
    with pytest.raises(openai.NotFoundError, match="There is no model 'dall-e-3'"):
        client.images.generate(model="dall-e-3", prompt="a red fish")
    with pytest.raises(openai.BadRequestError, match="prompt is blank"):
        client.images.generate(prompt="  ")


def test_a_second_prompt_resumes_from_the_first(server: Running) -> None:
    first = server.generate("a blue boat at sea").json()["argus"][0]
    assert first["variant"] == "exact"
    begun = time.perf_counter()
    second = settled(server).generate("a blue boat at sea").json()["argus"][0]
    assert 0 < sum(second["timings_ms"].values()) <= 1000 * (time.perf_counter() - begun)
    assert second["variant"] == "skip-3"
    assert second["steps_skipped"] == 3
    assert second["steps_run"] == 3
    assert second["neighbour"]["prompt"] == "a blue boat at sea"
    assert second["similarity"] > 0.99
    assert "allows K=3" in second["reason"]


def test_resumed_from_its_own_latents_a_picture_is_the_same(server: Running) -> None:
    first = server.generate("a green tree", seed=3)
    again = settled(server).generate("a green tree", seed=3)
    assert again.json()["argus"][0]["steps_skipped"] == 3
    assert picture(again).tobytes() == picture(first).tobytes()


def test_only_full_runs_are_kept(server: Running) -> None:
    server.generate("a pink heart")
    before = len(settled(server).service.cache)
    assert server.generate("a pink heart ").json()["argus"][0]["steps_skipped"] == 3
    server.generate("a pink heart", num_inference_steps=4, argus={"exact": True})
    server.generate("a lone pink star", argus={"cache": False})
    assert len(settled(server).service.cache) == before


def test_a_request_can_keep_out_of_the_cache(server: Running) -> None:
    server.generate("a black key")
    fields: dict[str, Any] = {"seed": 1, "argus": {"cache": False}}
    one = settled(server).generate("a black key", **fields)
    other = server.generate("a black key", **fields)
    assert one.json()["argus"][0]["steps_skipped"] == 0
    assert picture(one).tobytes() == picture(other).tobytes()


@pytest.mark.parametrize("changed", [
    {"size": "40x32"},
    {"guidance_scale": 4.0},
    {"negative_prompt": "fog"},
])  # fmt: skip
def test_other_settings_do_not_match(server: Running, changed: dict[str, Any]) -> None:
    prompt = f"a purple sun {sorted(changed)}"
    server.generate(prompt)
    answer = settled(server).generate(prompt, **changed).json()
    assert answer["argus"][0]["steps_skipped"] == 0
    assert settled(server).generate(prompt, **changed).json()["argus"][0]["steps_skipped"] == 3


def test_several_pictures_differ_and_count_their_seeds_on(server: Running) -> None:
    for _ in range(2):  # the second time from the cache
        answer = settled(server).generate("an orange cup", n=3, seed=7)
        reports = answer.json()["argus"]
        assert [report["seed"] for report in reports] == [7, 8, 9]
        assert len({picture(answer, i).tobytes() for i in range(3)}) == 3
        used = [report["neighbour"]["entry"] for report in reports if "neighbour" in report]
        assert len(set(used)) == len(used)


def test_a_pinned_variant_is_run(server: Running) -> None:
    server.generate("a yellow moon")
    pinned = settled(server).generate("a yellow moon", model="tiny/skip-2").json()["argus"][0]
    assert (pinned["variant"], pinned["steps_skipped"]) == ("skip-2", 2)
    exact = server.generate("a yellow moon", model="tiny/exact").json()["argus"][0]
    assert (exact["variant"], exact["steps_skipped"]) == ("exact", 0)
    steps = server.generate("a yellow moon", num_inference_steps=4, argus={"exact": True}).json()[
        "argus"
    ][0]
    assert (steps["variant"], steps["steps_run"]) == ("steps-4", 4)
    quick = server.generate("a yellow moon", model="tiny/quick").json()["argus"][0]
    assert (quick["variant"], quick["steps_run"]) == ("quick", 3)


def test_a_pinned_skip_without_latents_is_served_exactly_and_says_so(server: Running) -> None:
    answer = server.generate("a moon", model="tiny/skip-2", argus={"cache": False}).json()
    assert answer["argus"][0]["variant"] == "exact"
    assert "no latents for the pinned skip-2" in answer["argus"][0]["reason"]


@pytest.mark.parametrize(("name", "form"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_pictures_come_in_the_format_asked_for(server: Running, name: str, form: str) -> None:
    assert picture(server.generate(output_format=name)).format == form


def test_a_url_serves_the_picture(server: Running) -> None:
    answer = server.generate(response_format="url", output_format="webp").json()
    url = answer["data"][0]["url"]
    assert url.startswith(server.url)
    got = server.http.get(url)
    assert got.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(got.content)).size == (32, 32)
    assert server.http.get(url.replace(".webp", ".png")).status_code == 404


def test_broken_latents_are_dropped_and_the_prompt_served_without(server: Running) -> None:
    server.generate("a dotted mushroom")
    folder = settled(server).service.settings.data / "latents"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    report = server.generate("a dotted mushroom").json()["argus"][0]
    assert report["steps_skipped"] == 0
    assert "unusable" in report["reason"]


def test_text_past_the_encoder_s_limit_is_said_to_be_cut(server: Running) -> None:
    long = "a fish " * 500
    (cut,) = server.generate(long).json()["argus"]
    assert (cut["prompt_truncated"], cut["negative_prompt_truncated"]) == (True, False)
    (cut,) = server.generate("a fish", negative_prompt=long).json()["argus"]
    assert (cut["prompt_truncated"], cut["negative_prompt_truncated"]) == (False, True)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 4001}, "prompt", "at most 4000 characters"),
        ({"prompt": 7}, "prompt", "valid string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": "2"}, "n", "valid integer"),
        ({"size": "33x32"}, "size", "from 16x16 to 64x64"),
        ({"size": "4096x4096"}, "size", "multiples of 8"),
        ({"size": "large"}, "size", "auto or WIDTHxHEIGHT"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"seed": -2}, "seed", "greater than or equal to -1"),
        ({"seed": MAX_SEED, "n": 2}, "seed", "pass"),
        ({"guidance_scale": 1, "negative_prompt": "fog"}, "negative_prompt", "above 1"),
        ({"guidance_scale": 101}, "guidance_scale", "less than or equal to 100"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 4, "model": "tiny/exact"}, "num_inference_steps", "one of"),
        ({"stream": True, "n": 2}, "n", "one picture at a time"),
        ({"stream": True, "response_format": "url"}, "stream", "as b64_json"),
        ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"argus": {"cash": False}}, "argus.cash", "the fields are cache"),
        ({"argus": {"cache": "no"}}, "argus.cache", "valid boolean"),
        ({"argus": {"slo": "gold"}}, "argus.slo", "the classes are default"),
        ({"argus": {"min_quality": 2}}, "argus.min_quality", "less than or equal to 1"),
        ({"argus": {"variant": "nosuch"}}, "argus.variant", "the variants are exact, skip-2"),
        ({"argus": {"variant": "quick"}, "model": "tiny/exact"}, "argus.variant", "one of"),
        ({"argus": {"variant": "quick", "min_quality": 0.5}}, "argus.min_quality", "pin"),
    ],
)  # fmt: skip
def test_bad_fields_are_named_with_what_would_be_right(
    server: Running, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = server.http.post("/v1/images/generations", json={"prompt": "a fish", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_missing_prompt_and_broken_json_are_refused(server: Running) -> None:
    post = server.http.post
    missing = post("/v1/images/generations", json={})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "prompt")
    json = {"content-type": "application/json"}
    broken = post("/v1/images/generations", content='{"prompt": ', headers=json)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    text = post("/v1/images/generations", content='{"prompt": "a fish"}')
    assert text.status_code == 400
    assert "Content-Type: application/json" in text.json()["error"]["message"]
    latin = post("/v1/images/generations", content=b'{"prompt": "\xe9"}', headers=json)
    assert (latin.status_code, latin.json()["error"]["code"]) == (400, "invalid_json")
    large = post("/v1/images/generations", json={"prompt": "x" * 2_000_000})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert server.http.get("/v1/images/generations").status_code == 405


def test_a_full_queue_is_answered_with_when_to_come_back(server: Running) -> None:
    many = server.generate(n=9)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "n")
    body = {"prompt": "a slow fish", "n": 8, "num_inference_steps": 900, "argus": {"exact": True}}
    holding = threading.Thread(target=ask_and_leave, args=(server, body))
    holding.start()
    wait_until(lambda: server.service.dispatcher.in_flight == 8)
    answer = server.generate()
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "queue_full"
    holding.join()
    wait_until(lambda: server.service.dispatcher.in_flight == 0)


def ask_and_leave(server: Running, body: dict[str, Any]) -> None:
    """Ask for more than can be made in a second, close the connection after it, and wait until the
    server has noticed."""
    left = server.metric("argus_requests_total", status="499")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=1.0)
    wait_until(lambda: server.metric("argus_requests_total", status="499") == left + 1)


def test_a_client_that_leaves_frees_its_work(server: Running) -> None:
    steps = server.metric("argus_steps_total", kind="run")
    left = server.metric("argus_requests_total", status="499")
    ask_and_leave(
        server,
        {"prompt": "an endless fish", "num_inference_steps": 900, "argus": {"exact": True}, "n": 8},
    )
    wait_until(lambda: server.service.dispatcher.in_flight == 0)
    assert server.generate(argus={"cache": False}).status_code == 200
    assert server.metric("argus_steps_total", kind="run") == steps + 6
    assert server.metric("argus_requests_total", status="499") == left + 1
