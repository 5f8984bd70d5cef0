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
    SIZES,
    Scene,
    sample_scene,
)

CHANGES = ("background", "colour", "kind", "fill", "size", "scene", "layout")
_WEIGHTS = (4, 4, 3, 2, 2, 1, 2)


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
        return changed(rng, idea, rng.choices(CHANGES, _WEIGHTS)[0])

    def words(self, rng: random.Random, idea: Scene) -> str:
        return caption(idea, rng)

    def unknown_words(self, prompt: str) -> list[str]:
        return unknown_words(prompt)


def changed(rng: random.Random, scene: Scene, change: str) -> Scene:
    """The scene with one thing about it changed.

    `change` is one of `CHANGES`: `scene` draws another one; `layout` turns what the relation says
    round or, without one, counts more or fewer things; the others replace the background, or that
    look of one group. Places of things stay as they were, since prompts do not say them.
    """
    if change == "scene":
        return replace(sample_scene(rng), background=scene.background)
    if change == "background":
        return replace(scene, background=_other(rng, BACKGROUNDS, scene.background))
    if change == "layout":
        return _laid_out_anew(rng, scene)
    choices = {"colour": COLOURS, "kind": KINDS, "fill": FILLS, "size": tuple(SIZES)}[change]
    while True:
        at = rng.randrange(len(scene.groups))
        new = _other(rng, choices, getattr(scene.groups[at], change))
        groups = list(scene.groups)
        groups[at] = replace(groups[at], **{change: new})  # type: ignore[arg-type]
        if len({(group.kind, group.colour) for group in groups}) == len(groups):
            return replace(scene, groups=tuple(groups))


def _laid_out_anew(rng: random.Random, scene: Scene) -> Scene:
    groups = list(scene.groups)
    if scene.relation is not None:
        groups[:2] = groups[1::-1]
        return replace(scene, groups=tuple(groups))
    at = rng.randrange(len(groups))
    group = groups[at]
    room = MAX_THINGS - scene.things + group.count
    count = rng.choice([n for n in range(1, room + 1) if n != group.count] or [group.count])
    groups[at] = replace(group, places=(group.places * count)[:count])
    return replace(scene, groups=tuple(groups))


def _other(rng: random.Random, values: tuple[str, ...], but: str) -> str:
    return rng.choice([value for value in values if value != but])
