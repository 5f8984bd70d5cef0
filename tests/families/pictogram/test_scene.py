from __future__ import annotations

import pytest

from argus.families.pictogram.prompts import read_prompt
from argus.families.pictogram.scene.detector import Sight, Thing
from argus.families.pictogram.scene.scorer import atoms_of, mean, right

PROMPT = "two small red fish below a striped blue boat at sea"
FISH = Thing("fish", "red", "plain", "small", 20, 48)
OTHER_FISH = Thing("fish", "red", "plain", "small", 44, 48)
BOAT = Thing("boat", "blue", "striped", "large", 32, 16)


def score(prompt: str, *things: Thing, background: str = "sea") -> float:
    return mean(atoms_of(read_prompt(prompt), Sight(background, things)))


def failed(prompt: str, *things: Thing, background: str = "sea") -> list[str]:
    atoms = atoms_of(read_prompt(prompt), Sight(background, things))
    return sorted(atom.part for atom in atoms if not atom.satisfied)


def changed(thing: Thing, **looks: object) -> Thing:
    return Thing(**{**vars(thing), **looks})


def test_what_was_asked_for_is_right() -> None:
    assert score(PROMPT, BOAT, OTHER_FISH, FISH) == 1
    assert right(atoms_of(read_prompt(PROMPT), Sight("sea", (BOAT, OTHER_FISH, FISH))))


@pytest.mark.parametrize(
    ("things", "parts"),
    [
        ((BOAT, FISH, changed(OTHER_FISH, colour="green")), ["colour"]),
        ((BOAT, FISH, changed(OTHER_FISH, kind="key")), ["count", "kind"]),
        ((BOAT, FISH, changed(OTHER_FISH, size="large")), ["size"]),
        ((changed(BOAT, fill="plain"), FISH, OTHER_FISH), ["fill"]),
        ((changed(BOAT, y=60), FISH, OTHER_FISH), ["relation"]),
        ((BOAT, FISH, OTHER_FISH, changed(FISH, x=32)), ["count", "nothing else"]),
        ((BOAT, FISH, OTHER_FISH, changed(FISH, kind="cup")), ["nothing else"]),
        ((BOAT, FISH), ["colour", "count", "kind", "object", "size"]),
    ],
)
def test_each_flaw_costs_the_atoms_it_breaks(things: tuple[Thing, ...], parts: list[str]) -> None:
    assert failed(PROMPT, *things) == parts
    assert 0.4 < score(PROMPT, *things) < 1
    assert not right(atoms_of(read_prompt(PROMPT), Sight("sea", things)))


def test_another_background_is_a_flaw() -> None:
    assert failed(PROMPT, BOAT, FISH, OTHER_FISH, background="snow") == ["background"]


def test_without_a_thing_that_was_asked_for_there_is_no_score() -> None:
    assert score("a red fish at sea", BOAT) == 0
    assert score("a red fish at sea", changed(FISH, kind="sun")) == 0
    assert score("a red fish at sea") == 0


def test_the_things_of_two_groups_of_one_kind_are_told_apart() -> None:
    prompt = "a red fish left of a green fish"
    green = changed(OTHER_FISH, colour="green")
    assert score(prompt, green, FISH) == 1
    assert failed(prompt, changed(green, x=4), FISH) == ["relation"]


@pytest.mark.parametrize(
    ("prompt", "x", "y", "parts"),
    [
        ("a red fish between a blue boat and a green cup", 32, 20, []),
        ("a red fish between a blue boat and a green cup", 32, 52, ["relation"]),
        ("a red fish between a blue boat and a green cup", 4, 16, ["relation"]),
        ("a red fish in front of a blue boat and a green cup", 18, 22, []),
        ("a red fish in front of a blue boat and a green cup", 40, 40, ["relation"]),
    ],
)
def test_relations_are_about_places(prompt: str, x: float, y: float, parts: list[str]) -> None:
    boat, cup = changed(BOAT, x=12), Thing("cup", "green", "plain", "small", 52, 20)
    assert failed(prompt, changed(FISH, x=x, y=y), boat, cup) == parts


CUP = Thing("cup", "red", "plain", "small", 32, 32, "blue")


@pytest.mark.parametrize(
    ("prompt", "second", "parts"),
    [
        ("a red cup with a blue handle", "blue", []),
        ("a red cup with a blue handle", "green", ["second"]),
        ("a red cup with a blue handle", None, ["second"]),
        ("a red cup", "blue", []),
        ("a red cup with a handle", "blue", []),
    ],
)
def test_a_part_s_colour_counts_where_it_is_named(
    prompt: str, second: str | None, parts: list[str]
) -> None:
    assert failed(prompt, changed(CUP, second=second)) == parts


@pytest.mark.parametrize(
    ("prompt", "colours", "parts"),
    [
        ("a cup and a red cup", ("red", "green"), []),
        ("a cup and a red cup", ("red", "red"), []),
        ("a green cup and two red cups", ("red", "green", "red"), []),
        ("a green cup and two red cups", ("red", "green", "green"), ["colour", "count", "count"]),
    ],
)
def test_groups_of_one_kind_are_counted_by_colour(
    prompt: str, colours: tuple[str, ...], parts: list[str]
) -> None:
    cups = [changed(CUP, colour=colour, x=16.0 * i) for i, colour in enumerate(colours)]
    assert failed(prompt, *cups) == parts
