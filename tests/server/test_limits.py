"""How long requests may wait, and that what has begun is finished."""

from __future__ import annotations

from pathlib import Path

from argus.config import Settings
from tests.server.running import running


def test_a_pinned_picture_may_take_longer_than_it_may_wait(
    measured_family: Path, tmp_path: Path
) -> None:
    settings = Settings(
        family=str(measured_family), data=tmp_path, workers=1, policy="clipper-ha", timeout_s=0.5
    )
    with running(settings) as server:
        answer = server.generate("a red fish", num_inference_steps=300, argus={"exact": True})
        assert answer.status_code == 200, answer.text
        assert answer.json()["argus"][0]["timings_ms"]["denoise"] > 500


def test_a_shadow_picture_is_made_by_a_policy_with_batches_of_its_own_however_late(
    measured_family: Path, tmp_path: Path
) -> None:
    settings = Settings(
        family=str(measured_family), data=tmp_path, workers=1, policy="clipper-ha", shadow=True,
        slo={"default": {"latency": "0.001s"}},
    )  # fmt: skip
    with running(settings) as server:
        answer = server.generate("a red fish")
        assert answer.status_code == 200, answer.text
        assert not answer.json()["argus"][0]["on_time"]
