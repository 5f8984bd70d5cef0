"""A server in front of other image servers: two with the APIs of vLLM-Omni and SGLang, or another
Argus. Every request is accounted for, whatever fails."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from argus.config import Settings, Upstream
from argus.core.errors import BadRequest
from argus.core.profile import ModelProfile, Profile
from argus.engine.sources import family_fingerprint
from argus.families.catalog import read_family
from argus.server.model import ServedFamily
from tests.conftest import constant_predictor
from tests.faults.harness import Load
from tests.server.running import Running, running, wait_until
from tests.workers.upstreams import Upstream as Server
from tests.workers.upstreams import picture, upstream

STEP_S = 0.01
LARGE, SMALL = "acme/large", "acme/small"


@pytest.fixture
def family(tiny_sd: Path, tmp_path: Path) -> Path:
    """Two models that only upstreams have; measured, with a predictor that knows their means."""
    file = tmp_path / "gateway.yaml"
    file.write_text(
        f"""
        name: gateway
        description: Models of other servers.
        models: {{large: upstream, small: upstream}}
        exact: {{model: large, sampler: default, width: 64, height: 64, steps: 10, guidance: 3}}
        variants:
          steps-5: {{steps: 5, extra: {{flow_shift: 2.0}}}}
          small: {{model: small}}
        encoder: {tiny_sd}
        """
    )
    large = ModelProfile(
        step_s={1: STEP_S, 2: 1.5 * STEP_S, 4: 2.5 * STEP_S}, decode_s={1: 0.02, 4: 0.04},
        encode_s=0.0, picture_s=0.0, load_s={"disk": 0.0, "page_cache": 0.0}, peak_bytes=0,
    )  # fmt: skip
    small = replace(large, step_s={b: s / 4 for b, s in large.step_s.items()})
    profile = Profile(
        "gateway", {"device": "upstream"}, 64, 64, {}, {"large": large, "small": small}
    )  # fmt: skip
    (tmp_path / "profile.json").write_text(json.dumps(profile.to_json()))
    quality = {"exact": 1.0, "steps-5": 0.9, "small": 0.7}
    constant_predictor(family_fingerprint(read_family(file)), quality).save(tmp_path / "predictor")
    return file


def settings(family: Path, *upstreams: Upstream, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "family": str(family),
        "data": family.parent / "data",
        "slo": {"default": {"latency": "20s"}},
        "truth_share": 0.0,
        "upstreams": list(upstreams),
    }
    return Settings(**(given | more))


def large(server: Server, **more: Any) -> Upstream:
    return Upstream(url=server.url, model="large", served_model=LARGE, concurrency=4, **more)


def small(server: Server, **more: Any) -> Upstream:
    return Upstream(url=server.url, model="small", concurrency=2, **more)


@contextmanager
def twins(family: Path) -> Iterator[tuple[Running, Server, Server]]:
    """A gateway in front of two servers of the exact model, and one of the other."""
    with (
        upstream("vllm-omni", model=LARGE, step_s=STEP_S, batch=4) as one,
        upstream("vllm-omni", model=LARGE, step_s=STEP_S, batch=4) as two,
        upstream("sglang", model=SMALL, step_s=STEP_S / 4) as other,
        running(settings(family, large(one), large(two), small(other))) as gateway,
    ):
        yield gateway, one, two


def shown(body: dict[str, Any]) -> NDArray[np.uint8]:
    """The pixels (height, width, 3) of an answer's picture."""
    file = io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))
    return np.asarray(Image.open(file).convert("RGB"))


def test_two_servers_are_one_family(family: Path) -> None:
    with (
        upstream("vllm-omni", model=LARGE, step_s=STEP_S) as one,
        upstream("sglang", model=SMALL, step_s=STEP_S / 4) as two,
        running(
            settings(family, large(one, cost_per_hour=7.2), small(two, cost_per_hour=3.6))
        ) as gateway,
    ):
        assert gateway.service.policy == "price"
        exact = gateway.generate("a fish", seed=5, model="gateway/exact").json()
        assert np.array_equal(shown(exact), np.asarray(picture("a fish", 5, 10, 64, 64)))
        report = exact["argus"][0]
        assert report["cost"] == pytest.approx(report["gpu_seconds"] * 7.2 / 3600, rel=0.01)
        gateway.generate("a fish", seed=5, model="gateway/steps-5")
        asked = one.report()["seen"][-1]
        assert (asked["num_inference_steps"], asked["flow_shift"]) == (5, 2.0)
        cheaper = gateway.generate("a fish", seed=5, model="gateway/small").json()
        assert cheaper["argus"][0]["model"] == "small"
        assert two.report()["seen"][-1]["prompt"] == "a fish"
        sizes = gateway.generate("a fish", size="96x64").json()
        assert shown(sizes).shape == (64, 96, 3)
        wait_until(lambda: "argus_upstream_requests" in gateway.http.get("/metrics").text)
        refused = gateway.generate("a fish", model="gateway/exact", guidance_scale=30)
        assert refused.status_code == 400
        assert "Input should be from 0 to 20" in refused.json()["error"]["message"]


def test_a_smaller_picture_is_enlarged_to_what_was_asked_for(family: Path) -> None:
    family.write_text(family.read_text().replace("small: {model: small}", "half: {scale: 0.5}"))
    with (
        upstream("vllm-omni", model=LARGE, step_s=STEP_S) as one,
        running(settings(family, large(one))) as gateway,
    ):
        half = gateway.generate("a fish", seed=5, model="gateway/half").json()
        assert one.report()["seen"][-1]["size"] == "32x32"
        assert shown(half).shape == (64, 64, 3)
        assert half["argus"][0]["painted_at"] == "32x32"
        wide = gateway.generate("a fish", size="96x64", model="gateway/half").json()
        assert one.report()["seen"][-1]["size"] == "48x32"
        assert shown(wide).shape == (64, 96, 3)
        assert (
            "painted_at" not in gateway.generate("a cup", model="gateway/exact").json()["argus"][0]
        )


def test_no_request_is_lost_when_a_server_is_killed_under_load(family: Path) -> None:
    with twins(family) as (gateway, one, _):
        with Load(gateway, count=60, per_second=20) as load:
            wait_until(lambda: len(one.report()["seen"]) > 10)
            one.kill()
        assert load.account() == {"on time": 60}
        one.start_again()
        wait_until(lambda: restarts(gateway, "0") == 1)
        assert gateway.generate().status_code == 200


def restarts(gateway: Running, worker: str) -> float:
    gateway.http.get("/metrics")  # which updates the gauges
    return gateway.metric("argus_worker_restarts_total", worker=worker)


def test_what_a_hung_server_has_is_made_by_the_other_in_time(family: Path) -> None:
    with twins(family) as (gateway, one, _):
        for _ in range(4):
            gateway.generate(argus={"variant": "exact"})
        with Load(gateway, count=40, per_second=20) as load:
            wait_until(lambda: one.report()["running"] > 0)
            one.control(mode="hang")
        assert load.account() == {"on time": 40}


def test_what_a_server_fails_at_is_made_by_the_other(family: Path) -> None:
    with twins(family) as (gateway, one, two):
        one.control(mode="fail")
        with Load(gateway, count=30, per_second=20, argus={"variant": "exact"}) as load:
            pass
        assert load.account() == {"on time": 30}
        two.control(mode="fail")
        answer = gateway.generate(argus={"variant": "exact"})
        assert answer.status_code in (500, 503)
        assert "made no picture" in answer.json()["error"]["message"]
        assert "Internal Server Error" in answer.json()["error"]["message"]


def test_a_busy_server_s_requests_go_to_the_other(family: Path) -> None:
    with twins(family) as (gateway, one, _):
        one.control(mode="full")
        with Load(gateway, count=30, per_second=20, argus={"variant": "exact"}) as load:
            pass
        assert load.account() == {"on time": 30}


@pytest.mark.cluster
def test_another_argus_is_an_upstream(family: Path, tiny_family: Path, tmp_path: Path) -> None:
    behind = Settings(family=str(tiny_family), data=tmp_path / "behind", workers=2)
    with running(behind) as second:
        front = Upstream(
            url=second.url, model="large", health="/ready", concurrency=4,
            extra={"argus": {"exact": True}},
        )  # fmt: skip
        other = Upstream(
            url=second.url, model="small", health="/ready", served_model="tiny/other",
            fields={"num_inference_steps": None, "guidance_scale": None},
        )  # fmt: skip
        text = family.read_text().replace("width: 64, height: 64", "width: 32, height: 32")
        family.write_text(text)
        (family.parent / "profile.json").unlink()  # it was measured elsewhere
        with running(settings(family, front, other)) as gateway:
            made = gateway.generate("a cup", seed=2, model="gateway/exact").json()
            own = second.generate(
                "a cup", seed=2, num_inference_steps=10, guidance_scale=3, argus={"exact": True}
            ).json()
            assert np.array_equal(shown(made), shown(own))
            assert gateway.generate("a cup", model="gateway/small").status_code == 200


def test_a_model_of_ours_and_an_upstream_s_are_mixed(
    family: Path, tiny_sd: Path, tmp_path: Path
) -> None:
    text = family.read_text().replace("small: upstream", f"small: {tiny_sd}")
    family.write_text(text.replace("width: 64, height: 64", "width: 32, height: 32"))
    with (
        upstream("vllm-omni", model=LARGE, step_s=STEP_S, batch=4) as server,
        running(settings(family, large(server), workers=1)) as gateway,
    ):
        workers = {gateway.generate("a cup", model=f"gateway/{name}").json()["argus"][0]["worker"]
                   for name in ("exact", "small")}  # fmt: skip
        assert workers == {0, 1}
        assert len(server.report()["seen"]) >= 2  # a trial at the start, and the exact one


@pytest.mark.parametrize(
    ("upstreams", "says"),
    [
        ([], "No upstream holds 'large'"),
        (["large"], "No upstream holds 'small'.*with model: small"),
        (["large", "small", "huge"], "holds 'huge'; the models are large, small"),
    ],
)
def test_upstreams_that_cannot_serve_the_family_are_said(
    family: Path, upstreams: list[str], says: str
) -> None:
    held = [Upstream(url="http://here", model=model) for model in upstreams]
    with pytest.raises(BadRequest, match=says):
        ServedFamily.of(settings(family, *held))


def test_an_upstream_cannot_hold_a_model_whose_latents_are_resumed(
    tiny_family: Path, tmp_path: Path
) -> None:
    asked = Settings(
        family=str(tiny_family), data=tmp_path, upstreams=[Upstream(url="http://here")]
    )  # fmt: skip
    with pytest.raises(BadRequest, match=r"whose latents tiny resumes.*Leave skips out"):
        ServedFamily.of(asked)
