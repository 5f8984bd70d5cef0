"""`argus profile` and `argus calibrate` as a user runs them, on a family of random weights."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from argus.core.errors import BadRequest, ModelError
from argus.core.family import ScorerSpec
from argus.core.profile import ModelProfile, Profile
from argus.families.catalog import find_family
from argus.lab import profiling
from argus.lab.calibration import CHUNK, Calibration, calibrate
from argus.quality import table
from argus.quality.scorer import Scores

ARGUS = [sys.executable, "-c", "from argus.cli.main import main; main()"]
PROMPTS = [f"prompt number {i}" for i in range(CHUNK + 4)]
DONORS = [f"another prompt, number {i}" for i in range(12)]


def asked(family: Path, seeds: int = 2) -> Calibration:
    return Calibration(
        find_family(str(family)), tuple(PROMPTS), tuple(DONORS), seeds, "cpu", "float32"
    )


@pytest.fixture(scope="module")
def measured(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "quality.parquet"
    told: list[tuple[int, int]] = []
    calibrate(asked(tiny_family), out, lambda done, of: told.append((done, of)))
    assert told[-1][0] == told[-1][1]
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(told))
    return out


def test_every_prompt_variant_and_seed_has_one_row(measured: Path, tiny_family: Path) -> None:
    rows = table.read(measured)
    variants = find_family(str(tiny_family)).variants
    assert len(rows) == len(PROMPTS) * len(variants) * 2
    assert not rows.duplicated(["prompt", "variant", "seed"]).any()
    assert (rows["seconds"] > 0).all()


def test_only_resumed_pictures_have_neighbours_and_they_are_donors(measured: Path) -> None:
    rows = table.read(measured)
    resumed = rows["variant"].str.startswith("skip-")
    assert rows[~resumed]["neighbour"].isna().all()
    assert set(rows[resumed]["neighbour"]) <= set(DONORS)
    assert rows[resumed]["neighbour"].nunique() > 3
    assert rows[resumed]["similarity"].between(-1, 1).all()


def test_quality_is_made_of_scores_as_defined(measured: Path) -> None:
    rows = table.read(measured)
    exact = rows[rows["variant"] == "exact"]
    best = exact.groupby("prompt")["score"].mean()
    np.testing.assert_allclose(rows["s_exact"], rows["prompt"].map(best), rtol=1e-5)
    expected = (rows["score"] - rows["s0"]) / (rows["s_exact"] - rows["s0"])
    known = rows["quality"].notna()
    np.testing.assert_allclose(rows["quality"][known], expected[known], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(rows["raw_ratio"], rows["score"] / rows["s_exact"], rtol=1e-5)


class BrightAndClear:
    """A scorer that counts bright pictures and also says how bright they are."""

    @classmethod
    def load(cls, source: str | None, device: str) -> BrightAndClear:
        return cls()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
        return self.scores(prompts, images)["bright"]

    def scores(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Scores]:
        light = np.array([np.asarray(image).mean() / 255 for image in images], np.float32)
        return {"bright": (light > 0.5).astype(np.float32), "light": light}


def test_a_table_keeps_every_score_of_its_scorer(tiny_family: Path, tmp_path: Path) -> None:
    two = asked(tiny_family, seeds=1)
    spec = ScorerSpec(f"{__name__}:BrightAndClear")
    small = replace(two, prompts=two.prompts[:2], donors=two.donors[:2])
    tables = {}
    for name in (None, "light"):
        family = replace(two.family, scorer=replace(spec, score=name))
        out = tmp_path / f"{name}.parquet"
        tables[name] = calibrate(replace(small, family=family), out)
    counted, light = tables.values()
    assert set(counted["score"]) <= {0.0, 1.0}
    np.testing.assert_array_equal(counted["score"], counted["bright"])
    np.testing.assert_allclose(light["score"], light["light"])
    np.testing.assert_allclose(counted["light"], light["light"])
    other = table.scored_by(counted, "light")
    for column in ("score", "s0", "s_exact", "quality", "bright", "light"):
        np.testing.assert_allclose(other[column], light[column], rtol=1e-5, atol=1e-6)
    back = table.scored_by(other, "bright")
    np.testing.assert_allclose(back["quality"], counted["quality"], atol=1e-6)
    with pytest.raises(BadRequest, match="no score 'dark', but"):
        table.scored_by(counted, "dark")


def test_some_prompts_may_get_a_single_picture_to_learn_from(
    tiny_family: Path, tmp_path: Path
) -> None:
    many = replace(asked(tiny_family), single=len(PROMPTS) - 3)
    told: list[tuple[int, int]] = []
    rows = calibrate(many, tmp_path / "some.parquet", lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1]
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(told))
    pictures = rows[rows["variant"] == "exact"].groupby("prompt")["seed"].apply(list)
    assert all(pictures[prompt] == [0, 1] for prompt in PROMPTS[:3])
    assert all(pictures[prompt] == [0] for prompt in PROMPTS[3:])
    assert set(table.judged(rows)["prompt"]) == set(PROMPTS[:3])
    whole = calibrate(asked(tiny_family), tmp_path / "all.parquet")
    both = rows.merge(whole, on=["prompt", "variant", "seed"])
    assert len(both) == len(rows)
    np.testing.assert_allclose(both["score_x"], both["score_y"], rtol=1e-4)
    assert (both["neighbour_x"].fillna("") == both["neighbour_y"].fillna("")).all()
    for nothing in (replace(many, single=len(PROMPTS) - 1), replace(many, seeds=1)):
        with pytest.raises(BadRequest, match="nothing is left to judge"):
            calibrate(nothing, tmp_path / "none.parquet")


def test_another_measurement_is_not_mixed_in(tiny_family: Path, tmp_path: Path) -> None:
    out = tmp_path / "quality.parquet"
    (tmp_path / "quality.parquet.parts").mkdir()
    (tmp_path / "quality.parquet.parts" / "identity").write_text("of something else")
    with pytest.raises(BadRequest, match="parts of another measurement"):
        calibrate(asked(tiny_family), out)


def test_nothing_is_left_beside_a_finished_table(measured: Path) -> None:
    assert list(measured.parent.iterdir()) == [measured]


@pytest.mark.slow
def test_a_killed_calibration_goes_on_without_losing_or_doubling_a_row(
    measured: Path, tiny_family: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "donors.txt").write_text("\n".join(DONORS))
    out = tmp_path / "quality.parquet"
    command = [
        *ARGUS, "calibrate", str(tiny_family), "--prompts", "prompts.txt", "--donors", "donors.txt",
        "--out", str(out),
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    parts = tmp_path / "quality.parquet.parts"
    while not list(parts.glob("*.parquet")) and first.poll() is None:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not out.exists()
    kept = 0
    for part in parts.glob("*.parquet"):  # marked, to be known again in the table
        rows = pd.read_parquet(part).assign(seconds=1234.0)
        rows.to_parquet(part)
        kept += len(rows)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert kept
    assert (table.read(out)["seconds"] == 1234.0).sum() == kept
    keys = ["prompt", "variant", "seed"]
    ours, expected = (
        table.read(path).sort_values(keys, ignore_index=True) for path in (out, measured)
    )
    assert ours[keys].equals(expected[keys])
    np.testing.assert_allclose(ours["score"], expected["score"], atol=0.05)


@pytest.fixture
def own_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """A family judged by a class of one's own, a module in a project's folder."""
    (tmp_path / "mine_judges.py").write_text("class Scorer: ...\n")
    (tmp_path / "mine_features.py").write_text("SIDES = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    family = replace(find_family("pictogram"), scorer=ScorerSpec("mine_judges:Scorer"))
    return Calibration(family, tuple(PROMPTS), tuple(DONORS), 1, "cpu", "float32")


def test_what_lies_beside_a_scorer_does_not_make_another_measurement(
    own_scorer: Calibration, tmp_path: Path
) -> None:
    before = own_scorer.identity
    for folder in (".git", ".venv", "quality.parquet.parts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "quality.parquet").write_bytes(b"the output of another run")
    (tmp_path / "run.log").write_text("begun\n")
    assert replace(own_scorer).identity == before


@pytest.mark.parametrize("name", ["mine_judges.py", "mine_features.py"])
def test_other_code_of_a_scorer_makes_another_measurement(
    own_scorer: Calibration, tmp_path: Path, name: str
) -> None:
    before = own_scorer.identity
    (tmp_path / name).write_text("class Scorer:\n    sides = 4\n")
    assert replace(own_scorer).identity != before


def test_all_files_of_a_scorers_package_count_its_weights_among_them(
    own_scorer: Calibration, tmp_path: Path
) -> None:
    package = tmp_path / "mine_package"
    (package / "notes.d").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "scorer.py").write_text("class Scorer: ...\n")
    (package / "weights.safetensors").write_bytes(b"one")
    family = replace(own_scorer.family, scorer=ScorerSpec("mine_package.scorer:Scorer"))
    asked = replace(own_scorer, family=family)
    before = asked.identity
    assert replace(asked).identity == before
    (package / "weights.safetensors").write_bytes(b"two")
    assert replace(asked).identity != before


def test_a_profile_is_measured_and_read_back(tiny_family: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    done = subprocess.run(
        [*ARGUS, "profile", str(tiny_family), "--batches", "2,1", "--repeats", "1", "--rounds", "1",
         "--out", str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ms/step at 2" in done.stdout
    measured = Profile.read(out)
    assert measured.device["device"] == "cpu"
    assert set(measured.models) == {"tiny", "other"}
    for model in measured.models.values():
        assert set(model.step_s) == set(model.decode_s) == {1, 2}
        assert set(model.load_s) == {"disk", "page_cache"}
        seconds = (*model.step_s.values(), model.encode_s, model.picture_s, *model.load_s.values())
        assert min(seconds) > 0
        assert model.peak_bytes > 1e6


def test_of_several_rounds_the_least_of_each_figure_counts(
    tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures as if something else had run on the machine now and then."""
    seconds = iter([0.1, 0.3, 0.2, 0.1])  # of two models, in two rounds

    def measured(asked: profiling.Asked) -> ModelProfile:
        took = next(seconds)
        return ModelProfile({1: took, 2: 2 - took}, {1: took}, took, took, {"disk": took}, 7)

    monkeypatch.setattr(profiling, "_in_a_process", measured)
    family = find_family(str(tiny_family))
    found = profiling.profile(family, "cpu", "float32", rounds=2).models.values()
    assert [one.step_s for one in found] == [{1: 0.1, 2: 1.8}, {1: 0.1, 2: 1.7}]
    assert [one.encode_s for one in found] == [0.1, 0.1]


def test_a_file_that_is_no_profile_is_refused() -> None:
    with pytest.raises(ModelError, match="no profile"):
        Profile.from_json({"family": "x"})


def test_costs_follow_from_a_profile() -> None:
    model = ModelProfile({1: 0.1, 2: 0.12, 8: 0.48}, {1: 0.02, 8: 0.08}, 0.01, 0.0, {}, 0)
    assert model.best_batch == 2
    assert model.batch_step_s(5) == pytest.approx(0.3)
    assert model.batch_step_s(16) == pytest.approx(0.96)
    family = find_family("sd15")
    exact = family.exact
    assert model.picture_cost_s(exact, 2) == pytest.approx(
        exact.steps * 0.06 + 0.01 + model.batch_decode_s(2) / 2
    )
    skipping = family.variants["skip-25"]
    assert model.picture_cost_s(skipping, 1) == pytest.approx(25 * 0.1 + 0.03)
