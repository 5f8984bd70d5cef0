from __future__ import annotations

import random

import pytest

from argus.families.catalog import find_family
from argus.families.pictogram.captions import caption
from argus.families.pictogram.prompts import AskedGroup, AskedScene, read_prompt, unknown_words
from argus.families.pictogram.world import Scene, sample_scene


def fits(asked: AskedScene, scene: Scene) -> bool:
    """Whether all that is asked is so in the scene, and no thing of it is left out."""
    if asked.background not in (None, scene.background) or len(asked.groups) != len(scene.groups):
        return False
    groups = list(scene.groups)
    if asked.relation is None:
        groups.sort(key=lambda group: (group.kind, group.colour))
        wanted = sorted(asked.groups, key=lambda group: (group.kind, group.colour or ""))
    else:
        if asked.relation != scene.relation:
            return False
        wanted = list(asked.groups)
        if asked.relation == "between":  # which of its neighbours is named first says nothing
            groups[1:] = sorted(groups[1:], key=lambda group: group.kind)
            wanted[1:] = sorted(wanted[1:], key=lambda group: group.kind)
    return all(
        (one.kind, one.count) == (group.kind, group.count)
        and one.colour in (None, group.colour)
        and one.fill in (None, group.fill)
        and one.size in (None, group.size)
        for one, group in zip(wanted, groups, strict=True)
    )


def test_what_captions_say_is_read_back() -> None:
    rng = random.Random(5)
    wrong = []
    for _ in range(3000):
        scene = sample_scene(rng)
        prompt = caption(scene, rng)
        asked = read_prompt(prompt)
        alike = len({group.kind for group in scene.groups}) < len(scene.groups)
        if not alike and not fits(asked, scene):
            wrong.append(prompt)
    assert len(wrong) <= 15, wrong  # a strange word can tear a phrase apart


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red house in the snow", AskedScene((AskedGroup("house", 1, "red"),), "snow")),
        (
            "At night, two small golden stars to the right of a big boat",
            AskedScene(
                (
                    AskedGroup("boat", 1, size="large"),
                    AskedGroup("star", 2, "yellow", None, "small"),
                ),
                "night",
                "left of",
            ),
        ),
        (
            "a hollow blue key partly hidden by 3 discs",
            AskedScene(
                (AskedGroup("key", 1, "blue", "outlined"), AskedGroup("circle", 3)),
                None,
                "in front of",
            ),
        ),
        ("a zebra playing the violin", AskedScene(())),
        ("", AskedScene(())),
    ],
)  # fmt: skip
def test_a_prompt_is_read(prompt: str, expected: AskedScene) -> None:
    assert read_prompt(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A green cat, at night", ["cat"]),
        ("six dogs and a dog’s house", ["six", "dogs", "dog’s"]),
        ("ein grüner Fisch", ["ein", "grüner", "fisch"]),
        ("a house that is red, and some trees beneath it", []),
    ],
)
def test_words_that_no_caption_has_are_unknown(prompt: str, words: list[str]) -> None:
    assert unknown_words(prompt) == words


def test_captions_and_examples_are_known_but_for_the_strange_word_of_some() -> None:
    rng = random.Random(4)
    captions = [caption(sample_scene(rng), rng) for _ in range(300)]
    assert max(len(unknown_words(text)) for text in captions) == 1
    assert not [text for text in find_family("pictogram").examples if unknown_words(text)]
