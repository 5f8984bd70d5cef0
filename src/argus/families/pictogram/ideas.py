"""What people may ask of this world, for the workload generator: ideas are scenes."""

from __future__ import annotations

import random
from dataclasses import replace

from argus.families.pictogram.captions import caption
from argus.families.pictogram.prompts import unknown_words
from argus.families.pictogram.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    MAX_THINGS,
    PARTS,
    Group,
    Scene,
    arranged,
    sample_scene,
    sizes_for,
)

CHANGES = ("background", "colour", "kind", "fill", "size", "second", "scene", "layout")
_WEIGHTS = (4, 4, 3, 2, 2, 2, 1, 2)


class SceneIdeas:
    """Themes are backgrounds; each comes with some kinds of thing more often than with others."""

    themes = len(BACKGROUNDS)

    def fresh(self, rng: random.Random, theme: int) -> Scene:
        while True:
            scene = replace(sample_scene(rng), background=BACKGROUNDS[theme])
            usual = any(KINDS.index(g.kind) % self.themes == theme for g in scene.groups)
            if usual or rng.random() < 0.4:
                return scene

    def varied(self, rng: random.Random, idea: Scene) -> Scene:
        while True:
            try:
                return changed(rng, idea, rng.choices(CHANGES, _WEIGHTS)[0])
            except ValueError:  # nothing of this idea can change so
                continue

    def words(self, rng: random.Random, idea: Scene) -> str:
        return caption(idea, rng)

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(prompt)


def changed(rng: random.Random, scene: Scene, change: str) -> Scene:
    """The scene with one thing about it changed.

    `change` is one of `CHANGES`: `scene` draws another one; `layout` turns what the relation says
    round or, without one, counts more or fewer things; `second` gives a part a colour, another or
    none; the others replace the background, or that look of one group. Raises ValueError where
    nothing of the scene can change so: a crowd is small, and not everything has a part.
    """
    if change == "scene":
        return replace(sample_scene(rng), background=scene.background)
    if change == "background":
        return replace(scene, background=_other(rng, BACKGROUNDS, scene.background))
    if change == "layout":
        return _laid_out_anew(rng, scene)
    found = [
        groups
        for at in range(len(scene.groups))
        for value in _choices(scene, at, change)
        if (groups := _with(scene.groups, at, change, value)) is not None
    ]
    if not found:
        raise ValueError(f"No {change} of {scene} can change.")
    return replace(scene, groups=rng.choice(found))


def _choices(scene: Scene, at: int, change: str) -> tuple[str | None, ...]:
    """What else a look of a group may be."""
    group = scene.groups[at]
    relation, counts = scene.relation, [one.count for one in scene.groups]
    choices: tuple[str | None, ...]
    if change == "size":
        choices = sizes_for(relation, counts) if relation != "in front of" else ()
    elif change == "second":
        covered = relation == "in front of" and at == 0
        named = tuple(one for one in COLOURS if one != group.colour)
        choices = (None, *named) if group.kind in PARTS and not covered else ()
    else:
        choices = {"colour": COLOURS, "kind": KINDS, "fill": FILLS}[change]
    return tuple(value for value in choices if value != getattr(group, change))


def _with(
    groups: tuple[Group, ...], at: int, change: str, value: str | None
) -> tuple[Group, ...] | None:
    """The groups with one look of one of them replaced; None if two could be confused then."""
    new = replace(groups[at], **{change: value})  # type: ignore[arg-type]
    if new.kind not in PARTS or new.second == new.colour:
        new = replace(new, second=None)
    result = (*groups[:at], new, *groups[at + 1 :])
    apart = len({(group.kind, group.colour) for group in result}) == len(result)
    return result if apart else None


def _laid_out_anew(rng: random.Random, scene: Scene) -> Scene:
    groups, counts = list(scene.groups), [group.count for group in scene.groups]
    if scene.relation is not None:
        groups[:2], counts[:2] = groups[1::-1], counts[1::-1]
        if scene.relation == "in front of":  # a thing behind is the larger one, in one colour
            back, front = groups
            groups = [replace(back, size=front.size, second=None), replace(front, size=back.size)]
        return replace(scene, groups=arranged(scene.relation, groups, counts))
    at = rng.randrange(len(groups))
    room = MAX_THINGS - scene.things + counts[at]
    counts[at] = rng.choice([n for n in range(1, room + 1) if n != counts[at]] or [counts[at]])
    sizes = sizes_for(None, counts)
    groups = [g if g.size in sizes else replace(g, size=sizes[-1]) for g in groups]
    return replace(scene, groups=arranged(None, groups, counts))


def _other(rng: random.Random, values: tuple[str, ...], but: str) -> str:
    return rng.choice([value for value in values if value != but])
