"""What Argus decides for a request, and what a request or an operator may decide instead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from argus.config import Settings, SloClass, read_settings
from argus.core.errors import BadRequest, ModelError
from argus.server.keys import add_key
from argus.server.samples import Sample, Samples
from argus.server.service import Service
from tests.server.running import Running, running, wait_until


def settings(family: Path, data: Path, **more: object) -> Settings:
    return Settings(family=str(family), data=data, workers=2, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def argus(measured_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with `price`, two workers and a class with a floor."""
    data = tmp_path_factory.mktemp("argus")
    classes = {"default": SloClass(latency="30s"), "fine": SloClass(latency="40s", quality=0.85)}
    with running(settings(measured_family, data, slo=classes, truth_share=1.0)) as server:
        yield server


def test_a_measured_family_is_served_by_price_and_says_what_it_knew(argus: Running) -> None:
    made = argus.generate("a green fish").json()["argus"][0]
    assert argus.service.policy == "price"
    assert made["variant"] == "exact"  # an idle worker's second costs nothing
    assert (made["predicted_quality"], made["quality_bound"], made["price"]) == (1.0, 1.0, 0.0)
    assert (made["slo"], made["deadline_ms"], made["on_time"]) == ("default", 30000, True)
    assert made["saved_ms"] == 0


def test_a_class_of_promises_is_asked_for_by_name(argus: Running) -> None:
    made = argus.generate("a fine fish", argus={"slo": "fine"}).json()["argus"][0]
    assert (made["slo"], made["deadline_ms"]) == ("fine", 40000)
    assert argus.metric("argus_outcomes_total", slo="fine", outcome="on time") >= 1


def test_a_pin_is_kept_even_if_a_worker_must_change_its_model(argus: Running) -> None:
    made = argus.generate("a pinned fish", argus={"variant": "other"}).json()["argus"][0]
    assert (made["variant"], made["model"]) == ("other", "other")
    assert made["saved_ms"] > 0
    text = argus.http.get("/metrics").text
    assert "argus_model_loads_total 1.0" in text
    assert text.count('model="tiny",worker') + text.count(',model="tiny"} 1.0') >= 1
    still = argus.generate("an exact fish", argus={"variant": "exact"}).json()["argus"][0]
    assert still["model"] == "tiny"


def test_a_larger_picture_gets_as_much_more_time(argus: Running) -> None:
    made = argus.generate("a large fish", size="64x64").json()["argus"][0]
    assert made["deadline_ms"] == 4 * 30000


def test_served_pictures_are_measured_while_workers_idle(argus: Running) -> None:
    argus.generate("a measured fish", argus={"variant": "other"})
    url = f"sqlite:///{argus.service.settings.data / 'catalogue.db'}"
    samples, made_for = Samples(url), argus.service.model.made_for
    wait_until(lambda: "a measured fish" in set(samples.read(made_for)["prompt"]))
    assert argus.metric("argus_measured_quality_count", variant="other") >= 1
    rows = samples.read(made_for)
    last = rows[rows["prompt"] == "a measured fish"].iloc[-1]
    assert last["variant"] == "other"
    assert last["predicted"] == pytest.approx(0.7, abs=1e-4)
    assert last["quality"] == pytest.approx(1 + (last["score"] - last["s_exact"]) / 0.2, abs=1e-4)


def test_a_predictor_that_is_off_is_trained_anew_and_swapped(argus: Running) -> None:
    service = argus.service
    samples = Samples(f"sqlite:///{service.settings.data / 'catalogue.db'}")
    for n in range(60):
        samples.add(
            Sample("everyone", f"a fish number {n}", "other", n, None, None, 0.1, 0.2, 0.2, 0.7,
                   0.6, service.model.made_for, time.time())
        )  # fmt: skip
    service.loop.call_soon_threadsafe(lambda: service.learning.retrain("a test asks for it"))

    def accepted() -> bool:
        return argus.metric("argus_retrainings_total", result="accepted") == 1

    wait_until(accepted, limit_s=900.0)  # the training gives way to all else
    told = argus.generate("a fish number 7", argus={"variant": "other"}).json()["argus"][0]
    assert told["predicted_quality"] == pytest.approx(0.2, abs=0.15)


def test_a_floor_keeps_to_variants_whose_bound_meets_it(
    measured_family: Path, tmp_path: Path
) -> None:
    # Everybody takes the fastest variant there is for clipper-ht, but for whom that is too little.
    with running(settings(measured_family, tmp_path, slo={"default": SloClass(latency="60s")},
                          policy="price")) as server:  # fmt: skip
        router = server.service.router
        assert router is not None
        with ThreadPoolExecutor(40) as together:
            fields = {"argus": {"min_quality": 0.85}}
            floored = list(
                together.map(lambda n: server.generate(f"fish {n}", **fields), range(40))
            )
        made = [one.json()["argus"][0] for one in floored if one.status_code == 200]
        assert made
        assert {one["variant"] for one in made} <= {"exact", "skip-2"}
        assert all(one["quality_bound"] >= 0.85 for one in made)


def test_what_cannot_be_in_time_is_shed_with_when_to_come_back(
    measured_family: Path, tmp_path: Path
) -> None:
    tight = {"default": SloClass(latency="1.2x")}
    with running(settings(measured_family, tmp_path, slo=tight, window_s=1.0)) as server:
        with ThreadPoolExecutor(60) as together:
            answers = list(together.map(lambda n: server.generate(f"fish {n}"), range(60)))
        shed = [one for one in answers if one.status_code == 429]
        assert shed
        assert {one.json()["error"]["code"] for one in shed} == {"shed"}
        assert all(int(one.headers["retry-after"]) >= 1 for one in shed)
        counted = sum(
            server.metric("argus_outcomes_total", slo="default", outcome=outcome)
            for outcome in ("on time", "late", "shed", "dropped", "failed")
        )
        assert counted == 60
        # Once nobody waits, even a promise that cannot be kept is no reason to refuse.
        # (A machine that is busy with something else may still be too late with the first ones.)
        wait_until(lambda: server.service.fleet.idle)
        last: list[int] = []
        while 200 not in last and len(last) < 50:
            last.append(server.generate("a last fish").status_code)
        assert last[-1] == 200
        assert 429 not in last


def test_where_nobody_waits_late_is_better_than_refused_and_moves_no_model(
    measured_family: Path, tmp_path: Path
) -> None:
    hasty = {"default": SloClass(latency="0.001s")}
    with running(settings(measured_family, tmp_path, slo=hasty)) as server:
        server.service.fleet.move([1, 1])
        wait_until(lambda: server.service.fleet.cluster().models == [1, 1])
        made = server.generate("a hasty fish").json()["argus"][0]
        assert (made["variant"], made["on_time"]) == ("other", False)
        assert "no other request waits" in made["reason"]
        assert server.service.fleet.targets == [1, 1]


def test_keys_have_classes(measured_family: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    key = add_key(file, "alice")
    classes = {"patient": SloClass(latency="50s", keys=("alice",))}
    given = settings(measured_family, tmp_path, slo=classes, api_key_file=file)
    with running(given, {"Authorization": f"Bearer {key}"}) as server:
        assert server.generate("a fish").json()["argus"][0]["slo"] == "patient"


def test_in_shadow_everything_is_exact_and_what_would_have_been_is_told(
    measured_family: Path, tmp_path: Path
) -> None:
    given = settings(measured_family, tmp_path, shadow=True, policy="clipper-ht", window_s=0.2)
    with running(given) as server:
        router = server.service.router
        assert router is not None
        wait_until(lambda: bool(router.planning._planned))
        made = server.generate("a shadowy fish").json()["argus"][0]
        assert made["variant"] == "exact"
        assert "shadow: Argus would have made other, of predicted quality 0.70" in made["reason"]
        assert server.service.fleet.loads == 0
        text = server.http.get("/metrics").text
        assert "argus_shadow_pictures_total" in text


def test_a_dead_latent_store_is_not_asked_and_found_again(
    measured_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(measured_family, tmp_path, slo={"default": SloClass(latency="30s")})
    with running(given) as server:
        retrieval, cache = server.service.retrieval, server.service.cache

        def resumed() -> dict[str, object]:
            pinned = {"argus": {"variant": "skip-3"}}
            answer: dict[str, object] = server.generate("a dead fish", **pinned).json()["argus"][0]
            return answer

        server.generate("a dead fish")
        wait_until(lambda: not retrieval.storing)
        assert resumed()["steps_skipped"] == 3
        asked = []

        def dead(*_: object) -> None:
            asked.append(1)
            raise OSError("the store is gone")

        with monkeypatch.context() as broken:
            broken.setattr(cache, "fetch", dead)
            broken.setattr(cache, "probe", dead)
            for _ in range(8):
                assert resumed()["variant"] == "exact"
            assert retrieval.shut
            assert len(asked) < 8
            assert retrieval.usable == 0
        wait_until(lambda: retrieval.usable > 0.05)  # though no request needs it
        assert resumed()["steps_skipped"] == 3
        assert not retrieval.shut


def test_what_a_policy_needs_is_asked_for_before_anything_starts(
    tiny_family: Path, measured_family: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="argus train"):
        Service(settings(tiny_family, tmp_path, policy="price"))
    with pytest.raises(ModelError, match="argus profile"):
        Service(settings(tiny_family, tmp_path, policy="clipper-ht"))
    assert Service(settings(tiny_family, tmp_path)).policy == "nirvana"
    with pytest.raises(ModelError, match="holds no predictor"):
        Service(settings(tiny_family, tmp_path, predictor=measured_family.parent / "nothing"))


def test_settings_of_promises_are_checked() -> None:
    found, _ = read_settings({"rollout": "10%", "slo": {"fast": {"latency": "2x"}}})
    assert found.rollout == pytest.approx(0.1)
    assert found.slo["fast"].latency_s(1.5) == 3.0
    with pytest.raises(BadRequest, match="a multiple such as 3x, or seconds"):
        read_settings({"slo": {"fast": {"latency": "soon"}}})
    with pytest.raises(BadRequest, match="rollout"):
        read_settings({"rollout": "110%"})
