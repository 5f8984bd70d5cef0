"""What clients of other servers send, and what it means here."""

from __future__ import annotations

import base64
import io
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from argus.config import QualityLevel, Settings, SloClass
from argus.core.errors import BadRequest
from argus.core.family import Sizes
from argus.families.catalog import find_family
from argus.server.asked import image_request, size_of
from argus.server.errors import ApiError
from argus.server.request import ImageRequest
from argus.server.schema import GenerationRequest
from argus.server.service import Service
from tests.server.running import Running, running, wait_until


@pytest.fixture(scope="module")
def family(measured_family: Path) -> Path:
    """`tiny`, which resizes, beside its profile and predictor."""
    file = measured_family.with_name("resizing.yaml")
    sizes = "sizes: {native: [32x32, 32x48], other: resize, limit: 512}\n"
    file.write_text(textwrap.dedent(measured_family.read_text()) + sizes)
    return file


@pytest.fixture(scope="module")
def argus(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        family=str(family),
        data=tmp_path_factory.mktemp("asked"),
        workers=1,
        slo={"default": SloClass(latency="30s")},
        served_model_names=["dall-e-3"],
        quality_levels={"thrifty": QualityLevel(least=0.65, cheapest=True)},
        truth_share=0.0,
    )
    with running(settings) as server:
        yield server


def made(server: Running, prompt: str, **fields: Any) -> dict[str, Any]:
    answer = server.generate(prompt, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["argus"][0])


def test_the_steps_that_most_clients_send_change_nothing(argus: Running) -> None:
    report = made(argus, "a usual fish", num_inference_steps=50, guidance_scale=3.0)
    assert (report["variant"], report["steps_run"]) == ("exact", 6)
    assert report["reason"] == "worth most at today's prices"
    assert "steps_limit" not in report


def test_fewer_steps_are_a_ceiling_below_which_argus_decides(argus: Running) -> None:
    report = made(argus, "a hasty fish", num_inference_steps=4, argus={"cache": False})
    assert (report["variant"], report["steps_run"]) == ("exact", 4)
    assert report["steps_limit"] == 4
    assert report["predicted_quality"] == 1  # beside the picture of 4 steps
    made(argus, "zzz", num_inference_steps=4)
    wait_until(lambda: argus.service.retrieval.storing == 0)
    entries = len(argus.service.cache)
    made(argus, "zzz", num_inference_steps=4, seed=1)  # resumes, or is exact with four steps
    wait_until(lambda: argus.service.retrieval.storing == 0)
    assert len(argus.service.cache) == entries  # a run of four steps leaves no latents
    new = {"quality": "thrifty", "argus": {"cache": False}}
    cheap = made(argus, "a hasty bird", num_inference_steps=4, **new)
    assert (cheap["variant"], cheap["steps_run"]) == ("quick", 3)
    assert cheap["predicted_quality"] == 0.8  # four of six steps may be as good as six
    same = made(argus, "a hasty cat", num_inference_steps=3, argus={"cache": False})
    assert (same["steps_run"], same["predicted_quality"]) == (3, 1)
    assert cheap["saved_ms"] < made(argus, "a slow bird", **new)["saved_ms"]


def test_who_means_the_exact_model_says_so(argus: Running) -> None:
    report = made(argus, "an exact fish", num_inference_steps=9, argus={"exact": True})
    assert (report["steps_run"], report["model"]) == (9, "tiny")
    assert report["reason"] == "the request pins the number of steps"
    report = made(argus, "an exact fish", argus={"exact": True})
    assert (report["variant"], report["reason"]) == ("exact", "the request pins this variant")
    report = made(argus, "a pinned fish", model="tiny/quick", num_inference_steps=50, quality="hd")
    assert (report["variant"], report["steps_run"]) == ("quick", 3)


def test_what_languages_without_integers_and_other_programs_send_is_understood(
    argus: Running,
) -> None:
    report = made(argus, "a lua fish", num_inference_steps=30.0, seed=-1, n=1.0)
    assert report["steps_run"] == 6
    assert made(argus, "a lua fish", num_inference_steps=30, seed=-1)["seed"] != report["seed"]
    made(argus, "a patient fish", num_inference_steps=5000)
    answer = argus.generate("a fish", num_inference_steps=5000, argus={"exact": True})
    assert "at most 1000 can be pinned" in answer.json()["error"]["message"]
    assert argus.generate("a fish", num_inference_steps=30.5).status_code == 400


def asked(service: Service, **fields: Any) -> ImageRequest:
    return image_request(service, GenerationRequest(prompt="a fish", **fields), "everyone")


@pytest.mark.parametrize(
    ("meaning", "steps", "pinned", "most"),
    [
        ("ceiling", 4, None, 4),
        ("ceiling", 6, None, None),
        ("ceiling", 50, None, None),
        ("ceiling", None, None, None),
        ("pin", 4, 4, None),
        ("pin", 50, 50, None),
        ("ignore", 4, None, None),
    ],
)
def test_a_setting_says_what_steps_mean(
    family: Path, tmp_path: Path, meaning: Any, steps: int, pinned: int | None, most: int | None
) -> None:
    service = Service(Settings(family=str(family), data=tmp_path, client_steps=meaning))
    assert asked(service, num_inference_steps=3, model="tiny/quick").pinned_steps == 3
    skipping = asked(service, num_inference_steps=4, argus={"variant": "skip-2"})
    assert skipping.pinned_variant == "skip-2"  # which runs four of six
    request = asked(service, num_inference_steps=steps)
    assert (request.pinned_steps, request.most_steps) == (pinned, most)
    exactly = asked(service, num_inference_steps=steps, argus={"exact": True})
    assert exactly.pinned
    assert exactly.pinned_steps == steps


def test_quality_is_what_a_picture_must_be_worth(argus: Running) -> None:
    known = {
        "auto": 0, "standard": 0, "low": 0.75, "fast": 0.75, "medium": 0.9, "high": 0.98,
        "hd": 0.98, "lossless": 1, "thrifty": 0.65,
    }  # fmt: skip
    for name, least in known.items():
        request = asked(argus.service, quality=name)
        assert request.least_quality == least
        assert request.cheapest == (name in ("low", "fast", "thrifty"))
    assert asked(argus.service, quality="low", argus={"min_quality": 0.8}).least_quality == 0.8
    answer = argus.generate("a good fish", quality="hd").json()
    assert answer["quality"] == "hd"
    assert answer["argus"][0]["quality_bound"] >= 0.98
    thrifty = made(argus, "a cheap fish", quality="thrifty", argus={"cache": False})
    assert thrifty["variant"] == "quick"  # also while workers are idle
    assert thrifty["quality_bound"] >= 0.65


def test_without_a_predictor_only_high_quality_is_a_promise(
    tiny_family: Path, tmp_path: Path
) -> None:
    service = Service(Settings(family=str(tiny_family), data=tmp_path))
    for name in ("low", "fast", "medium"):
        request = asked(service, quality=name)
        assert (request.least_quality, request.cheapest) == (0, False)
    assert asked(service, quality="high").least_quality == 0.98


def test_other_sizes_are_resized_from_a_native_one(argus: Running) -> None:
    large = argus.generate("a large fish", size="512x512", seed=1)
    assert large.json()["size"] == "512x512"
    assert large.json()["argus"][0]["painted_at"] == "32x32"
    small = argus.generate("a large fish", seed=1, argus={"cache": False})
    assert "painted_at" not in small.json()["argus"][0]
    shown, painted = picture(large), picture(small)
    assert shown.size == (512, 512)
    back = shown.resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(back, int) - np.asarray(painted, int)).mean() < 16
    assert argus.generate(size="512x512", n=4).status_code == 200
    many = argus.generate(size="512x512", n=5)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "n")
    assert "too many pixels" in many.json()["error"]["message"]
    tall = argus.generate("a tall fish", size="100x150").json()
    assert (tall["size"], tall["argus"][0]["painted_at"]) == ("100x150", "32x48")


def picture(answer: Any) -> Image.Image:
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_the_native_size_nearest_in_shape_is_made() -> None:
    sizes = Sizes(((64, 64), (64, 96), (96, 64), (128, 128)), 2048)
    assert sizes.nearest(1024, 1024) == (128, 128)
    assert sizes.nearest(70, 70) == (64, 64)
    assert sizes.nearest(1024, 1536) == (64, 96)
    assert sizes.nearest(1792, 1024) == (96, 64)
    assert sizes.nearest(64, 80) == (64, 96)


def test_previews_are_sent_at_the_size_that_is_painted(argus: Running) -> None:
    client = openai.OpenAI(base_url=f"{argus.url}/v1", api_key="any")
    events = list(
        client.images.generate(
            prompt="a fish", size="512x512", stream=True, partial_images=2,
            extra_body={"argus": {"exact": True}},
        )
    )  # fmt: skip
    assert [event.size for event in events] == ["32x32", "32x32", "512x512"]
    shown = [Image.open(io.BytesIO(base64.b64decode(str(event.b64_json)))) for event in events]
    assert [image.size for image in shown] == [(32, 32), (32, 32), (512, 512)]


@pytest.mark.parametrize("size", ["513x512", "0x32", "512", "x", "-1x5"])
def test_sizes_over_the_limit_are_refused(argus: Running, size: str) -> None:
    answer = argus.generate(size=size)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")
    assert "from 1 to 512" in answer.json()["error"]["message"]


def test_real_families_refuse_what_is_far_from_their_size() -> None:
    family = find_family("sdxl")
    assert size_of(family, "auto") == (1024, 1024)
    assert size_of(family, "768x1344") == (768, 1344)
    with pytest.raises(ApiError, match="multiples of 8, from 512x512 to 2048x2048"):
        size_of(family, "64x64")


def test_a_served_name_stands_for_the_family(argus: Running) -> None:
    client = openai.OpenAI(base_url=f"{argus.url}/v1", api_key="any")
    assert client.models.retrieve("dall-e-3").id == "dall-e-3"
    assert "dall-e-3" in [model.id for model in client.models.list()]
    answer = client.images.generate(prompt="a fish", model="dall-e-3", style="vivid", quality="hd")
    assert answer.data and answer.data[0].url  # as OpenAI answers for a DALL·E
    assert httpx.get(answer.data[0].url).headers["content-type"] == "image/png"
    inline = argus.generate("a fish", model="dall-e-3", response_format="b64_json").json()
    assert "b64_json" in inline["data"][0]
    assert answer.usage is not None
    with pytest.raises(openai.NotFoundError, match="the models are tiny"):
        client.models.retrieve("gpt-image-1")


@pytest.mark.parametrize("name", ["tiny", "tiny/quick"])
def test_a_served_name_does_not_hide_the_family_s_own(
    family: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(BadRequest, match=f"served_model_names has '{name}'"):
        Service(Settings(family=str(family), data=tmp_path, served_model_names=[name]))


def test_unknown_fields_are_ignored_and_named(argus: Running) -> None:
    fields = {"true_cfg_scale": 4.0, "enable_teacache": True, "seed": 3}
    answer = argus.generate("an unknown fish", **fields).json()
    assert answer["ignored_fields"] == ["enable_teacache", "true_cfg_scale"]
    assert "ignored_fields" not in argus.generate("a known fish").json()
    many = argus.generate("a fish", **{f"{number}" + 100 * "x": 1 for number in range(100)})
    names = many.json()["ignored_fields"]
    assert (len(names), {len(name) for name in names}) == (32, {64})
    assert answer["id"] != argus.generate("an unknown fish", **fields).json()["id"]


def test_unknown_fields_can_be_refused(family: Path, tmp_path: Path) -> None:
    service = Service(Settings(family=str(family), data=tmp_path, unknown_fields="refuse"))
    with pytest.raises(ApiError, match="stepps: there is no such field; the fields are prompt"):
        asked(service, stepps=4)


def test_a_file_is_answered_as_itself(argus: Running) -> None:
    one = argus.generate("a filed fish", response_format="file", output_format="webp")
    assert one.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(one.content)).format == "WEBP"
    two = argus.generate("a filed fish", response_format="file", n=2)
    assert two.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(two.content)) as archive:
        assert archive.namelist() == ["image_0.png", "image_1.png"]
        assert Image.open(archive.open("image_1.png")).size == (32, 32)
