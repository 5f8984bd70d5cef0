"""Fills the cache without a server."""

from __future__ import annotations

import zlib

from argus.cache.cache import ApproximateCache
from argus.cache.scope import Scope
from argus.config import Settings
from argus.core.job import Job
from argus.engine.engine import Engine
from argus.engine.loading import default_device, default_dtype, model_folder
from argus.quality.encoder import PromptEncoder
from argus.server.service import family_of, model_id


class Warmer:
    """Makes exact pictures and keeps their latents, as the server with these settings would."""

    def __init__(self, settings: Settings, cache: ApproximateCache, namespace: str) -> None:
        self._cache, self._family = cache, family_of(settings)
        exact = self._family.exact
        folder = model_folder(self._family.models[exact.model])
        device = settings.device or default_device()
        dtype = settings.dtype or default_dtype(device)
        self._engine = Engine.load(str(folder), device, dtype, exact.sampler)
        self._encoder = PromptEncoder.load(folder)
        self._scope = Scope(
            "" if settings.cache_scope == "shared" else namespace,
            model_id(self._family, folder),
            exact.sampler,
            exact.width,
            exact.height,
            exact.steps,
            exact.guidance,
            "",
        )

    def warm(self, prompt: str) -> bool:
        """Whether the prompt was not there yet and now is."""
        if self._cache.holds(self._scope, prompt):
            return False
        exact = self._family.exact
        seed = zlib.crc32(prompt.encode())  # any will do; this one is the same every time
        job = Job(
            prompt, seed=seed, steps=exact.steps, guidance=exact.guidance,
            width=exact.width, height=exact.height,
        )  # fmt: skip
        kept = self._engine.run(job, keep=list(self._family.skips)).kept
        vector = self._encoder.embed(prompt).vector
        return self._cache.keep(self._scope, prompt, vector, kept) is not None
