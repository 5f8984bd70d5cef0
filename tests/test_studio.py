"""The package as a notebook's user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import argus


def test_a_loaded_folder_makes_a_picture_that_says_how(tiny_sd: Path) -> None:
    seen: list[int] = []
    studio = argus.load(str(tiny_sd), device="cpu")
    picture = studio.generate(
        "a red fish", seed=3, steps=4, guidance=2.0, on_step=lambda done, _: seen.append(done)
    )
    assert isinstance(picture.image, Image.Image)
    assert picture.image.size == (32, 32)
    assert (picture.seed, picture.steps, picture.guidance) == (3, 4, 2.0)
    assert picture.model == str(tiny_sd)
    assert picture.seconds > 0
    assert seen == [1, 2, 3, 4]


def test_the_seed_that_was_drawn_makes_the_picture_again(tiny_sd: Path) -> None:
    studio = argus.load(str(tiny_sd), device="cpu")
    first = studio.generate("a red fish", steps=2)
    again = studio.generate("a red fish", steps=2, seed=first.seed)
    assert first.image.tobytes() == again.image.tobytes()


def test_pictures_show_in_notebooks_and_save(tiny_sd: Path, tmp_path: Path) -> None:
    picture = argus.load(str(tiny_sd), device="cpu").generate("a red fish", seed=1, steps=1)
    assert picture._repr_png_().startswith(b"\x89PNG")
    for name in ("fish.png", "fish.jpg", "fish.webp"):
        picture.save(tmp_path / name)
        assert Image.open(tmp_path / name).size == (32, 32)
    with pytest.raises(argus.BadRequest, match="must end in"):
        picture.save(tmp_path / "fish.doc")


def test_importing_argus_does_not_load_torch() -> None:
    code = "import argus, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
