from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argus.families.pictogram.captions import caption
from argus.families.pictogram.draw import PALETTE, draw_scene
from argus.families.pictogram.world import (
    COLOURS,
    FILLS,
    KINDS,
    MAX_THINGS,
    PARTS,
    SIZE,
    SIZES,
    Group,
    Scene,
    arranged,
    holds,
    sample_scene,
    sizes_for,
)

seeds = st.integers(0, 2**32)


def one(kind: str, colour: str, fill: str = "plain") -> Scene:
    return Scene("sky", 0, (Group(kind, colour, fill, "large", ((32, 32),)),))


@given(seeds)
def test_things_lie_inside_the_picture_and_relations_hold(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    assert 1 <= scene.things <= MAX_THINGS
    assert holds(scene.relation, scene.groups)
    for group in scene.groups:
        for x, y in group.places:
            edge = group.size_px / 2 + 1  # white
            assert edge <= min(x, y)
            assert max(x, y) <= SIZE - edge


@given(seeds)
def test_things_overlap_only_where_one_is_in_front(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    if scene.relation == "in front of":
        return
    boxes = [(x, y, g.size_px) for g in scene.groups for x, y in g.places]
    for i, (x, y, s) in enumerate(boxes):
        for u, v, t in boxes[:i]:
            assert max(abs(x - u), abs(y - v)) >= (s + t) / 2


@given(seeds, seeds)
def test_where_things_stand_follows_from_numbers_and_relation(one: int, other: int) -> None:
    scene = sample_scene(random.Random(one))
    counts = [group.count for group in scene.groups]
    rng = random.Random(other)
    anything = [Group(rng.choice(KINDS), "red", "plain", "small") for _ in counts]
    again = arranged(scene.relation, anything, counts)
    assert [group.places for group in again] == [group.places for group in scene.groups]


@given(seeds)
def test_groups_stand_in_the_order_of_mention(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    if scene.relation is None:
        read = [(y, x) for group in scene.groups for x, y in group.places]
        assert read == sorted(read)


@given(seeds)
def test_a_lone_pair_is_level_in_the_middle(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    if scene.things == 2 and scene.relation in (None, "left of"):
        assert {y for group in scene.groups for _, y in group.places} == {SIZE // 2}


@given(seeds)
def test_no_part_has_the_colour_of_its_thing_and_none_is_covered(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    for group in scene.groups:
        assert group.second != group.colour
        assert group.second is None or group.kind in PARTS
    if scene.relation == "in front of":
        assert scene.groups[0].second is None


@pytest.mark.parametrize("count", range(1, MAX_THINGS + 1))
def test_a_crowd_has_room_in_every_size_it_may_have(count: int) -> None:
    for size in sizes_for(None, [count]):
        (group,) = arranged(None, [Group("sun", "red", "plain", size)], [count])
        for i, (x, y) in enumerate(group.places):
            for u, v in group.places[:i]:
                assert max(abs(x - u), abs(y - v)) >= group.size_px + 2


def test_an_easy_world_has_single_things() -> None:
    rng = random.Random(0)
    assert {sample_scene(rng, hardness=0.0).things for _ in range(50)} == {1}


def test_the_whole_world_has_everything() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(1500)]
    groups = [group for scene in scenes for group in scene.groups]
    assert {group.kind for group in groups} == set(KINDS)
    assert {group.colour for group in groups} == set(COLOURS)
    assert {group.fill for group in groups} == set(FILLS)
    assert set(Counter(scene.things for scene in scenes)) == set(range(1, MAX_THINGS + 1))
    relations = {scene.relation for scene in scenes}
    assert relations == {None, "left of", "above", "between", "in front of"}
    assert min(SIZES.values()) >= 14
    assert {group.kind for group in groups if group.second} == set(PARTS)
    assert {group.second for group in groups} == {None, *COLOURS}


def test_every_kind_colour_and_fill_looks_different() -> None:
    looks = [
        draw_scene(one(kind, colour, fill)).tobytes()
        for kind in KINDS
        for colour in COLOURS
        for fill in FILLS
    ]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_a_part_is_seen_in_its_own_colour(kind: str, size: str) -> None:
    """At least three pixels of it, however small the thing."""
    for colour in COLOURS:
        own = "red" if colour != "red" else "blue"
        group = Group(kind, own, "plain", size, ((32, 32),), colour)
        there, without = (
            np.asarray(draw_scene(Scene("paper", 0, (one,))), int)
            for one in (group, replace(group, second=None))
        )
        near = np.abs(there - PALETTE[colour]).max(2) < 40
        assert (near & (np.abs(there - without).max(2) > 20)).sum() >= 3, colour


def test_a_picture_has_the_world_s_size() -> None:
    assert draw_scene(one("fish", "red")).size == (SIZE, SIZE)


def test_a_later_group_covers_an_earlier_one() -> None:
    back = Group("square", "red", "plain", "large", ((32, 32),))
    front = Group("circle", "blue", "plain", "small", ((32, 32),))
    red, _, blue = draw_scene(Scene("paper", 0, (back, front))).getpixel((32, 32))  # type: ignore[misc]
    assert blue > red


def test_one_scene_has_many_captions() -> None:
    scene, rng = one("fish", "red"), random.Random(0)
    captions = {caption(scene, rng) for _ in range(100)}
    assert len(captions) > 50
    assert all("fish" in text.lower() for text in captions)


def test_captions_name_both_sides_of_a_relation_the_right_way_round() -> None:
    house = Group("house", "red", "plain", "medium", ((15, 32),))
    tree = Group("tree", "green", "plain", "medium", ((48, 32),))
    scene, rng = Scene("snow", 0, (house, tree), "left of"), random.Random(0)
    for _ in range(200):
        text = caption(scene, rng).lower()
        house_at = max(text.find(word) for word in ("house", "cottage", "home"))
        tree_at = max(text.find(word) for word in ("tree", "fir"))
        if "left of" in text:
            assert house_at < tree_at, text
        if "right of" in text:
            assert tree_at < house_at, text


def test_captions_count() -> None:
    places = ((12, 12), (32, 32), (50, 50))
    scene = Scene("sky", 0, (Group("fish", "blue", "plain", "small", places),))
    rng = random.Random(0)
    texts = [caption(scene, rng).lower() for _ in range(100)]
    assert all("three" in text or "3" in text for text in texts)
