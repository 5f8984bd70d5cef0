"""Puts scenes into words: one scene, many prompts.

A caption may leave out what a person would leave out (the size of a thing, the background), so the
same words can ask for little or for much. What it does say is true of the scene.
"""

from __future__ import annotations

import random

from argus.families.pictogram.world import PARTS, Group, Scene

Wordings = tuple[str, ...]

KIND_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("disc", "discs"), ("ball", "balls")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "moon": (("moon", "moons"), ("crescent", "crescents")),
    "sun": (("sun", "suns"),),
    "flower": (("flower", "flowers"), ("blossom", "blossoms")),
    "house": (("house", "houses"), ("cottage", "cottages"), ("home", "homes")),
    "tree": (("tree", "trees"), ("fir", "firs")),
    "boat": (("boat", "boats"), ("ship", "ships"), ("sailing boat", "sailing boats")),
    "fish": (("fish", "fish"),),
    "key": (("key", "keys"),),
    "cup": (("cup", "cups"), ("mug", "mugs")),
    "mushroom": (("mushroom", "mushrooms"), ("toadstool", "toadstools")),
    "umbrella": (("umbrella", "umbrellas"), ("parasol", "parasols")),
}
COLOUR_WORDS: dict[str, Wordings] = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "black": ("black",),
}
FILL_WORDS: dict[str, Wordings] = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "outlined": ("outlined", "hollow"),
    "checked": ("checked", "chequered"),
}
PART_WORDS: dict[str, tuple[tuple[str, str], ...]] = {  # of one thing, of several
    "rays": (("rays", "rays"),),
    "centre": (("centre", "centres"), ("middle", "middles")),
    "roof": (("roof", "roofs"),),
    "trunk": (("trunk", "trunks"), ("stem", "stems")),
    "sails": (("sails", "sails"), ("sail", "sails")),
    "tail": (("tail", "tails"),),
    "handle": (("handle", "handles"),),
    "stem": (("stem", "stems"), ("stalk", "stalks")),
}
SIZE_WORDS: dict[str, Wordings] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "middling"),
    "large": ("large", "big", "huge"),
}
BACKGROUND_WORDS: dict[str, Wordings] = {
    "sky": ("in the sky", "against the sky", "up in the sky", "sky"),
    "meadow": ("in a meadow", "on the grass", "on a green field", "meadow"),
    "sea": ("at sea", "in the sea", "on the water", "sea"),
    "night": ("at night", "in the night", "in the dark", "night"),
    "desert": ("in the desert", "on the sand", "among the dunes", "desert"),
    "snow": ("in the snow", "in winter", "on a snowy day", "snow"),
    "paper": ("on paper", "on squared paper", "on a sheet of paper", "paper"),
    "room": ("in a room", "indoors", "on a wooden floor", "room"),
}
NUMBER_WORDS: dict[int, Wordings] = {
    1: ("a", "a", "a", "a", "one", "a single", "1"),
    2: ("two", "two", "two", "2", "a pair of"),
    3: ("three", "three", "three", "3"),
    4: ("four", "four", "four", "4"),
    5: ("five", "five", "five", "5"),
    6: ("six", "six", "six", "6"),
    7: ("seven", "seven", "seven", "7"),
    8: ("eight", "eight", "eight", "8"),
    9: ("nine", "nine", "nine", "9"),
}
LEFT = ("left of", "to the left of", "on the left of")
RIGHT = ("right of", "to the right of", "on the right of")
ABOVE = ("above", "over", "higher than")
BELOW = ("below", "under", "beneath")
FRONT = ("in front of", "covering")
BEHIND = ("behind", "partly hidden by")

OPENINGS = (
    "a picture of", "an illustration of", "a drawing of", "a painting of", "draw", "show me",
    "paint", "a cartoon of", "stickers:", "a cute picture of", "please draw",
)  # fmt: skip
ENDINGS = (
    "cartoon style", "high quality", "cute", "digital art", "simple", "flat design", "detailed",
    "sticker art", "beautiful", "for children",
)  # fmt: skip


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many ways to ask for this scene."""
    text = _things(scene, rng)
    if rng.random() < 0.06:
        text = _with_strange_word(text, rng)
    if rng.random() < 0.15:
        text = f"{rng.choice(OPENINGS)} {text}"
    if rng.random() < 0.72:
        text = _with_background(text, rng.choice(BACKGROUND_WORDS[scene.background]), rng)
    if rng.random() < 0.12:
        text = f"{text}, {rng.choice(ENDINGS)}"
    if rng.random() < 0.1:
        text = f"{text}."
    return text[0].upper() + text[1:] if rng.random() < 0.2 else text


def _things(scene: Scene, rng: random.Random) -> str:
    """Groups in their order, from which follows where they stand, unless a relation says it."""
    kinds = [group.kind for group in scene.groups]
    phrases = [_phrase(group, rng, kinds.count(group.kind) == 1) for group in scene.groups]
    if scene.relation is None:
        return _listed(phrases, rng)
    if scene.relation == "between":
        link = rng.choice(("between", "in between", "in the middle between"))
        return f"{phrases[0]} {link} {phrases[1]} and {phrases[2]}"
    first, second = phrases[0], phrases[1]
    turned = rng.random() < 0.5
    if scene.relation == "in front of":
        if turned:
            return f"{first} {rng.choice(BEHIND)} {second}"
        return f"{second} {rng.choice(FRONT)} {first}"
    if scene.relation == "left of":
        if rng.random() < 0.15:
            ends = [f"{first} on the left", f"{second} on the right"]
            return " and ".join(ends[::-1] if turned else ends)
        forward, backward = LEFT, RIGHT
    else:
        if rng.random() < 0.15:
            ends = [f"{first} at the top", f"{second} at the bottom"]
            return " and ".join(ends[::-1] if turned else ends)
        forward, backward = ABOVE, BELOW
    if turned:
        return f"{second} {rng.choice(backward)} {first}"
    return f"{first} {rng.choice(forward)} {second}"


def _phrase(group: Group, rng: random.Random, may_leave_out_colour: bool) -> str:
    size = rng.random() < (0.12 if group.size == "medium" else 0.5)
    fill = rng.random() < (0.08 if group.fill == "plain" else 0.92)
    words = []
    if size:
        words.append(rng.choice(SIZE_WORDS[group.size]))
    looks = []
    if fill:
        looks.append(rng.choice(FILL_WORDS[group.fill]))
    if rng.random() < 0.92 or not may_leave_out_colour:
        looks.append(_colour(group.colour, rng))
    if rng.random() < 0.3:
        looks.reverse()
    nouns = KIND_WORDS[group.kind]
    singular, plural = nouns[0] if rng.random() < 0.7 else rng.choice(nouns)
    words += [*looks, singular if group.count == 1 else plural]
    number = rng.choice(NUMBER_WORDS[group.count])
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    phrase = " ".join([number, *words])
    return phrase if group.second is None else f"{phrase} with {_part(group, rng)}"


def _part(group: Group, rng: random.Random) -> str:
    """The part with a colour of its own, which is always named."""
    assert group.second is not None
    singular, plural = rng.choice(PART_WORDS[PARTS[group.kind]])
    colour = _colour(group.second, rng)
    if group.count > 1 or singular == plural:
        return f"{colour} {plural}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {singular}"


def _colour(colour: str, rng: random.Random) -> str:
    names = COLOUR_WORDS[colour]
    return names[0] if rng.random() < 0.8 else rng.choice(names)


def _listed(phrases: list[str], rng: random.Random) -> str:
    if len(phrases) == 1:
        return phrases[0]
    last = rng.choice((" and ", " and ", " with ", ", ", " plus "))
    return ", ".join(phrases[:-1]) + last + phrases[-1]


def _with_background(text: str, place: str, rng: random.Random) -> str:
    bare = " " not in place and place != "indoors"
    draw = rng.random()
    if bare:
        return f"{place}: {text}" if draw < 0.2 else f"{text}, {place}"
    if draw < 0.2:
        return f"{place}, {text}"
    return f"{text}, {place}" if draw < 0.4 else f"{text} {place}"


def _with_strange_word(text: str, rng: random.Random) -> str:
    """Put in a word that means nothing, so that unknown words in prompts do no harm.

    It stands before a look or a thing, or at either end: not within a phrase such as "left of".
    """
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 9)))
    words = text.split()
    may = [0, len(words), *(i for i, old in enumerate(words) if old in _LOOKS)]
    words.insert(rng.choice(may), word)
    return " ".join(words)


_LOOKS = {
    word
    for words in (COLOUR_WORDS, FILL_WORDS, SIZE_WORDS)
    for alternatives in words.values()
    for word in alternatives
}
