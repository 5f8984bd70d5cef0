"""What networks learn from, drawn by many processes and kept where they learn.

On a GPU a batch is learnt in a few milliseconds, so nothing of it may be made anew: scenes are
drawn and put into words beforehand, by all cores but one, while the GPU learns from the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from argus.families.pictogram.captions import caption
from argus.families.pictogram.tokenizer import token_ids
from argus.families.pictogram.train.components import Components
from argus.families.pictogram.train.detecting import loose_scene, targets_of
from argus.families.pictogram.train.drawing import as_bytes, pictures
from argus.families.pictogram.train.lessons import DETAILED, detailed, weights_of
from argus.families.pictogram.world import Scene, sample_scene

CHUNK = 500
CAPTIONS = 4

Rows = dict[str, Tensor]  # tensors of as many rows
# the same from another process, which tensors would tie to a file descriptor each
Drawn = dict[str, NDArray[Any]]
Draw = Callable[[int, int], Drawn]  # rows from one number to another


class Shelf:
    """The first `count` rows of a `draw`, on a device: at any time those that are drawn already."""

    def __init__(
        self, pool: ProcessPoolExecutor, draw: Draw, count: int, device: torch.device
    ) -> None:
        self._drawing: list[Future[Drawn]] = [
            pool.submit(draw, begin, min(begin + CHUNK, count)) for begin in range(0, count, CHUNK)
        ]
        self.count, self._device = count, device
        self._rows: Rows = {}
        self._ready = torch.zeros((), device=device)

    def fill(self, least: int = 0) -> int:
        """Take in what has been drawn, and wait until that is `least` rows; how many there are."""
        there = int(self._ready)
        while self._drawing and (there < least or self._drawing[0].done()):
            drawn = self._drawing.pop(0).result()
            chunk = {name: torch.from_numpy(values) for name, values in drawn.items()}
            for name, values in chunk.items():
                if name not in self._rows:
                    shape = (self.count, *values.shape[1:])
                    self._rows[name] = torch.empty(shape, dtype=values.dtype, device=self._device)
                self._rows[name][there : there + len(values)] = values.to(self._device)
            there += len(next(iter(chunk.values())))
        self._ready.fill_(there)
        return there

    def batch(self, size: int, among: Tensor | None = None) -> Rows:
        """Rows chosen at random, on the device; of those numbered `among`, if that is given."""
        ready = self._ready if among is None else len(among)
        chosen = (torch.rand(size, device=self._device) * ready).long()
        if among is not None:
            chosen = among[chosen]
        return {name: values[chosen] for name, values in self._rows.items()}

    def rows(self, name: str) -> Tensor:
        """The values of every row that is there."""
        return self._rows[name][: int(self._ready)]


@contextmanager
def artists(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that draw, one thread each."""
    context = get_context("forkserver")
    pool = ProcessPoolExecutor(count, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def draw_lessons(folder: Path, components: Path, seed: int, begin: int, end: int) -> Drawn:
    """Of scenes: `latents` (n, c, 8, 8) in float16, the weights of cells by their `things`
    (n, 8, 8), the token `ids` (n, 4, 40) of four captions, and whether they are `detailed`."""
    scenes, ids = [], []
    tokenizer, coder = _tokenizer(folder), _components(components)
    for i in range(begin, end):
        rng = random.Random(f"lesson {seed} {i}")
        scenes.append(_often_detailed(rng))
        ids += [caption(scenes[-1], rng) for _ in range(CAPTIONS)]
    with torch.no_grad():
        latents = coder.encode(pictures(scenes)).half()
    rows = {
        "latents": latents,
        "things": torch.stack([weights_of(scene) for scene in scenes]),
        "ids": token_ids(tokenizer, ids).view(len(scenes), CAPTIONS, -1).short(),
        "detailed": torch.tensor([detailed(scene) for scene in scenes]),
    }
    return {name: values.numpy() for name, values in rows.items()}


def _often_detailed(rng: random.Random) -> Scene:
    """Scenes in which a part has a colour of its own come `DETAILED` times as often as others."""
    while True:
        scene = sample_scene(rng)
        if detailed(scene) or rng.random() < 1 / DETAILED:
            return scene


def draw_sights(seed: int, begin: int, end: int) -> Drawn:
    """For the detector: `pictures` (n, 3, 64, 64) as bytes, and what it should say of them."""
    scenes = [loose_scene(random.Random(f"sight {seed} {i}")) for i in range(begin, end)]
    rows = {"pictures": as_bytes(pictures(scenes)), **vars(targets_of(scenes))}
    return {name: values.numpy() for name, values in rows.items()}


@cache
def _tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


@cache
def _components(file: Path) -> Components:
    return Components.load(file)
