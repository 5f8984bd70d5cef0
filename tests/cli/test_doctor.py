"""argus doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import run


@pytest.fixture
def config(measured_family: Path, tmp_path: Path) -> Path:
    file = tmp_path / "argus.yaml"
    file.write_text(f"family: {measured_family}\ndata: {tmp_path / 'data'}\nport: 0\n")
    return file


def test_it_says_what_is_in_order(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--config", str(config)) == 0
    said = capsys.readouterr().out
    assert "ok       family        tiny: 2 models, 5 variants" in said
    assert "problem" not in said


def test_a_problem_is_said_with_what_to_do_and_sets_the_exit_code(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "policy: best\n")
    assert run(monkeypatch, "doctor", "--config", str(config)) == 1
    said = capsys.readouterr().out
    assert "problem  policy        there is no policy 'best'" in said
    assert "→ Use price, price-blind" in said
    assert "1 problem" in said.splitlines()[-1]


def test_settings_that_cannot_be_read_are_a_finding_too(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("prot: 1")
    assert run(monkeypatch, "doctor", "--config", str(config), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["problem"], told["findings"][0]["check"]) == (1, "settings")
    assert told["findings"][0]["says"].startswith("There is no setting prot")
