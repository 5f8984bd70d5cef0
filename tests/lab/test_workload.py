from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from argus.core.errors import BadRequest
from argus.families.catalog import default_family, find_family
from argus.families.pictogram.ideas import CHANGES, changed
from argus.families.pictogram.prompts import read_prompt
from argus.families.pictogram.world import MAX_THINGS, sample_scene
from argus.lab.prompts import WrittenIdeas, find_prompts, ideas_of, split_prompts
from argus.lab.workload import Habits, Ideas, Request, workload

WRITTEN = WrittenIdeas(
    [f"{a} {b}, {c}, detailed" for a in ("red", "old") for b in ("cat", "house", "sea", "tree")
     for c in ("oil painting", "photo", "by night")]
)  # fmt: skip


def take(ideas: Ideas, count: int, seed: int = 0, **habits: float) -> list[Request]:
    return list(itertools.islice(workload(ideas, seed, Habits(**habits)), count))  # type: ignore[arg-type]


@pytest.fixture(params=["bundled", "written"])
def ideas(request: pytest.FixtureRequest) -> Ideas:
    return ideas_of(default_family()) if request.param == "bundled" else WRITTEN


def test_a_seed_repeats_a_workload(ideas: Ideas) -> None:
    assert take(ideas, 50, seed=1) == take(ideas, 50, seed=1)
    assert take(ideas, 50, seed=1) != take(ideas, 50, seed=2)


def test_some_prompts_are_popular() -> None:
    def most(popular: float) -> int:
        habits = Habits(popular, persistence=0.0, favourites=16, zipf=1.5)
        requests = itertools.islice(workload(WRITTEN, 0, habits), 600)
        return Counter(request.prompt for request in requests).most_common(1)[0][1]

    assert most(1.0) > 1.5 * most(0.0)


def test_users_vary_what_they_asked_before(ideas: Ideas) -> None:
    requests = take(ideas, 400)
    runs = Counter(request.user for request in requests)
    assert max(runs.values()) > 3
    going_on = sum(request.continues for request in requests) / len(requests)
    assert 0.5 < going_on < 0.65


def test_themes_come_and_go(ideas: Ideas) -> None:
    def most_asked(requests: list[Request]) -> int:
        return Counter(request.theme for request in requests).most_common(1)[0][0]

    requests = take(ideas, 2000, drift=2000, persistence=0.0, contrast=50.0)
    assert most_asked(requests[:200]) != most_asked(requests[900:1100])


@pytest.mark.parametrize("change", CHANGES)
def test_a_scene_is_changed_in_one_way(change: str) -> None:
    rng = random.Random(change)
    for _ in range(100):
        scene = sample_scene(rng)
        try:
            new = changed(rng, scene, change)
        except ValueError:  # a crowd is small, and not everything has a part
            assert change in ("size", "second")
            continue
        assert 1 <= new.things <= MAX_THINGS
        assert change == "scene" or new.relation == scene.relation
        if change in ("colour", "kind", "fill", "size"):
            differing = [
                name
                for old, now in zip(scene.groups, new.groups, strict=True)
                for name in ("kind", "colour", "fill", "size", "count")
                if getattr(old, name) != getattr(now, name)
            ]
            assert differing == [change]
            assert new.background == scene.background


def test_own_prompts_can_be_read_back() -> None:
    prompts = find_prompts(default_family(), "40")
    assert len(set(prompts)) == 40
    assert all(read_prompt(prompt).groups for prompt in prompts)


def test_prompts_and_donors_are_different_ones(tmp_path: Path) -> None:
    family = default_family()
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(9)) + "\n\nprompt 1\n")
    for asked, donors, sizes in ((str(file), None, (6, 3)), ("20", None, (20, 10)),
                                 (str(file), "7", (9, 7))):  # fmt: skip
        prompts, others = split_prompts(family, asked, donors)
        assert (len(prompts), len(others)) == sizes
        assert not set(prompts) & set(others)


def test_what_gives_no_prompts_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(BadRequest, match="holds no prompts"):
        find_prompts(default_family(), str(tmp_path / "empty.txt"))
    with pytest.raises(BadRequest, match="cannot be read"):
        find_prompts(default_family(), str(tmp_path / "none.txt"))
    with pytest.raises(BadRequest, match="no prompts of its own"):
        find_prompts(find_family("sdxl"), "10")
