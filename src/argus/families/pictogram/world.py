"""The world that `pictogram` paints: scenes of pictograms, as data.

A scene is a background and up to five things, kept in groups of alike things and tied by at most
one relation. It is sampled here, drawn in `draw` and put into words in `captions`.
Positions and sizes are pixels of a `SIZE` × `SIZE` picture, the origin at its upper left.

Centres of things are multiples of `GRID`. At 8, which is what one latent covers, a shape looks the
same to the networks wherever it stands; at 1 they have to learn it in 64 positions against the
latents, which takes many times longer. A world grows harder by making `GRID` smaller.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

SIZE = 64
MARGIN = 1
GRID = 8
MAX_THINGS = 5

KINDS = (
    "circle", "square", "triangle", "star", "heart", "moon", "sun", "flower",
    "house", "tree", "boat", "fish", "key", "cup", "mushroom", "umbrella",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
FILLS = ("plain", "striped", "dotted", "outlined")
SIZES = {"small": 15, "medium": 20, "large": 28}
BACKGROUNDS = ("sky", "meadow", "sea", "night", "desert", "snow", "paper", "room")
BACKGROUND_VARIATIONS = 4
RELATIONS = ("left of", "above", "between", "in front of")


@dataclass(frozen=True)
class Group:
    """Things that look alike, and where the centre of each of them is."""

    kind: str
    colour: str
    fill: str
    size: str
    places: tuple[tuple[int, int], ...] = ()

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
    Groups past those it speaks of stand anywhere. Right of and below are ways of saying it.
    """

    background: str
    variation: int
    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def things(self) -> int:
        return sum(group.count for group in self.groups)


def sample_scene(rng: random.Random, hardness: float = 1.0) -> Scene:
    """Draw a scene at random.

    `hardness` in [0, 1] grows the world from single things (0) to its whole self (1).
    """
    layout = rng.choices(_LAYOUTS, _WEIGHTS)[0] if rng.random() < hardness else _alone
    while (result := layout(rng)) is None:
        pass
    relation, groups = result
    background, variation = rng.choice(BACKGROUNDS), rng.randrange(BACKGROUND_VARIATIONS)
    return Scene(background, variation, groups, relation)


Layout = tuple[str | None, tuple[Group, ...]] | None


def _looks(rng: random.Random, sizes: tuple[str, ...] = tuple(SIZES)) -> Group:
    fill = rng.choices(FILLS, (5, 2, 2, 2))[0]
    return Group(rng.choice(KINDS), rng.choice(COLOURS), fill, rng.choice(sizes))


def _sizes_for(things: int) -> tuple[str, ...]:
    return ("small", "medium", "large") if things <= 2 else ("small", "medium")


def _alone(rng: random.Random) -> Layout:
    return _spread(rng, [(_looks(rng), 1)], None)


def _alike(rng: random.Random) -> Layout:
    count = rng.choice((2, 2, 3, 3, 4, 5))
    return _spread(rng, [(_looks(rng, _sizes_for(count)), count)], None)


def _list(rng: random.Random) -> Layout:
    groups = rng.choice((2, 2, 3))
    counts = [1 if groups == 3 else rng.choice((1, 1, 2)) for _ in range(groups)]
    return _spread(rng, _several(rng, counts), None)


def _pair(rng: random.Random) -> Layout:
    return _spread(rng, _several(rng, [1, 1]), rng.choice(("left of", "above")))


def _groups_apart(rng: random.Random) -> Layout:
    counts = rng.choice(([1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [2, 3], [3, 2]))
    return _spread(rng, _several(rng, counts), rng.choice(("left of", "above")))


def _between(rng: random.Random) -> Layout:
    middle, one, other = (group for group, _ in _several(rng, [1, 1, 1]))
    (ax, ay), (cx, cy) = _place(rng, one), _place(rng, other)
    place = (_snapped((ax + cx) / 2), _snapped((ay + cy) / 2))
    groups = tuple(
        replace(group, places=(at,))
        for group, at in ((middle, place), (one, (ax, ay)), (other, (cx, cy)))
    )
    fits = _inside(*place, middle) and _apart(groups) and holds("between", groups)
    return ("between", groups) if fits else None


def _in_front(rng: random.Random) -> Layout:
    back = _looks(rng, ("medium", "large"))
    front = _looks(rng, ("small", "medium") if back.size == "large" else ("small",))
    if (back.kind, back.colour) == (front.kind, front.colour):
        return None
    (x, y) = _place(rng, back)
    reach = int(0.42 * back.size_px)
    sx, sy = rng.choice((-1, 1)), rng.choice((-1, 1))
    fx, fy = _snapped(x + sx * reach), _snapped(y + sy * reach)
    if not _inside(fx, fy, front):
        return None
    return "in front of", (replace(back, places=((x, y),)), replace(front, places=((fx, fy),)))


_LAYOUTS: tuple[Callable[[random.Random], Layout], ...] = (
    _alone, _alike, _pair, _list, _groups_apart, _between, _in_front,
)  # fmt: skip
_WEIGHTS = (22, 18, 18, 14, 12, 8, 8)


def _several(rng: random.Random, counts: list[int]) -> list[tuple[Group, int]]:
    """Groups that no prompt could confuse: no two share both kind and colour."""
    sizes = _sizes_for(sum(counts))
    chosen: list[Group] = []
    while len(chosen) < len(counts):
        group = _looks(rng, sizes)
        if all((group.kind, group.colour) != (c.kind, c.colour) for c in chosen):
            chosen.append(group)
    return list(zip(chosen, counts, strict=True))


def _spread(rng: random.Random, wanted: list[tuple[Group, int]], relation: str | None) -> Layout:
    """Put every thing somewhere free of the others, as the relation asks; None if it fails."""
    for _ in range(60):
        groups = tuple(
            replace(group, places=tuple(_place(rng, group) for _ in range(count)))
            for group, count in wanted
        )
        if _apart(groups) and holds(relation, groups):
            return relation, groups
    return None


def _place(rng: random.Random, group: Group) -> tuple[int, int]:
    edge = group.size_px // 2 + MARGIN
    first = -(-edge // GRID) * GRID
    return rng.randrange(first, SIZE - edge + 1, GRID), rng.randrange(first, SIZE - edge + 1, GRID)


def _snapped(position: float) -> int:
    return round(position / GRID) * GRID


def _inside(x: int, y: int, group: Group) -> bool:
    edge = group.size_px // 2 + MARGIN
    return edge <= x <= SIZE - edge and edge <= y <= SIZE - edge


def _apart(groups: tuple[Group, ...]) -> bool:
    spots = [(x, y, g.size_px) for g in groups for x, y in g.places]
    for i, (x, y, s) in enumerate(spots):
        for u, v, t in spots[:i]:
            if max(abs(x - u), abs(y - v)) < (s + t) / 2 + 1:
                return False
    return True


def holds(relation: str | None, groups: tuple[Group, ...]) -> bool:
    """Whether the groups' places satisfy the relation that is said of them."""
    if relation is None:
        return True
    if relation == "between":
        (bx, by), (ax, ay), (cx, cy) = (g.places[0] for g in groups[:3])
        along_x = (ax < bx < cx or cx < bx < ax) and abs(by - (ay + cy) / 2) < 8
        along_y = (ay < by < cy or cy < by < ay) and abs(bx - (ax + cx) / 2) < 8
        level = abs(ay - cy) < 14 if along_x else abs(ax - cx) < 14
        return (along_x or along_y) and level
    if relation == "in front of":
        return True
    axis = 0 if relation == "left of" else 1
    first, second = groups[0], groups[1]
    gap = (first.size_px + second.size_px) / 2
    for p in first.places:
        for q in second.places:
            if q[axis] - p[axis] < gap:
                return False
            lone = first.count == second.count == 1
            if lone and abs(q[1 - axis] - p[1 - axis]) > 0.8 * (q[axis] - p[axis]):
                return False
    return True
