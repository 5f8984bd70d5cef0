"""Fills the cache without a server."""

from __future__ import annotations

import zlib

from argus.cache.cache import ApproximateCache
from argus.config import Settings
from argus.engine.engine import Engine
from argus.quality.encoder import PromptEncoder
from argus.server.model import ServedFamily


class Warmer:
    """Makes exact pictures and stores their latents, as the server with these settings would."""

    def __init__(self, settings: Settings, cache: ApproximateCache, namespace: str) -> None:
        self._cache = cache
        model = ServedFamily.of(settings)
        self._family = model.family
        exact = model.family.exact
        self._engine = Engine.load(
            str(model.folder), model.devices[0], model.models[0][0].dtype, exact.sampler,
            model.models[0][0].max_batch,
        )  # fmt: skip
        self._encoder = PromptEncoder.load(model.encoder)
        self._scope = model.scope(namespace, exact.width, exact.height, exact.guidance, "")

    def warm(self, prompt: str) -> bool:
        """Make and store a prompt's latents. False if they were all stored already."""
        held = self._cache.stored(self._scope, prompt)
        lacking = set(self._family.skips) - set(held.skips if held else ())
        if not lacking:
            return False
        exact = self._family.exact
        seed = zlib.crc32(prompt.encode())  # arbitrary, but the same every time
        kept = self._engine.run(exact.job(prompt, seed), keep=lacking).kept
        vector = self._encoder.embed(prompt).vector
        return self._cache.keep(self._scope, prompt, vector, kept) is not None
