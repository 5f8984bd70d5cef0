from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from argus.cache.catalogue import Catalogue
from argus.cache.latents import StoredLatents
from argus.cache.scope import Scope
from argus.server.samples import Sample, Samples
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


def test_what_is_removed_from_the_cache_is_removed_from_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    scopes = {name: Scope(name, "tiny", "ddim", 32, 32, 6, 3.0, "") for name in ("alice", "bob")}
    stored = StoredLatents(2, "a name", "a hash", 100)
    entries = [
        catalogue.add(scopes[whose], prompt, np.ones(4, np.float32), [stored], 0.0)
        for whose, prompt in (("alice", "a fish"), ("alice", "a key"), ("bob", "a fish"))
    ]
    catalogue.close()
    samples = Samples(f"sqlite:///{tmp_path}/catalogue.db")
    for whose, prompt in (
        ("alice", "a fish"), ("alice", "a key"), ("alice", "a sun"), ("bob", "a fish"),
        ("bob", "a key"),
    ):  # fmt: skip
        samples.add(Sample(whose, prompt, "quick", 1, None, None, 0, 0, 1, None, None, "tiny", 0))

    def says(*arguments: str, code: int = 0) -> str:
        assert run(monkeypatch, "cache", *arguments, "--data", str(tmp_path)) == code
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    def left() -> list[tuple[str, str]]:
        rows = samples.read("tiny")
        return list(zip(rows["namespace"], rows["prompt"], strict=True))

    assert "samples 5" in says("stats")
    says("rm", str(entries[0]))
    assert left() == [("alice", "a key"), ("alice", "a sun"), ("bob", "a fish"), ("bob", "a key")]
    assert "1 sample." in says("rm", "--prompt", "a key", "--namespace", "bob")
    assert left() == [("alice", "a key"), ("alice", "a sun"), ("bob", "a fish")]
    assert "2 samples." in says("clear", "--yes", "--namespace", "alice")
    assert left() == [("bob", "a fish")]
    assert "Nothing in the cache matches" in says("rm", "--namespace", "alice", code=2)
    says("clear", "--yes")
    assert left() == []
