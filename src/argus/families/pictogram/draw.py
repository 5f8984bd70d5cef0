"""Draws scenes with Pillow: every thing a sticker with a white edge on a quiet background.

Drawing happens `SCALE` times larger and is reduced at the end, which antialiases it. Stickers and
backgrounds are drawn once and kept, so a scene costs about a millisecond.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache, lru_cache

from PIL import Image, ImageDraw, ImageFilter

from argus.families.pictogram.world import SIZE, SIZES, Scene

SCALE = 4
RIM = 2  # of a pattern's thing, in its colour
RGB = tuple[int, int, int]
Points = list[tuple[float, float]]

PALETTE: dict[str, RGB] = {
    "red": (222, 44, 48),
    "orange": (245, 138, 24),
    "yellow": (248, 208, 44),
    "green": (40, 158, 76),
    "blue": (40, 100, 220),
    "purple": (132, 62, 178),
    "pink": (246, 128, 180),
    "black": (44, 44, 54),
}
CREAM: RGB = (255, 252, 244)


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `SIZE` × `SIZE` pixels."""
    canvas = _background(scene.background, scene.variation).copy()
    for group in scene.groups:
        sticker = _sticker(group.kind, group.colour, group.fill, group.size, group.second)
        for x, y in group.places:
            corner = (x * SCALE - sticker.width // 2, y * SCALE - sticker.height // 2)
            canvas.paste(sticker, corner, sticker)
    return canvas.reduce(SCALE)


# Things ------------------------------------------------------------------------------------------


class Pen:
    """Draws on one layer of a sticker, in units of the sticker: (0, 0) to (1, 1)."""

    def __init__(self, side: int, pad: int) -> None:
        self.layer = Image.new("L", (side + 2 * pad, side + 2 * pad), 0)
        self._draw = ImageDraw.Draw(self.layer)
        self._side, self._pad = side, pad

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return self._pad + x * (self._side - 1), self._pad + y * (self._side - 1)

    def polygon(self, points: Points, ink: int = 255) -> None:
        self._draw.polygon([self._at(x, y) for x, y in points], fill=ink)

    def box(self, x0: float, y0: float, x1: float, y1: float, ink: int = 255) -> None:
        self._draw.rectangle([self._at(x0, y0), self._at(x1, y1)], fill=ink)

    def oval(self, x: float, y: float, rx: float, ry: float | None = None, ink: int = 255) -> None:
        ry = rx if ry is None else ry
        self._draw.ellipse([self._at(x - rx, y - ry), self._at(x + rx, y + ry)], fill=ink)

    def slice(self, x: float, y: float, r: float, start: float, end: float) -> None:
        self._draw.pieslice([self._at(x - r, y - r), self._at(x + r, y + r)], start, end, fill=255)


Drawing = Callable[[Pen, Pen, Pen], None]  # body, named part, details


def _spokes(n: int, outer: float, inner: float, turn: float = -90) -> Points:
    return [
        (0.5 + r * math.cos(a), 0.5 + r * math.sin(a))
        for i in range(2 * n)
        for r, a in [(outer if i % 2 == 0 else inner, math.radians(turn + 180 * i / n))]
    ]


def _circle(body: Pen, _: Pen, __: Pen) -> None:
    body.oval(0.5, 0.5, 0.48)


def _square(body: Pen, _: Pen, __: Pen) -> None:
    body.box(0.05, 0.05, 0.95, 0.95)


def _triangle(body: Pen, _: Pen, __: Pen) -> None:
    body.polygon([(0.5, 0.02), (0.99, 0.94), (0.01, 0.94)])


def _star(body: Pen, _: Pen, __: Pen) -> None:
    body.polygon([(x, y + 0.04) for x, y in _spokes(5, 0.525, 0.235)])


def _heart(body: Pen, _: Pen, __: Pen) -> None:
    body.oval(0.27, 0.31, 0.26)
    body.oval(0.73, 0.31, 0.26)
    body.polygon([(0.06, 0.45), (0.27, 0.31), (0.73, 0.31), (0.94, 0.45), (0.5, 0.97)])


def _moon(body: Pen, _: Pen, __: Pen) -> None:
    body.oval(0.48, 0.5, 0.48)
    body.oval(0.72, 0.42, 0.40, ink=0)


def _sun(body: Pen, rays: Pen, details: Pen) -> None:
    for pen in (body, rays):
        pen.polygon(_spokes(10, 0.5, 0.34))
    rays.oval(0.5, 0.5, 0.25, ink=0)
    details.oval(0.41, 0.45, 0.045)
    details.oval(0.59, 0.45, 0.045)
    details.oval(0.5, 0.58, 0.09, 0.05)


def _flower(body: Pen, centre: Pen, _: Pen) -> None:
    for i in range(5):
        a = math.radians(-90 + 72 * i)
        body.oval(0.5 + 0.29 * math.cos(a), 0.52 + 0.29 * math.sin(a), 0.215)
    for pen in (body, centre):
        pen.oval(0.5, 0.52, 0.26)


def _house(body: Pen, roof: Pen, details: Pen) -> None:
    body.box(0.72, 0.06, 0.86, 0.34)
    for pen in (body, roof):
        pen.polygon([(0.5, 0.0), (1.0, 0.46), (0.0, 0.46)])
    body.box(0.11, 0.42, 0.89, 0.97)
    details.box(0.22, 0.57, 0.42, 0.76)
    details.box(0.56, 0.57, 0.76, 0.97)


def _tree(body: Pen, trunk: Pen, _: Pen) -> None:
    body.polygon([(0.5, 0.0), (0.80, 0.32), (0.20, 0.32)])
    body.polygon([(0.5, 0.12), (0.90, 0.51), (0.10, 0.51)])
    body.polygon([(0.5, 0.27), (0.98, 0.68), (0.02, 0.68)])
    for pen in (body, trunk):
        pen.box(0.33, 0.68, 0.67, 1.0)


def _boat(body: Pen, sails: Pen, details: Pen) -> None:
    body.polygon([(0.0, 0.68), (1.0, 0.68), (0.82, 0.96), (0.18, 0.96)])
    for pen in (body, sails):
        pen.polygon([(0.50, 0.02), (0.50, 0.62), (0.10, 0.62)])
        pen.polygon([(0.58, 0.16), (0.58, 0.62), (0.92, 0.62)])
    body.box(0.47, 0.02, 0.56, 0.70)
    details.box(0.10, 0.70, 0.90, 0.77)


def _fish(body: Pen, tail: Pen, details: Pen) -> None:
    body.oval(0.40, 0.5, 0.40, 0.29)
    body.polygon([(0.30, 0.26), (0.52, 0.08), (0.58, 0.30)])
    for pen in (body, tail):
        pen.polygon([(0.68, 0.5), (1.0, 0.16), (1.0, 0.84)])
    details.oval(0.20, 0.43, 0.065)
    details.box(0.36, 0.34, 0.41, 0.68)


def _key(body: Pen, _: Pen, __: Pen) -> None:
    body.oval(0.26, 0.40, 0.26)
    body.box(0.48, 0.32, 1.0, 0.50)
    body.box(0.64, 0.46, 0.76, 0.74)
    body.box(0.86, 0.46, 1.0, 0.82)
    body.oval(0.26, 0.40, 0.10, ink=0)


def _cup(body: Pen, handle: Pen, details: Pen) -> None:
    for pen in (body, handle):
        pen.oval(0.74, 0.50, 0.26)
        pen.oval(0.74, 0.50, 0.09, ink=0)
    mug = [(0.02, 0.14), (0.72, 0.14), (0.67, 0.94), (0.08, 0.94)]
    body.polygon(mug)
    handle.polygon(mug, ink=0)
    details.box(0.02, 0.20, 0.72, 0.29)


def _mushroom(body: Pen, stem: Pen, details: Pen) -> None:
    body.slice(0.5, 0.54, 0.50, 180, 360)
    for pen in (body, stem):
        pen.polygon([(0.34, 0.55), (0.66, 0.55), (0.74, 0.97), (0.26, 0.97)])
    details.oval(0.30, 0.34, 0.08)
    details.oval(0.58, 0.24, 0.10)
    details.oval(0.76, 0.42, 0.06)


def _umbrella(body: Pen, handle: Pen, details: Pen) -> None:
    body.slice(0.5, 0.54, 0.50, 180, 360)
    for x in (0.17, 0.5, 0.83):
        body.oval(x, 0.56, 0.115, 0.08, ink=0)
    for pen in (body, handle):
        pen.box(0.43, 0.48, 0.59, 0.84)
        pen.slice(0.40, 0.80, 0.19, 0, 180)
        pen.oval(0.38, 0.79, 0.045, ink=0)
    body.box(0.46, 0.02, 0.54, 0.10)
    details.polygon([(0.5, 0.06), (0.37, 0.50), (0.31, 0.50)])
    details.polygon([(0.5, 0.06), (0.63, 0.50), (0.69, 0.50)])


_DRAWINGS: dict[str, Drawing] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "heart": _heart, "moon": _moon, "sun": _sun, "flower": _flower,
    "house": _house, "tree": _tree, "boat": _boat, "fish": _fish,
    "key": _key, "cup": _cup, "mushroom": _mushroom, "umbrella": _umbrella,
}  # fmt: skip
_PALE_PARTS = ("flower", "mushroom")  # cream where no prompt colours them; others as their thing


@lru_cache(maxsize=10_000)
def _sticker(kind: str, colour: str, fill: str, size: str, second: str | None) -> Image.Image:
    """One thing as an RGBA picture, `SCALE` times its size, with its white edge.

    A part without a colour of its own is cream or as its thing, which no named colour is.
    """
    side, edge = SIZES[size] * SCALE, 4
    body, part, details = (Pen(side, edge + 1) for _ in range(3))
    _DRAWINGS[kind](body, part, details)
    ink = PALETTE[colour]
    accent = _mix(ink, CREAM, 0.78) if colour == "black" else _mix(ink, (20, 16, 40), 0.55)

    art = Image.new("RGB", body.layer.size, ink)
    if fill == "outlined":
        art.paste(CREAM, mask=body.layer.filter(ImageFilter.MinFilter(2 * round(side * 0.04) + 3)))
        accent = ink
    elif fill != "plain":
        within = body.layer.filter(ImageFilter.MinFilter(2 * RIM + 1))  # a rim keeps its shape
        art.paste(_mix(ink, CREAM, 0.82), mask=_both(_pattern(fill, art.size), within))
    art.paste(accent, mask=_both(details.layer, body.layer))
    if second is not None:
        art.paste(PALETTE[second], mask=part.layer)
    elif kind in _PALE_PARTS:
        art.paste(ink if fill == "outlined" else CREAM, mask=part.layer)

    sticker = Image.new("RGBA", art.size, (255, 255, 255, 0))
    sticker.paste((255, 255, 255, 255), mask=body.layer.filter(ImageFilter.MaxFilter(2 * edge + 1)))
    sticker.paste(art, mask=body.layer)
    return sticker


def _pattern(fill: str, size: tuple[int, int]) -> Image.Image:
    """A mask of rising stripes (5 px apart), staggered dots (5 px apart) or a chessboard (4 px)."""
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    width, height = size
    if fill == "striped":
        for x in range(-height, width, 5 * SCALE):
            pen.line([(x, height), (x + height, 0)], fill=255, width=int(1.8 * SCALE))
    elif fill == "checked":
        step = 4 * SCALE
        for row, y in enumerate(range(height // 2 % step - step, height, step)):
            for column, x in enumerate(range(width // 2 % step - step, width, step)):
                if (row + column) % 2:
                    pen.rectangle([x, y, x + step - 1, y + step - 1], fill=255)
    else:
        step = 5 * SCALE
        for row, y in enumerate(range(step // 2, height, step)):
            for x in range(step // 2 + (row % 2) * step // 2, width, step):
                r = 1.3 * SCALE
                pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
    return mask


def _both(a: Image.Image, b: Image.Image) -> Image.Image:
    return Image.composite(a, Image.new("L", a.size, 0), b)


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    r, g, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, blue


# Backgrounds -------------------------------------------------------------------------------------

_SIDE = SIZE * SCALE


@cache
def _background(name: str, variation: int) -> Image.Image:
    rng = random.Random(f"{name} {variation}")
    return _BACKGROUNDS[name](rng)


def _gradient(top: RGB, bottom: RGB) -> Image.Image:
    column = Image.new("RGB", (1, 64))
    for y in range(64):
        column.putpixel((0, y), _mix(top, bottom, y / 63))
    return column.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _hill(
    image: Image.Image, colour: RGB, height: float, swell: float, waves: float, phase: float
) -> None:
    """Paint everything below a wavy line at `height` (0 top, 1 bottom)."""
    line = [
        (x, _SIDE * (height + swell * math.sin(waves * 2 * math.pi * x / _SIDE + phase)))
        for x in range(0, _SIDE + 4, 4)
    ]
    ImageDraw.Draw(image).polygon([*line, (_SIDE + 4, _SIDE), (0, _SIDE)], fill=colour)


def _sky(rng: random.Random) -> Image.Image:
    image = _gradient((116, 190, 244), (206, 234, 252))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, s = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.85), rng.uniform(0.05, 0.08)
        for dx, dy, r in ((-1.1, 0.25, 0.7), (0, 0, 1.0), (1.1, 0.25, 0.75), (0.1, 0.4, 0.7)):
            cx, cy, cr = (x + dx * s) * _SIDE, (y + dy * s) * _SIDE, r * s * _SIDE
            pen.ellipse([cx - cr * 1.2, cy - cr, cx + cr * 1.2, cy + cr], fill=(240, 248, 254))
    return image


def _meadow(rng: random.Random) -> Image.Image:
    image = _gradient((170, 218, 246), (226, 244, 240))
    phase = rng.uniform(0, 6)
    _hill(image, (150, 206, 118), 0.30, 0.05, 1.0, phase)
    _hill(image, (124, 190, 96), 0.52, 0.05, 1.3, phase + 2)
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = rng.uniform(0.03, 0.97) * _SIDE, rng.uniform(0.62, 0.97) * _SIDE
        for lean in (-5, 0, 5):
            pen.line([(x, y), (x + lean, y - 11)], fill=(92, 164, 76), width=3)
    return image


def _sea(rng: random.Random) -> Image.Image:
    image = _gradient((64, 172, 204), (28, 112, 172))
    pen = ImageDraw.Draw(image)
    for row in range(6):
        y, phase = (0.08 + 0.17 * row) * _SIDE, rng.uniform(0, 6)
        line = [(x, y + 5 * math.sin(x / 13 + phase)) for x in range(0, _SIDE + 3, 3)]
        pen.line(line, fill=(104, 196, 220), width=4)
    return image


def _night(rng: random.Random) -> Image.Image:
    image = _gradient((20, 22, 58), (58, 52, 108))
    pen = ImageDraw.Draw(image)
    for _ in range(16):
        x, y, r = rng.uniform(0.03, 0.97) * _SIDE, rng.uniform(0.03, 0.80) * _SIDE, 3
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(236, 230, 190))
    _hill(image, (30, 28, 62), 0.86, 0.04, 1.2, rng.uniform(0, 6))
    return image


def _desert(rng: random.Random) -> Image.Image:
    image = _gradient((252, 226, 178), (254, 242, 214))
    phase = rng.uniform(0, 6)
    _hill(image, (238, 204, 146), 0.40, 0.06, 0.8, phase)
    _hill(image, (226, 186, 124), 0.66, 0.05, 1.2, phase + 2.5)
    return image


def _snow(rng: random.Random) -> Image.Image:
    image = _gradient((176, 196, 222), (214, 226, 240))
    _hill(image, (234, 241, 249), 0.60, 0.05, 1.0, rng.uniform(0, 6))
    pen = ImageDraw.Draw(image)
    for _ in range(18):
        x, y, r = rng.uniform(0.03, 0.97) * _SIDE, rng.uniform(0.03, 0.55) * _SIDE, 3.5
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(248, 251, 255))
    return image


def _paper(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), (250, 246, 228))
    pen = ImageDraw.Draw(image)
    shift = rng.randrange(4) * 9
    for at in range(shift, _SIDE, 36):
        pen.line([(at, 0), (at, _SIDE)], fill=(206, 220, 234), width=3)
        pen.line([(0, at), (_SIDE, at)], fill=(206, 220, 234), width=3)
    return image


def _room(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), (226, 212, 236))
    pen = ImageDraw.Draw(image)
    shift = rng.randrange(4) * 12
    for x in range(shift - 48, _SIDE, 48):
        pen.rectangle([x, 0, x + 20, _SIDE], fill=(214, 198, 228))
    floor = int(0.76 * _SIDE)
    pen.rectangle([0, floor, _SIDE, _SIDE], fill=(190, 142, 100))
    pen.rectangle([0, floor - 6, _SIDE, floor], fill=(248, 240, 250))
    for row, y in enumerate(range(floor + 23, _SIDE, 23)):
        pen.line([(0, y), (_SIDE, y)], fill=(164, 118, 80), width=3)
        for x in range(40 + 50 * (row % 2), _SIDE, 100):
            pen.line([(x, y - 23), (x, y)], fill=(164, 118, 80), width=3)
    return image


_BACKGROUNDS: dict[str, Callable[[random.Random], Image.Image]] = {
    "sky": _sky, "meadow": _meadow, "sea": _sea, "night": _night,
    "desert": _desert, "snow": _snow, "paper": _paper, "room": _room,
}  # fmt: skip
