"""The prompts of a measurement: from a file, or from the family's own ideas."""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass
from pathlib import Path

from argus.core.errors import BadRequest, ModelError
from argus.core.family import Family
from argus.lab.workload import Ideas, distinct_prompts

THEMES = 8


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line, each once. Raises BadRequest if there are none."""
    return list(dict.fromkeys(prompt_lines(path)))


def prompt_lines(path: Path) -> list[str]:
    """The prompts of a file, one a line, in its order. Raises BadRequest if there are none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"The prompts in {path} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadRequest(f"{path} holds no prompts. Write one a line.")
    return prompts


def find_prompts(family: Family, asked: str, seed: int = 0) -> list[str]:
    """The prompts of a file or, if `asked` is a number, that many of the family's own workload.

    Raises BadRequest if there are none, or the family has no workload.
    """
    if not asked.isdecimal():
        return read_prompts(Path(asked))
    if int(asked) < 1:
        raise BadRequest("The number of prompts must be at least 1.")
    return distinct_prompts(ideas_of(family), int(asked), seed)


def split_prompts(family: Family, asked: str, donors: str | None) -> tuple[list[str], list[str]]:
    """Prompts to measure, and other prompts for the cache that their pictures resume from.

    Without `donors` these are half as many more prompts of the family's workload, or every third
    prompt of the file; for a family without skips none. Raises BadRequest if either list would be
    empty but for that.
    """
    if donors is None and not family.skips:
        return find_prompts(family, asked), []
    if asked.isdecimal() and (donors is None or donors.isdecimal()):
        more = max(1, int(asked) // 2) if donors is None else int(donors)
        both = find_prompts(family, str(int(asked) + more))  # both get its favourites
        random.Random("split").shuffle(both)
        prompts, others = both[: int(asked)], both[int(asked) :]
    elif donors is not None:
        prompts = find_prompts(family, asked)
        others = [prompt for prompt in find_prompts(family, donors) if prompt not in prompts]
    else:
        both = read_prompts(Path(asked))
        others = both[2::3]
        prompts = [prompt for i, prompt in enumerate(both) if i % 3 != 2]
    if not others:
        raise BadRequest(
            "No prompts are left for the cache: give at least three prompts, or other --donors."
        )
    return prompts, others


def ideas_of(family: Family) -> Ideas:
    """The source of a family's own prompts. Raises BadRequest if it has none, ModelError if it
    cannot be imported."""
    if family.ideas is None:
        raise BadRequest(
            f"The family {family.name} has no prompts of its own: give a file, one prompt a line."
        )
    module, name = family.ideas.split(":")
    try:
        ideas: Ideas = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"The ideas {family.ideas} cannot be imported: {error}") from error
    return ideas


@dataclass
class WrittenIdeas:
    """Real prompts as ideas. An idea is a prompt; it is varied in the parts after its first comma,
    which in such prompts name styles, by removing one or inserting one of another prompt."""

    prompts: list[str]
    themes: int = THEMES

    def __post_init__(self) -> None:
        by_theme: list[list[str]] = [[] for _ in range(self.themes)]
        for prompt in self.prompts:
            by_theme[_theme_of(prompt, self.themes)].append(prompt)
        self._by_theme = [some or self.prompts for some in by_theme]
        self._styles = [s for prompt in self.prompts for s in _styles(prompt)]

    def fresh(self, rng: random.Random, theme: int) -> str:
        return rng.choice(self._by_theme[theme])

    def varied(self, rng: random.Random, idea: str) -> str:
        subject, styles = idea.split(",")[0], _styles(idea)
        if styles and (rng.random() < 0.5 or not self._styles):
            styles.pop(rng.randrange(len(styles)))
        elif self._styles:
            styles.insert(rng.randint(0, len(styles)), rng.choice(self._styles))
        return ", ".join([subject, *styles])

    def words(self, rng: random.Random, idea: str) -> str:
        return idea


def _styles(prompt: str) -> list[str]:
    return [style.strip() for style in prompt.split(",")[1:] if style.strip()]


def _theme_of(prompt: str, themes: int) -> int:
    """Prompts whose subject ends alike share a theme."""
    words = prompt.split(",")[0].lower().split() or [""]
    return sum(words[-1].encode()) % themes
