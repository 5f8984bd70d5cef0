"""Measuring a family through the servers that hold its models."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from argus.config import Upstream, read_settings
from argus.core.errors import BadRequest
from argus.core.family import EXACT
from argus.core.job import Job
from argus.families.catalog import read_family
from argus.lab.calibration import Calibration, calibrate
from argus.lab.gateway import Gateway, profile_upstreams
from argus.lab.painting import Commission
from argus.workers.worker import WorkerError
from tests.cli.running import run
from tests.server.running import running
from tests.workers.upstreams import Upstream as Server
from tests.workers.upstreams import picture, upstream

JOBS = [Commission(n, Job(f"{n} fish", seed=n, steps=2, width=32, height=32)) for n in range(12)]


@pytest.fixture
def family(tiny_sd: Path, tmp_path: Path) -> Path:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        f"""
        name: gateway
        description: Models of other servers.
        models: {{large: upstream, small: upstream}}
        exact: {{model: large, sampler: default, width: 32, height: 32, steps: 12, guidance: 3}}
        variants:
          steps-6: {{steps: 6}}
          small: {{model: small, steps: 5}}
        scorer: {{kind: "tests.workers.upstreams:PatternScorer"}}
        encoder: {tiny_sd}
        """
    )
    return file


@contextmanager
def two_servers(step_s: float = 0.002) -> Iterator[tuple[Server, Server]]:
    with (
        upstream("vllm-omni", model="acme/large", step_s=step_s, batch=4) as one,
        upstream("sglang", model="acme/small", step_s=step_s / 2) as two,
    ):
        yield one, two


def held(server: Server, concurrency: int = 4) -> Upstream:
    return Upstream(url=server.url, concurrency=concurrency)


def test_pictures_are_made_at_all_servers_at_once_and_elsewhere_where_one_fails() -> None:
    with two_servers() as (one, two):
        two.control(mode="fail")
        gateway = Gateway([held(one), held(two)])
        try:
            made = {commission.of: made.image for commission, made in gateway.paint(JOBS)}
            assert sorted(made) == list(range(12))
            assert np.array_equal(np.asarray(made[3]), np.asarray(picture("3 fish", 3, 2, 32, 32)))
            assert one.report()["most"] == 4
            one.control(mode="fail")
            with pytest.raises(WorkerError, match="made no picture"):
                list(gateway.paint(JOBS))
        finally:
            gateway.close()


def test_what_a_server_refuses_is_said() -> None:
    with upstream("vllm-omni") as server:
        gateway = Gateway([held(server)])
        with pytest.raises(BadRequest, match="from 1 to 200"):
            list(gateway.paint([Commission(0, Job("a fish", steps=300))]))
        gateway.close()
    with pytest.raises(WorkerError, match=r"No upstream works.*cannot be reached"):
        Gateway([held(server)])


def test_a_profile_is_by_the_number_of_requests_in_flight(family: Path) -> None:
    with two_servers(step_s=0.02) as (one, two):
        servers = {"large": [held(one)], "small": [held(two, concurrency=2)]}
        found = profile_upstreams(read_family(family), servers, (1, 2, 4, 8), repeats=1)
        assert list(found.models["large"].step_s) == [1, 2, 4]
        assert list(found.models["small"].step_s) == [1, 2]
        assert all(s > 0 for model in found.models.values() for s in model.step_s.values())
        assert found.device["device"] == "upstream"
        assert {body["num_inference_steps"] for body in one.report()["seen"]} == {12, 4}
        assert (one.report()["most"], two.report()["most"]) == (4, 2)


def test_a_calibration_through_upstreams_goes_on_where_it_was_stopped(
    family: Path, tmp_path: Path
) -> None:
    prompts = tuple(f"{n} fish" for n in range(20))
    with two_servers() as (one, two):
        asked = Calibration(
            read_family(family), prompts, (), 1, "cpu", "float32",
            {"large": [held(one)], "small": [held(two)]},
        )  # fmt: skip
        two.control(mode="fail")
        with pytest.raises(WorkerError):
            calibrate(asked, tmp_path / "quality.parquet")
        seen = len(one.report()["seen"])
        two.control(mode="ok")
        found = calibrate(asked, tmp_path / "quality.parquet")
        assert len(one.report()["seen"]) == seen == 40
        means = found.groupby("variant")["quality"].mean()
        assert means[EXACT] == pytest.approx(1.0)
        assert means["small"] < means["steps-6"] < 1.0


@pytest.mark.cluster
def test_a_gateway_is_measured_trained_and_then_routes_by_predictions(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    words = "red blue small old bright quiet green tall fish house tree boat".split()  # noqa: SIM905
    lines = [" ".join(rng.choices(words, k=rng.randint(2, 14))) for _ in range(64)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    text = family.read_text()
    family.write_text(text[: text.index("encoder:")])  # the default one, which tells lengths apart
    with two_servers(step_s=0.01) as (one, two):
        config = tmp_path / "config.yaml"
        config.write_text(
            f"""
            family: {family}
            data: {tmp_path / "data"}
            truth_share: 0
            slo: {{default: {{latency: 20s}}}}
            quality_levels: {{cheap: {{cheapest: true}}}}
            upstreams:
              - {{url: {one.url}, model: large, served_model: acme/large, concurrency: 4}}
              - {{url: {two.url}, model: small, concurrency: 2}}
            """
        )
        through = ["--config", str(config)]

        def argus(*arguments: str) -> None:
            assert run(monkeypatch, *arguments) == 0

        argus("profile", str(family), *through, "-o", str(tmp_path / "profile.json"),
              "--batches", "1,2,4", "--repeats", "2")  # fmt: skip
        argus("calibrate", str(family), *through, "-o", str(tmp_path / "quality.parquet"),
              "--prompts", str(tmp_path / "prompts.txt"))  # fmt: skip
        argus("train", str(family), "-o", str(tmp_path / "predictor"))
        with running(read_settings({}, config)[0]) as gateway:
            assert gateway.service.policy == "price"
            prompts = "red fish", max(lines, key=len)  # noise that is lost soon, and late
            short, long = (
                gateway.generate(prompt, model="gateway/small").json()["argus"][0]["quality_bound"]
                for prompt in prompts
            )
            assert short > long + 0.1
            made = [
                gateway.generate(
                    prompt, quality="cheap", argus={"min_quality": (short + long) / 2}
                ).json()["argus"][0]["variant"]
                for prompt in prompts
            ]
            assert made[0] == "small" != made[1]
    assert json.loads((tmp_path / "profile.json").read_text())["family"] == "gateway"
