"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from argus.files import replace_folder, restore_folder, try_writing, written_aside


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with written_aside(file) as aside:
        aside.write_text("old")
    with pytest.raises(OSError, match="no space"), written_aside(file) as aside:
        aside.write_text("ne")
        raise OSError("no space left")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_room_is_tried_with_a_file_that_is_gone_afterwards(tmp_path: Path) -> None:
    try_writing(tmp_path / "probe", 1000)
    with pytest.raises(FileNotFoundError):
        try_writing(tmp_path / "nowhere" / "probe", 1000)
    assert not list(tmp_path.iterdir())


def folder_of(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "weights").write_text(content)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("first", "second"):
        replace_folder(tmp_path / "predictor", by=folder_of(tmp_path / "new", content))
        assert (tmp_path / "predictor" / "weights").read_text() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "predictor"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "predictor", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(folder, by=tmp_path / "nowhere")
    assert (folder / "weights").read_text() == "old"


def test_a_folder_is_brought_back_after_a_crash_in_between(tmp_path: Path) -> None:
    folder = tmp_path / "predictor"
    folder_of(tmp_path / "predictor.old", "old")
    for _ in range(2):
        restore_folder(folder)
        assert (folder / "weights").read_text() == "old"
    replace_folder(folder, by=folder_of(tmp_path / "new", "new"))
    assert [one.name for one in tmp_path.iterdir()] == ["predictor"]
