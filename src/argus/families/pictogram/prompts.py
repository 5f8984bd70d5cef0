"""Reads a prompt: which things, with which looks, where. The other way round than `captions`.

Understands what `captions` can say, whatever words that mean nothing stand between; what a prompt
leaves open is None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from argus.families.pictogram.captions import (
    ABOVE,
    BACKGROUND_WORDS,
    BEHIND,
    BELOW,
    COLOUR_WORDS,
    ENDINGS,
    FILL_WORDS,
    FRONT,
    KIND_WORDS,
    LEFT,
    NUMBER_WORDS,
    OPENINGS,
    PART_WORDS,
    RIGHT,
    SIZE_WORDS,
)
from argus.families.pictogram.world import PARTS


@dataclass(frozen=True)
class AskedGroup:
    """Alike things that a prompt asks for; `second` is the colour of their named part."""

    kind: str
    count: int
    colour: str | None = None
    fill: str | None = None
    size: str | None = None
    second: str | None = None


@dataclass(frozen=True)
class AskedScene:
    """What a prompt asks for; groups in the order that `relation` means, as in `world.Scene`."""

    groups: tuple[AskedGroup, ...]
    background: str | None = None
    relation: str | None = None

    @property
    def things(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def facts(self) -> int:
        """How much is asked for: things and, once a group, each look; background; relation."""
        looks = sum(
            look is not None
            for group in self.groups
            for look in (group.kind, group.colour, group.fill, group.size, group.second)
        )
        return self.things + looks + (self.background is not None) + (self.relation is not None)


def read_prompt(prompt: str) -> AskedScene:
    """What a prompt asks for. Without a known thing in it, it has no groups."""
    text = " ".join(re.findall(r"[a-z0-9]+", prompt.lower()))
    background, text = _read_background(text)
    groups, between = _read_groups(text)
    return _relate(groups, between, background)


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt, in lower case and each once, that no caption has: nothing of what they
    mean is painted."""
    words = re.findall(r"\w+(?:['’]\w+)*", prompt.lower())
    words = [re.sub(r"['’]s$", "", word) for word in words]
    return [word for word in dict.fromkeys(words) if word not in _KNOWN]


def _alternatives(phrases: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {phrase: meaning for meaning, words in phrases.items() for phrase in words}


_BACKGROUNDS = _alternatives(BACKGROUND_WORDS)
_COLOURS, _FILLS, _SIZES = map(_alternatives, (COLOUR_WORDS, FILL_WORDS, SIZE_WORDS))
_FILLS |= {"checkered": "checked", "stripey": "striped"}
_NUMBERS = {word: n for n, words in NUMBER_WORDS.items() for word in words} | {"an": 1}
_NOUNS = {
    noun.split()[-1]: (kind, number > 0)
    for kind, nouns in KIND_WORDS.items()
    for forms in nouns
    for number, noun in enumerate(forms)
}

_PARTS = {
    word: {part for part, forms in PART_WORDS.items() if any(word in both for both in forms)}
    for forms in PART_WORDS.values()
    for both in forms
    for word in both
} | {"center": {"centre"}, "centers": {"centre"}}


_PLACES = (LEFT, RIGHT, ABOVE, BELOW, FRONT, BEHIND)
_LINKS = (  # words between things, and such as ask for nothing
    "an and are at between bottom has have in is it its left middle of on plus right side some "
    "that the there top which with"
)
_KNOWN = (
    {
        word
        for phrases in (_BACKGROUNDS, _COLOURS, _FILLS, _SIZES, _NUMBERS, _NOUNS, _PARTS, *_PLACES)
        for phrase in phrases
        for word in phrase.split()
    }
    | {
        word
        for names in KIND_WORDS.values()
        for forms in names
        for noun in forms
        for word in noun.split()
    }
    | set(re.findall(r"\w+", " ".join((*OPENINGS, *ENDINGS, _LINKS))))
)


def _read_background(text: str) -> tuple[str | None, str]:
    """The background that is named, and the text without its name."""
    for phrase in sorted(_BACKGROUNDS, key=len, reverse=True):
        found = re.search(rf"\b{phrase}\b", text)
        if found:
            rest = f"{text[: found.start()]} {text[found.end() :]}"
            return _BACKGROUNDS[phrase], " ".join(rest.split())
    return None, text


def _read_groups(text: str) -> tuple[list[AskedGroup], list[str]]:
    """The groups in the order they are named, and the words before, between and after them."""
    groups: list[AskedGroup] = []
    between: list[str] = []
    links: list[str] = []
    count, looks = None, dict[str, str]()
    for word in text.split():
        if word in _NOUNS:
            kind, plural = _NOUNS[word]
            groups.append(AskedGroup(kind, count or (2 if plural else 1), **looks))
            between.append(" ".join(links))
            links, count, looks = [], None, {}
        elif word in _PARTS and groups and PARTS.get(groups[-1].kind) in _PARTS[word]:
            colour = looks.get("colour")
            if colour != groups[-1].colour:
                groups[-1] = replace(groups[-1], second=colour or groups[-1].second)
            links, count, looks = [], None, {}
        elif word in _COLOURS:
            looks["colour"] = _COLOURS[word]
        elif word in _FILLS:
            looks["fill"] = _FILLS[word]
        elif word in _SIZES:
            looks["size"] = _SIZES[word]
        elif word in _NUMBERS:
            count = _NUMBERS[word]
        elif word == "pair":
            count = 2
        else:
            links.append(word)
    return groups, [*between, " ".join(links)]


def _relate(groups: list[AskedGroup], between: list[str], background: str | None) -> AskedScene:
    """Put the groups into the order that the words between them say."""
    relation = None
    if len(groups) > 1:
        link, last = between[1], between[2]
        turned = False
        if "between" in link and len(groups) > 2:
            relation = "between"
        elif _says(link, BEHIND):
            relation = "in front of"
        elif _says(link, FRONT):
            relation, turned = "in front of", True
        elif "on the left" in link and "on the right" in last:
            relation = "left of"
        elif "on the right" in link and "on the left" in last:
            relation, turned = "left of", True
        elif "at the top" in link and "at the bottom" in last:
            relation = "above"
        elif "at the bottom" in link and "at the top" in last:
            relation, turned = "above", True
        elif _says(link, LEFT):
            relation = "left of"
        elif _says(link, RIGHT):
            relation, turned = "left of", True
        elif _says(link, ABOVE):
            relation = "above"
        elif _says(link, BELOW):
            relation, turned = "above", True
        if turned:
            groups[0], groups[1] = groups[1], groups[0]
    return AskedScene(tuple(groups), background, relation)


def _says(link: str, phrases: tuple[str, ...]) -> bool:
    return any(re.search(rf"\b{phrase}\b", link) for phrase in phrases)
