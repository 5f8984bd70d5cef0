"""The wheel is whole: what is installed from it makes pictures, and serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.server.running import wait_until

ROOT = Path(__file__).parents[1]
MOST_BYTES = 100_000_000  # that PyPI takes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built, as `make wheel` and the images do, from what .dockerignore lets in."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=leave)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", built, source], check=True)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, which sees this one's other packages."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths("venv", {"base": str(folder), "platbase": str(folder)})
    others = sysconfig.get_paths()["purelib"]
    # A .pth file names a folder, whose own .pth files are not read: not the one of a checkout.
    (Path(paths["purelib"]) / "others.pth").write_text(f"{others}\n")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return folder / "bin"


@pytest.fixture
def environment() -> dict[str, str]:
    """This one's, without the path of the source."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_it_has_every_file_of_the_package_and_is_small_enough_for_pypi(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    package = ROOT / "src"
    files = {
        str(file.relative_to(package))
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert not files - packed
    assert wheel.stat().st_size < MOST_BYTES


def test_it_is_what_the_environment_imports(scripts: Path, environment: dict[str, str]) -> None:
    asked = "import argus, json, sys; print(json.dumps([argus.__file__, sys.prefix]))"
    said = subprocess.run(
        [scripts / "python", "-c", asked], env=environment, cwd="/", check=True, capture_output=True
    )
    file, prefix = json.loads(said.stdout)
    assert Path(file).is_relative_to(prefix)


def test_it_makes_a_picture(scripts: Path, environment: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(
        [scripts / "argus", "generate", "a red fish in the sea", "-o", "fish.png", "--seed", "1"],
        env=environment, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert Image.open(tmp_path / "fish.png").size == (64, 64)


def test_it_serves(scripts: Path, environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [scripts / "argus", "serve", "--port", "0"], env=environment, cwd=tmp_path,
            stderr=stderr,
        )  # fmt: skip
    try:
        wait_until(lambda: "Serving on" in log.read_text() or server.poll() is not None)
        line = next(line for line in log.read_text().splitlines() if "Serving on" in line)
        with httpx.Client(base_url=line.split()[-1], timeout=120) as http:
            wait_until(lambda: http.get("/ready").status_code == 200)
            asked = http.post("/v1/images/generations", json={"prompt": "a red fish in the sea"})
        assert asked.status_code == 200, asked.text
        assert (tmp_path / "argus-data").is_dir()
    finally:
        server.kill()
        server.wait()
