"""What deploy/ says to Argus is what Argus understands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from argus.config import read_settings

FILE = Path(__file__).parents[1] / "deploy" / "kuberay.yaml"


def server() -> dict[str, Any]:
    (cluster,) = [
        one for one in yaml.safe_load_all(FILE.read_text()) if one["kind"] == "RayCluster"
    ]
    containers = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = next(one for one in containers if one["name"] == "argus")
    return found


def test_the_environment_of_the_server_is_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in server()["env"]:
        if one["name"].startswith("ARGUS_"):
            monkeypatch.setenv(one["name"], one["value"])
    settings, origins = read_settings({})
    assert set(origins.values()) == {"the environment"}
    assert settings.workers == "ray" and settings.worker_types["gpu"].gpus == 1
