"""Two real `argus serve` over one PostgreSQL and one folder of latents."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from argus.cache.catalogue import Catalogue
from tests.server.running import COMMAND, served, wait_until

if TYPE_CHECKING:
    from tests.postgres import Postgres


def made(url: str, prompt: str) -> Any:
    """How a server made a picture."""
    answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": prompt}, timeout=120)
    assert answer.status_code == 200
    return answer.json()["argus"][0]


def cached(url: str) -> tuple[float, float]:
    """A server's metrics of the cache's entries and bytes."""
    lines = dict(
        line.rsplit(" ", 1)
        for line in httpx.get(f"{url}/metrics").text.splitlines()
        if line.startswith("argus_cache_")
    )
    return float(lines["argus_cache_entries"]), float(lines["argus_cache_bytes"])


@pytest.mark.cluster
def test_two_servers_share_hits_and_go_on_without_their_database(
    tiny_family: Path, tmp_path: Path, postgres: Postgres
) -> None:
    database = postgres.new_database()
    config = tmp_path / "argus.yaml"
    config.write_text(f"cache_catalogue: {database}\ncache_latents: {tmp_path / 'latents'}\n")
    flags = ("--config", str(config))
    with (
        served(tiny_family, tmp_path / "one", *flags) as (_, one),
        served(tiny_family, tmp_path / "other", *flags) as (_, other),
    ):
        assert made(one, "a clock in a tower")["steps_skipped"] == 0
        wait_until(lambda: cached(other)[0] == 1)
        hit = made(other, "a clock in a tower")
        assert (hit["steps_skipped"], hit["similarity"]) == (3, pytest.approx(1, abs=1e-3))
        assert cached(other) == cached(one)
        wait_until(lambda: Catalogue(database).stats().uses == 1)

        cleared = [*COMMAND, "cache", "clear", "--yes", *flags, "--data", str(tmp_path / "cli")]
        subprocess.run(cleared, check=True, timeout=240)
        wait_until(lambda: cached(one) == cached(other) == (0, 0))
        assert not list((tmp_path / "latents").iterdir())
        assert made(other, "a clock in a tower")["steps_skipped"] == 0
        wait_until(lambda: cached(one)[0] == 1)

        def pictures() -> float:
            usage = httpx.get(f"{one}/v1/argus/usage", timeout=60).json()
            return float(usage["total"]["pictures"])

        wait_until(lambda: pictures() == 3)

        postgres.stop()
        assert made(one, "a clock in a tower")["steps_skipped"] == 0
        wait_until(lambda: "catalogue" in httpx.get(f"{one}/ready").json().get("degraded", []))
        postgres.start()
        wait_until(lambda: "degraded" not in httpx.get(f"{one}/ready").json())
        assert made(one, "a clock in a tower")["steps_skipped"] == 3
        wait_until(lambda: pictures() == 5)
