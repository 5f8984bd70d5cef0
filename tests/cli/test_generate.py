"""The command as a shell runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.cli.running import run


def test_generate_saves_pictures_and_says_how_they_were_made(
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = run(
        monkeypatch, "generate", "a red fish", "-m", str(tiny_sd), "-o", str(tmp_path / "fish.png"),
        "-n", "2", "--seed", "7", "--steps", "3", "--guidance", "2",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert "3 steps, guidance 2, seed 7" in printed
    assert "3 steps, guidance 2, seed 8" in printed
    first, second = (Image.open(tmp_path / f"fish-{i}.png") for i in (1, 2))
    assert first.tobytes() != second.tobytes()
    assert first.info["prompt"] == "a red fish"
    assert first.info["seed"] == "7"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a fish", "-m", "./nowhere"], 3, "no folder ./nowhere"),
        (["a fish", "-o", "fish.txt"], 2, "must end in .png"),
        (["a fish", "-o", "no/such/folder/fish.png"], 2, "no folder"),
        (["a fish", "--device", "toaster", "-m", "TINY"], 2, "use cpu, cuda"),
        ([" ", "-m", "TINY", "-o", "x.png"], 2, "prompt is empty"),
        (["a fish", "-n", "0"], 2, "Invalid value for '-n'"),
    ],
)
def test_errors_are_a_sentence_and_an_exit_code(
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    filled = [str(tiny_sd) if word == "TINY" else word for word in arguments]
    assert run(monkeypatch, "generate", *filled) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_families_lists_the_bundled_one_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "families") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "bundled" in lines[1]
    assert any("stabilityai/stable-diffusion-xl-base-1.0" in line for line in lines)
