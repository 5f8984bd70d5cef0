"""Runs the server until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import torch
import uvicorn
from transformers.utils import logging as transformers_logging

from argus.config import Settings
from argus.server.app import new_app
from argus.server.lock import DataLock
from argus.server.service import Service

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than clients and load balancers keep idle connections: they close first
LAST_ANSWERS_S = 5  # beyond the grace, for the answers to what was cut short


class _Server(uvicorn.Server):
    """Drains the service on the first signal, so that even what is cut short gets an answer."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._said_ready = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            family, policy = self._service.family.name, self._service.policy
            log.info(
                "Loading %s, policy %s; data in %s",
                family,
                policy,
                self._service.settings.data.absolute(),
            )
            log.info("Serving on http://%s:%d", host, port)

    async def on_tick(self, counter: int) -> bool:
        """Also stop when the worker says that it can never work."""
        if self._service.ready and not self._said_ready:
            self._said_ready = True
            log.info("Ready: the model is loaded")
        return await super().on_tick(counter) or self._service.problem is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.started and not self.should_exit:
            self._loop.call_soon_threadsafe(self._drain)
        super().handle_exit(sig, frame)

    def _drain(self) -> None:
        self._draining = self._loop.create_task(self._service.drain())


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; what is in flight then gets `grace_s` seconds.

    Raises BadRequest and ModelError for what cannot be served, NotEnoughMemory when the model
    does not fit, InUse when another server has the data folder.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("httpx", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    torch.set_num_threads(1)  # the prompt encoder is small, and the cores are the worker's
    transformers_logging.disable_progress_bar()
    lock = DataLock(settings.data)
    service = Service(settings)
    config = uvicorn.Config(
        new_app(service),
        host=settings.host,
        port=settings.port,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.grace_s) + LAST_ANSWERS_S,
        log_config=None,  # ours, set above
        access_log=True,
    )
    try:
        _Server(config, service).run()
    finally:
        service.fleet.kill()
        lock.release()
    log.info("Stopped")
    if service.problem is not None:
        raise service.problem
