"""A workload of prompts like those of real users: some are popular, many are variations of a user's
last one, and themes change over time.

The family defines the ideas (`Ideas`); this file draws users, themes and variations.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class Ideas(Protocol):
    """The source of prompts. An idea may be of any type."""

    themes: int

    def fresh(self, rng: random.Random, theme: int) -> Any:
        """A new idea of a theme in [0, themes)."""

    def varied(self, rng: random.Random, idea: Any) -> Any:
        """The idea with one change."""

    def words(self, rng: random.Random, idea: Any) -> str:
        """A prompt for the idea, one of several."""


@runtime_checkable
class Reader(Protocol):
    """Ideas that also say which words of a prompt mean nothing to the family. Optional."""

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that no picture of the family shows, each once."""


@dataclass(frozen=True)
class Habits:
    """The habits of users. All are assumed, but chosen so that similarities are distributed as
    those of real prompts.

    A share `popular` of runs begins with one of `favourites` ideas, drawn by Zipf's law with
    exponent `zipf`. After each request a user continues with probability `persistence`, and then
    varies the idea with probability `variation`, else only its words. `users` are active at a time.
    The weights of themes move in waves of `drift` requests; the most popular theme is requested
    `contrast` times as often as the least.
    """

    popular: float = 0.3
    favourites: int = 300
    zipf: float = 1.05
    persistence: float = 0.6
    variation: float = 0.75
    users: int = 20
    drift: int = 3000
    contrast: float = 8.0


@dataclass(frozen=True)
class Request:
    """A prompt, its user and theme, and whether it continues the user's last request."""

    prompt: str
    user: int
    theme: int
    continues: bool


@dataclass
class _Run:
    """A user's present run of requests."""

    user: int
    theme: int
    idea: Any


def workload(ideas: Ideas, seed: int = 0, habits: Habits | None = None) -> Iterator[Request]:
    """An endless sequence of requests, the same for the same seed."""
    habits = habits or Habits()
    rng = random.Random(f"workload {seed}")
    favourites = _Favourites(ideas, habits, random.Random(f"favourites {seed}"))
    users = itertools.count()
    runs: list[_Run | None] = [None] * habits.users
    for number in itertools.count():
        place = rng.randrange(habits.users)
        run = runs[place]
        continues = run is not None and rng.random() < habits.persistence
        if run is None or not continues:
            theme = _theme(rng, ideas.themes, number, habits)
            popular = rng.random() < habits.popular
            idea = favourites.draw(rng, theme) if popular else ideas.fresh(rng, theme)
            run = _Run(next(users), theme, idea)
        elif rng.random() < habits.variation:
            run.idea = ideas.varied(rng, run.idea)
        runs[place] = run
        yield Request(ideas.words(rng, run.idea), run.user, run.theme, continues)


def distinct_prompts(ideas: Ideas, count: int, seed: int = 0) -> list[str]:
    """The first `count` distinct prompts of a workload."""
    found: dict[str, None] = {}
    for request in workload(ideas, seed):
        found.setdefault(request.prompt)
        if len(found) == count:
            return list(found)
    raise AssertionError("a workload never ends")


class _Favourites:
    """Popular ideas of every theme, drawn by Zipf's law."""

    def __init__(self, ideas: Ideas, habits: Habits, rng: random.Random) -> None:
        each = max(1, habits.favourites // ideas.themes)
        self._ideas = [[ideas.fresh(rng, t) for _ in range(each)] for t in range(ideas.themes)]
        weights = [rank**-habits.zipf for rank in range(1, each + 1)]
        self._sums = list(itertools.accumulate(weights))

    def draw(self, rng: random.Random, theme: int) -> Any:
        at = bisect.bisect_left(self._sums, rng.random() * self._sums[-1])
        return self._ideas[theme][at]


def _theme(rng: random.Random, themes: int, number: int, habits: Habits) -> int:
    """A theme drawn by the weights now: a wave that passes over the themes every `drift`
    requests."""
    swing = math.log(habits.contrast) / 2
    turns = number / habits.drift
    weights = [
        math.exp(swing * math.cos(2 * math.pi * (turns - t / themes))) for t in range(themes)
    ]
    return rng.choices(range(themes), weights)[0]
