"""All a server is made of, put together from its settings."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import Future
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING

from argus.config import Settings
from argus.server.dispatcher import Dispatcher
from argus.server.errors import ApiError, invalid
from argus.server.keys import KeyRing
from argus.server.metrics import Metrics
from argus.server.model import ServedModel
from argus.server.pictures import PictureStore
from argus.server.retrieval import Retrieval
from argus.server.routing import Router
from argus.server.storage import open_cache
from argus.workers.local import LocalWorker, State
from argus.workers.messages import Model

if TYPE_CHECKING:
    from argus.quality.encoder import PromptEncoder

SIDE_STEP = 8  # what the sides of a picture must be multiples of in every Stable Diffusion model
SETTLE_S = 5.0  # for latents behind the last answers; without them the cache is only emptier
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Service:
    """Raises BadRequest and ModelError for settings that cannot be served."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.keys = None if settings.api_key_file is None else KeyRing(settings.api_key_file)
        self.model = model = ServedModel.of(settings)
        self.family = model.family
        router = Router(self.family, settings.policy)
        loading: Future[PromptEncoder] = Future()
        self._encoder = loading
        self.worker = LocalWorker(
            Model(
                str(model.folder),
                self.family.exact.sampler,
                model.device,
                model.dtype,
                max_batch=model.max_batch,
                compiled=settings.compile,
            )
        )
        self.metrics = Metrics()
        self.cache = open_cache(settings)
        self.retrieval = Retrieval(self.cache)
        self.pictures = PictureStore(settings.data / "pictures", settings.url_ttl_s)
        self.dispatcher = Dispatcher(
            model, router, loading, self.retrieval, self.worker, self.metrics,
            settings.queue_limit, settings.timeout_s,
        )  # fmt: skip
        self.draining = False

    @property
    def model_names(self) -> list[str]:
        """What a request may name: the family, or one of its variants."""
        name = self.family.name
        return [name, *(f"{name}/{variant}" for variant in self.model.variants)]

    def variant_of(self, model: str) -> str | None:
        """The variant that a request's `model` pins, None if it names the family.

        Raises ApiError for a name that is not in `model_names`.
        """
        if model not in self.model_names:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"There is no model {model!r}; there is {', '.join(self.model_names)}.",
                "model_not_found",
                "model",
            )
        return model.removeprefix(self.family.name).removeprefix("/") or None

    def size_of(self, size: str | None) -> tuple[int, int]:
        """Width and height in pixels that a request's `size` asks for.

        Raises ApiError for sizes that are not near what the family was made for.
        """
        exact = self.family.exact
        if size is None or size == "auto":
            return exact.width, exact.height
        match = _SIZE.fullmatch(size)
        sides = (int(match[1]), int(match[2])) if match else (0, 0)
        for side, own in zip(sides, (exact.width, exact.height), strict=True):
            if not own // 2 <= side <= own * 2 or side % SIDE_STEP:
                raise invalid(
                    f"size is {size!r}; it must be auto or WIDTHxHEIGHT in multiples of "
                    f"{SIDE_STEP}, from {exact.width // 2}x{exact.height // 2} to "
                    f"{exact.width * 2}x{exact.height * 2}. This family is made for "
                    f"{exact.width}x{exact.height}.",
                    "size",
                )
        return sides

    def unavailable(self) -> ApiError:
        """Why no picture can be made now."""
        if self.draining:
            return ApiError(503, "The server is shutting down.", "shutting_down")
        problem = self.problem
        if problem is not None:
            return ApiError(503, f"This server cannot work: {problem}", "worker_unusable")
        return ApiError(503, "The model is loading.", "loading", headers={"Retry-After": "5"})

    @property
    def problem(self) -> Exception | None:
        """What keeps this server from ever making a picture."""
        failed = self._encoder.exception() if self._encoder.done() else None
        return self.worker.problem or (failed if isinstance(failed, Exception) else None)

    @property
    def ready(self) -> bool:
        loaded = self._encoder.done() and self.worker.state is State.READY
        return loaded and not self.draining and self.problem is None

    def start(self) -> None:
        """Load the model in its worker and the prompt encoder here, side by side."""
        self.worker.start()
        Thread(target=self._load_encoder, daemon=True).start()

    def _load_encoder(self) -> None:
        try:
            from argus.quality import encoder  # here, because it takes seconds to import

            self._encoder.set_result(encoder.PromptEncoder.load(self.model.folder))
        except Exception as error:
            self._encoder.set_exception(error)

    def measure(self) -> None:
        """Bring those metrics up to date that nothing else does."""
        self.metrics.worker_ready.set(self.worker.state is State.READY)
        self.metrics.worker_restarts.set(self.worker.restarts)
        self.metrics.cache_entries.set(len(self.cache))
        self.metrics.cache_bytes.set(self.cache.size_bytes)

    async def drain(self) -> None:
        """Take no more requests; let those in flight finish within the grace, then end them."""
        self.draining = True
        deadline = time.monotonic() + self.settings.grace_s
        while self.dispatcher.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self.close()

    async def close(self) -> None:
        """End the worker and whatever it still does. May be called twice."""
        self.draining = True
        await self.worker.stop(grace_s=0.0)
        await self.retrieval.close(SETTLE_S)
