"""Embeds the prompts of concurrent requests together."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from argus.server.threads import loaded

if TYPE_CHECKING:
    from argus.quality.encoder import Embedding, PromptEncoder

MOST = 64  # prompts in a batch


class Embedder:
    """Embeds prompts in a thread of its own; those that come while it is busy are its next batch,
    which costs little more than one prompt. For use from one asyncio loop, until `close`.

    `encoder` may not be set yet; prompts wait for it.
    """

    def __init__(self, encoder: Future[PromptEncoder]) -> None:
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(1, "embed-prompts")
        self._waiting: list[tuple[str, asyncio.Future[Embedding]]] = []
        self._working: asyncio.Task[None] | None = None

    async def encoder(self) -> PromptEncoder:
        """The encoder, once it is loaded. Raises the error that prevents it."""
        return await loaded(self._encoder)

    async def embed(self, prompt: str) -> Embedding:
        """As `PromptEncoder.embed`."""
        answer: asyncio.Future[Embedding] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, answer))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        encoder, loop = await self.encoder(), asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            batch = [one for one in batch if not one[1].done()]  # the others were cancelled
            prompts = [prompt for prompt, _ in batch]
            try:
                found = await loop.run_in_executor(self._thread, encoder.embed_all, prompts)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), embedding in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(embedding)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
