from __future__ import annotations

from pathlib import Path

import pytest

from argus.cache.catalogue import Catalogue
from tests.cli.running import run


def test_the_stats_of_a_cache_that_may_hold_nothing_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Catalogue(f"sqlite:///{tmp_path}/catalogue.db").close()
    config = tmp_path / "argus.yaml"
    config.write_text("cache_limit: 0\n")
    given = ("cache", "stats", "--config", str(config), "--data", str(tmp_path))
    assert run(monkeypatch, *given) == 0
    assert "size 0B (of 0B)" in " ".join(capsys.readouterr().out.split())
