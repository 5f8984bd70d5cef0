"""The family's scorer, in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

from PIL import Image

from argus.core.errors import BadRequest, ModelError
from argus.server.model import ServedFamily

log = logging.getLogger(__name__)

ASKED_LIMIT_S = 10.0
LIMIT_S = 30.0  # for the server's own: its first call may load the scorer
MOST_ASKED = 16  # pictures at a time that clients ask to be scored

if TYPE_CHECKING:
    from argus.quality.scorer import Scorer


class ScoringThread:
    """Scores pictures by the family's scorer, in a thread, and those that clients ask for in one of
    their own, so that they delay nothing else. The scorer is loaded at the first use."""

    def __init__(self, model: ServedFamily) -> None:
        self._spec = model.family.scorer
        self._scorer: Scorer | None = None
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._asked_thread = ThreadPoolExecutor(1, "scorer-asked")
        self._loading = Lock()
        self._asked = 0

    @property
    def able(self) -> bool:
        return self._spec is not None

    async def scores(
        self, prompt: str, images: list[Image.Image], limit_s: float = LIMIT_S
    ) -> list[float]:
        """The score of each image for the prompt. Raises ModelError if the scorer cannot be loaded,
        TimeoutError if it does not answer within `limit_s`, at most `LIMIT_S`."""
        async with asyncio.timeout(min(limit_s, LIMIT_S)):
            return await self._run(self._thread, prompt, images)

    async def _run(
        self, thread: ThreadPoolExecutor, prompt: str, images: list[Image.Image]
    ) -> list[float]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, self._score, prompt, images)

    async def asked(self, prompt: str, images: list[Image.Image]) -> list[float] | list[None]:
        """As `scores`, for a client: None for each image if they cannot be scored, not within
        `ASKED_LIMIT_S`, or too many are being scored."""
        unknown = [None] * len(images)
        if self._asked + len(images) > MOST_ASKED:
            return unknown
        self._asked += len(images)
        work = asyncio.create_task(self._run(self._asked_thread, prompt, images))
        try:
            await asyncio.wait([work], timeout=ASKED_LIMIT_S)
        finally:
            self._asked -= len(images)
            work.cancel()
        if not work.done() or work.cancelled():  # it takes too long, or the server ends
            return unknown
        error = work.exception()
        if error is None:
            return work.result()
        if not isinstance(error, BadRequest):  # its message may quote the prompt
            log.warning("A picture cannot be scored (%s)", type(error).__name__)
        return unknown

    def _score(self, prompt: str, images: list[Image.Image]) -> list[float]:
        found: list[float] = self._loaded().score([prompt] * len(images), images).tolist()
        return found

    def _loaded(self) -> Scorer:
        with self._loading:
            if self._scorer is None:
                from argus.quality.scorers import load_scorer  # may take seconds to import

                if self._spec is None:
                    raise ModelError("The family names no scorer.")
                self._scorer = load_scorer(self._spec)
            return self._scorer

    def close(self) -> None:
        for thread in (self._thread, self._asked_thread):
            thread.shutdown(wait=False, cancel_futures=True)
