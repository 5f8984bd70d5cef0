"""The world that `pictogram` paints: scenes of pictograms, as data.

A scene is a background and up to nine things, kept in groups of alike things and tied by at most
one relation. It is sampled here, drawn in `draw` and put into words in `captions`.
Positions and sizes are pixels of a `SIZE` × `SIZE` picture, the origin at its upper left.

Where things stand follows from what a prompt says: every number of things and every relation has
one arrangement (`arranged`), filled in the order of mention. A small diffusion model does not learn
to choose between arrangements; it blends them, and things come twice. What a prompt leaves open is
left to chance only within a thing (its unnamed looks) and behind all of them (the background).

Centres of things are multiples of 8, which is what one latent covers, so that a shape looks the
same to the networks wherever it stands. A small thing and its white edge are 16 pixels wide: they
fill two by two latents.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

SIZE = 64
MAX_THINGS = 9

KINDS = (
    "circle", "square", "triangle", "star", "heart", "moon", "sun", "flower",
    "house", "tree", "boat", "fish", "key", "cup", "mushroom", "umbrella",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
FILLS = ("plain", "striped", "dotted", "outlined", "checked")
SIZES = {"small": 14, "medium": 20, "large": 28}
# The part of a kind of thing that may have a colour of its own.
PARTS = {
    "sun": "rays", "flower": "centre", "house": "roof", "tree": "trunk", "boat": "sails",
    "fish": "tail", "cup": "handle", "mushroom": "stem", "umbrella": "handle",
}  # fmt: skip
BACKGROUNDS = ("sky", "meadow", "sea", "night", "desert", "snow", "paper", "room")
BACKGROUND_VARIATIONS = 4
RELATIONS = ("left of", "above", "between", "in front of")

Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Group:
    """Things that look alike, and where the centre of each of them is.

    `second` is the colour of the part that `PARTS` names, None if it has none of its own.
    """

    kind: str
    colour: str
    fill: str
    size: str
    places: Places = ()
    second: str | None = None

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def size_px(self) -> int:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """A picture's content. Groups are painted in order, so a later one covers an earlier one.

    `relation` speaks of the groups in order: the first is left of or above the second, the first
    is between the second and the third, or the second (painted later) is in front of the first.
    Right of and below are ways of saying it. Without a relation, things stand in the order of
    mention as one reads.
    """

    background: str
    variation: int
    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def things(self) -> int:
        return sum(group.count for group in self.groups)


# Arrangements ------------------------------------------------------------------------------------

_ALONE: dict[int, Places] = {
    1: ((32, 32),),
    2: ((16, 32), (48, 32)),
    3: ((32, 16), (16, 48), (48, 48)),
    4: ((16, 16), (48, 16), (16, 48), (48, 48)),
    5: ((16, 16), (48, 16), (32, 32), (16, 48), (48, 48)),
    6: ((8, 16), (32, 16), (56, 16), (8, 48), (32, 48), (56, 48)),
    7: ((16, 8), (48, 8), (8, 32), (32, 32), (56, 32), (16, 56), (48, 56)),
    8: ((8, 8), (32, 8), (56, 8), (16, 32), (48, 32), (8, 56), (32, 56), (56, 56)),
    9: tuple((x, y) for y in (8, 32, 56) for x in (8, 32, 56)),
}
_LINE = {1: (32,), 2: (16, 48), 3: (8, 32, 56)}
_SIDES = (16, 48)


def arranged(
    relation: str | None, groups: Sequence[Group], counts: Sequence[int]
) -> tuple[Group, ...]:
    """The groups with the places at which `counts` things of each stand, as the words say."""
    if relation == "between":
        places: list[Places] = [((32, 32),), ((8, 32),), ((56, 32),)]
    elif relation == "in front of":
        places = [((32, 32),), ((40, 40),)]
    elif relation == "left of":
        places = [
            tuple((side, at) for at in _LINE[n]) for side, n in zip(_SIDES, counts, strict=True)
        ]
    elif relation == "above":
        places = [
            tuple((at, side) for at in _LINE[n]) for side, n in zip(_SIDES, counts, strict=True)
        ]
    else:
        free = iter(_ALONE[sum(counts)])
        places = [tuple(next(free) for _ in range(n)) for n in counts]
    return tuple(replace(g, places=at) for g, at in zip(groups, places, strict=True))


def sizes_for(relation: str | None, counts: Sequence[int]) -> tuple[str, ...]:
    """The sizes for which an arrangement has room; of `in front of` for the thing behind."""
    if relation == "in front of":
        return ("medium", "large")
    if relation in ("left of", "above"):
        room = 1 if max(counts) > 2 else 2 if sum(counts) > 2 else 3
    elif relation == "between":
        room = 1
    else:
        room = 3 if sum(counts) <= 2 else 2 if sum(counts) <= 4 else 1
    return tuple(SIZES)[:room]


# Sampling ----------------------------------------------------------------------------------------

SECOND_SHARE = 0.35  # of groups whose kind has a part, of those in crowded lists half of that
_APART = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (3, 3))


def sample_scene(rng: random.Random, hardness: float = 1.0) -> Scene:
    """Draw a scene at random.

    `hardness` in [0, 1] grows the world from single things (0) to its whole self (1).
    """
    layout = rng.choices(_LAYOUTS, _WEIGHTS)[0] if rng.random() < hardness else _alone
    relation, groups = layout(rng)
    background, variation = rng.choice(BACKGROUNDS), rng.randrange(BACKGROUND_VARIATIONS)
    return Scene(background, variation, groups, relation)


Layout = tuple[str | None, tuple[Group, ...]]


def _alone(rng: random.Random) -> Layout:
    return _filled(rng, None, [1])


def _alike(rng: random.Random) -> Layout:
    return _filled(rng, None, [rng.choice((2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9))])


def _listed(rng: random.Random) -> Layout:
    while True:
        counts = [rng.choice((1, 1, 1, 2, 2, 3)) for _ in range(rng.choice((2, 2, 2, 3, 3)))]
        if sum(counts) <= MAX_THINGS:
            return _filled(rng, None, counts)


def _pair(rng: random.Random) -> Layout:
    return _filled(rng, rng.choice(("left of", "above")), [1, 1])


def _groups_apart(rng: random.Random) -> Layout:
    return _filled(rng, rng.choice(("left of", "above")), rng.choice(_APART))


def _between(rng: random.Random) -> Layout:
    return _filled(rng, "between", [1, 1, 1])


def _in_front(rng: random.Random) -> Layout:
    return _filled(rng, "in front of", [1, 1])


_LAYOUTS: tuple[Callable[[random.Random], Layout], ...] = (
    _alone, _alike, _pair, _listed, _groups_apart, _between, _in_front,
)  # fmt: skip
_WEIGHTS = (20, 20, 12, 18, 16, 6, 8)


def _filled(rng: random.Random, relation: str | None, counts: Sequence[int]) -> Layout:
    """An arrangement filled with things, of which no two groups share both kind and colour."""
    sizes = sizes_for(relation, counts)
    chosen: list[Group] = []
    share = SECOND_SHARE / (2 if len(counts) > 2 else 1)
    while len(chosen) < len(counts):
        group = _looks(rng, sizes, share)
        if relation == "in front of":
            group = _behind(group) if not chosen else replace(group, size=_before(rng, chosen[0]))
        if all((group.kind, group.colour) != (c.kind, c.colour) for c in chosen):
            chosen.append(group)
    return relation, arranged(relation, chosen, counts)


def _looks(rng: random.Random, sizes: tuple[str, ...], share: float) -> Group:
    kind, colour = rng.choice(KINDS), rng.choice(COLOURS)
    second = None
    if kind in PARTS and rng.random() < share:
        second = rng.choice([one for one in COLOURS if one != colour])
    fill = rng.choices(FILLS, (5, 2, 2, 2, 2))[0]
    return Group(kind, colour, fill, rng.choice(sizes), second=second)


def _behind(group: Group) -> Group:
    """Without a second colour, which may be what is covered."""
    return replace(group, second=None)


def _before(rng: random.Random, back: Group) -> str:
    return rng.choice(("small", "medium")) if back.size == "large" else "small"


def holds(relation: str | None, groups: Sequence[Group]) -> bool:
    """Whether the groups' places satisfy the relation that is said of them."""
    if relation is None or relation == "in front of":
        return True
    if relation == "between":
        (bx, by), (ax, ay), (cx, cy) = (g.places[0] for g in groups[:3])
        return min(ax, cx) < bx < max(ax, cx) and abs(by - (ay + cy) / 2) < 8
    axis = 0 if relation == "left of" else 1
    first, second = groups[0], groups[1]
    gap = (first.size_px + second.size_px) / 2
    return all(q[axis] - p[axis] >= gap for p in first.places for q in second.places)
