"""The scorer `scene`: whether a picture shows all that its prompt asks for, as people count.

A picture is right if everything asked for holds: things, their number, their looks, where they
stand, and nothing else. One miss and it is wrong, as in GenEval (Ghosh et al. 2023,
arXiv 2310.11513, section 3). The share of what holds is kept beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment

from argus.core.errors import BadRequest
from argus.families.pictogram.prompts import AskedGroup, AskedScene, read_prompt
from argus.families.pictogram.scene.detector import (
    WEIGHTS,
    Detector,
    Sight,
    Thing,
    load_detector,
)
from argus.families.pictogram.world import SIZES

BATCH = 64
LOOKS = {"kind": 4.0, "colour": 2.0, "fill": 1.0, "size": 0.5, "second": 0.5}


@dataclass(frozen=True)
class Atom:
    """One thing that a prompt asks for.

    `part` is `object`, one of `LOOKS`, `count`, `nothing else`, `relation` or `background`.
    """

    part: str
    satisfied: bool


class SceneScorer:
    """Parses the prompt, finds the things in the picture, and compares."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    @classmethod
    def load(cls, source: str | None = None, device: str = "cpu") -> SceneScorer:
        """With the detector whose weights are the file `source`, by default the shipped one."""
        return cls(load_detector(WEIGHTS if source is None else Path(source), device))

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """1 for each picture (n,) that shows all that is asked for, 0 for the others.

        Raises BadRequest for a prompt that asks for nothing of this world.
        """
        return self.scores(prompts, images)["right"]

    def scores(
        self, prompts: Sequence[str], images: Sequence[Image.Image]
    ) -> dict[str, NDArray[np.float32]]:
        """`right` (n,) as in `score`, and `parts` (n,): the share of atoms that hold, 0 if none of
        the kinds that are asked for is there."""
        judged = self.judge(prompts, images)
        return {
            "right": np.array([right(atoms) for atoms in judged], np.float32),
            "parts": np.array([mean(atoms) for atoms in judged], np.float32),
        }

    def judge(
        self, prompts: Sequence[str], images: Sequence[Image.Image]
    ) -> list[tuple[Atom, ...]]:
        """What each prompt asks for and whether its picture shows it; errors as for `score`."""
        asked = [_read(prompt) for prompt in prompts]
        sights: list[Sight] = []
        for begin in range(0, len(images), BATCH):
            sights += self._detector.look(images[begin : begin + BATCH])
        return [atoms_of(scene, sight) for scene, sight in zip(asked, sights, strict=True)]


def right(atoms: Sequence[Atom]) -> bool:
    """Whether everything that is asked for holds."""
    return all(atom.satisfied for atom in atoms)


def mean(atoms: Sequence[Atom]) -> float:
    """The share of satisfied atoms; 0 without a thing of a kind that was asked for."""
    if not any(atom.satisfied for atom in atoms if atom.part == "kind"):
        return 0.0
    return sum(atom.satisfied for atom in atoms) / len(atoms)


def atoms_of(asked: AskedScene, sight: Sight) -> tuple[Atom, ...]:
    """Compare what is asked for with what is seen.

    Every thing that is asked for is paired with at most one that is seen, so that most looks fit
    (an optimal assignment); a thing has an atom for being there and one for each look that is
    named. A group has one for its count; the scene has one each for holding nothing else, for
    the relation and for the background.
    """
    pairs = _pairs(asked.groups, sight.things)
    atoms: list[Atom] = []
    for group, found in zip(asked.groups, pairs, strict=True):
        for i in range(group.count):
            thing = found[i] if i < len(found) else None
            atoms.append(Atom("object", thing is not None))
            for look in LOOKS:
                if getattr(group, look) is not None:
                    fits = thing is not None and getattr(thing, look) == getattr(group, look)
                    atoms.append(Atom(look, fits))
        atoms.append(Atom("count", _count(group, asked.groups, sight.things) == group.count))
    asked_things = sum(group.count for group in asked.groups)
    atoms.append(Atom("nothing else", len(sight.things) <= asked_things))
    if asked.relation is not None:
        atoms.append(Atom("relation", _related(asked.relation, asked.groups, pairs)))
    if asked.background is not None:
        atoms.append(Atom("background", sight.background == asked.background))
    return tuple(atoms)


def _read(prompt: str) -> AskedScene:
    asked = read_prompt(prompt)
    if not asked.groups:
        raise BadRequest(f"The scorer `scene` finds no thing of its world in {prompt!r}.")
    return asked


def _pairs(groups: Sequence[AskedGroup], things: Sequence[Thing]) -> list[list[Thing]]:
    """For every group the things that stand for its members; those of the right kind first."""
    members = [g for g, group in enumerate(groups) for _ in range(group.count)]
    found: list[list[Thing]] = [[] for _ in groups]
    if not things:
        return found
    worth = np.array([[_likeness(groups[g], thing) for thing in things] for g in members])
    for row, column in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
        if worth[row, column] >= LOOKS["colour"]:
            found[members[row]].append(things[int(column)])
    for group, those in zip(groups, found, strict=True):
        those.sort(key=lambda thing: thing.kind != group.kind)
    return found


def _likeness(group: AskedGroup, thing: Thing) -> float:
    """How much of what is asked a thing has; without its kind or colour it is another thing."""
    same = {look for look in LOOKS if getattr(group, look) == getattr(thing, look)}
    if not same & {"kind", "colour"}:
        return 0.0
    return sum(LOOKS[look] for look in same)


def _count(group: AskedGroup, groups: Sequence[AskedGroup], things: Sequence[Thing]) -> int:
    """How many things of the group's kind there are, less those of other groups of that kind, which
    are told apart by colour where all are named."""
    alike = [thing for thing in things if thing.kind == group.kind]
    others = [other for other in groups if other is not group and other.kind == group.kind]
    if not others:
        return len(alike)
    if None not in {group.colour, *(other.colour for other in others)}:
        return sum(thing.colour == group.colour for thing in alike)
    return len(alike) - sum(other.count for other in others)


def _related(relation: str, groups: Sequence[AskedGroup], pairs: Sequence[Sequence[Thing]]) -> bool:
    """Whether every thing of the related groups stands as the relation says."""
    members = [
        [thing for thing in found if thing.kind == group.kind]
        for group, found in zip(groups, pairs, strict=True)
    ]
    related = members[: 3 if relation == "between" else 2]
    if not all(related):
        return False
    if relation == "between":
        return _between(*(those[0] for those in related))
    return all(_stand(relation, p, q) for p in related[0] for q in related[1])


def _stand(relation: str, p: Thing, q: Thing) -> bool:
    if relation == "in front of":
        reach = (SIZES[p.size] + SIZES[q.size]) / 2
        return max(abs(p.x - q.x), abs(p.y - q.y)) < reach
    return q.x > p.x + 4 if relation == "left of" else q.y > p.y + 4


def _between(middle: Thing, one: Thing, other: Thing) -> bool:
    def amid(a: float, b: float, c: float) -> bool:
        return min(a, c) + 4 < b < max(a, c) - 4

    off_y = abs(middle.y - (one.y + other.y) / 2)
    off_x = abs(middle.x - (one.x + other.x) / 2)
    return (amid(one.x, middle.x, other.x) and off_y < 12) or (
        amid(one.y, middle.y, other.y) and off_x < 12
    )
