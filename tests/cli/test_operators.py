"""argus cache, config and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from argus.config import Settings, without_passwords
from tests.cli.running import run
from tests.server.running import running


@pytest.fixture
def config(tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "argus.yaml"
    file.write_text(f"family: {tiny_family}\ndata: {tmp_path / 'data'}\n")
    monkeypatch.setenv("ARGUS_CONFIG", str(file))
    monkeypatch.setenv("COLUMNS", "200")
    return file


def test_a_cache_is_warmed_listed_and_emptied_and_a_server_uses_it(
    config: Path,
    tiny_family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def says(*arguments: str, code: int = 0) -> str:
        assert run(monkeypatch, "cache", *arguments) == code
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    assert "holds no cache" in says("stats", code=2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fish\n\na blue boat\na red fish\n")
    assert "Stored 2 of 3 prompts" in says("warm", str(prompts))
    assert "Stored 0 of 3 prompts" in says("warm", str(prompts))
    keys = tmp_path / "keys.txt"
    run(monkeypatch, "key", "alice", "--file", str(keys))
    run(monkeypatch, "key", "bob", "--file", str(keys))
    monkeypatch.setenv("ARGUS_API_KEY_FILE", str(keys))
    assert "to warm, one of: alice, bob" in says("warm", str(prompts), code=2)
    assert "Stored 2 of 3 prompts" in says("warm", str(prompts), "--namespace", "alice")
    monkeypatch.delenv("ARGUS_API_KEY_FILE")
    settings = Settings(family=str(tiny_family), data=tmp_path / "data")
    with running(settings) as server:
        assert server.generate("a blue boat").json()["argus"][0]["steps_skipped"] == 3

    assert "prompts 4" in says("stats")
    listed = says("list", "--namespace", "alice")
    assert "2 3" in listed  # the K that are kept
    assert listed.count("alice") == 2
    assert "everyone" not in listed
    assert "Removed 2 entries" in says("rm", "--prompt", "a red fish")
    assert "Removed 1 entry" in says("rm", "--namespace", "alice")
    assert "Nothing in the cache matches" in says("rm", "99", code=2)
    assert "Say what to remove" in says("rm", code=2)
    assert "Removed 1 entry" in says("clear", "--yes")
    assert not list((tmp_path / "data" / "latents").iterdir())


def test_config_show_says_where_each_setting_comes_from(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_QUEUE_LIMIT", "3")
    assert run(monkeypatch, "config", "show") == 0
    lines: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        lines.setdefault(line.split()[0], line)  # a description may go on with a setting's name
    assert "the environment" in lines["queue_limit"]
    assert "default" in lines["port"]
    assert run(monkeypatch, "config", "show", "--config", "nowhere.yaml") == 2


def test_config_show_masks_passwords(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_CACHE_CATALOGUE", "postgresql://argus:hunter2@db/argus")
    monkeypatch.setenv("ARGUS_CACHE_LATENTS", "ftp://argus:hunter@2@store/latents")
    assert run(monkeypatch, "config", "show") == 0
    shown = capsys.readouterr().out
    assert "hunter" not in shown
    assert "postgresql://argus:***@db/argus" in shown
    assert "ftp://argus:***@store/latents" in shown
    assert (
        without_passwords("postgresql:/argus:hunter2@db/argus") == "postgresql:/argus:***@db/argus"
    )
    url = "postgresql://db/argus?sslpassword=hunter2&connect_timeout=2"
    assert without_passwords(url) == "postgresql://db/argus?sslpassword=***&connect_timeout=2"


def test_a_variable_that_is_no_json_is_a_sentence_and_no_traceback(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_SLO", "default=3x")
    assert run(monkeypatch, "config", "show") == 2
    assert "ARGUS_SLO is 'default=3x'" in capsys.readouterr().err


def test_key_prints_the_key_and_keeps_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.txt"
    assert run(monkeypatch, "key", "alice", "--file", str(file)) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("argus-")
    assert key not in file.read_text()
    assert run(monkeypatch, "key", "alice", "--file", str(file)) == 2
