"""Runs the server until it is signalled to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch
import uvicorn

from argus.config import Settings
from argus.server.app import new_app
from argus.server.live import EVENTS
from argus.server.lock import DataLock
from argus.server.logs import log_unhandled
from argus.server.service import STOP_S, Service

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than clients and load balancers keep idle connections: they close first
LAST_ANSWERS_S = 5  # to send the error answers of requests that were cut short
END_S = STOP_S + LAST_ANSWERS_S  # for the process to end after the last step
LOOK_S = 0.02


class Server(uvicorn.Server):
    """Shuts down in steps: for `drain_s`, `/ready` answers 503 and requests are served; for up to
    `grace_s`, new requests are refused until the accepted ones are answered; then the rest fails
    and the process ends. SIGTERM begins with the first step, SIGINT with the second; each further
    signal skips to the next."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._leaving: asyncio.Task[None] | None = None
        self._hurry = False
        self._said_ready = False
        self._timers: list[threading.Timer] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(log_unhandled)
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
        """Also stop when no worker can ever work."""
        if self._service.ready and not self._said_ready:
            self._said_ready = True
            log.info("Ready: the model is loaded")
        return await super().on_tick(counter) or self._service.problem is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.started:
            self._loop.call_soon_threadsafe(self._signalled, sig)
        else:
            super().handle_exit(sig, frame)

    def _signalled(self, sig: int) -> None:
        self._hurry = self._leaving is not None
        self.force_exit = self.should_exit
        if self._leaving is None:
            settings = self._service.settings
            drain_s = 0.0 if sig == signal.SIGINT else settings.drain_s
            self._end_within(drain_s + settings.grace_s + END_S)
            self._leaving = self._loop.create_task(self._leave(drain_s, settings.grace_s))

    async def _leave(self, drain_s: float, grace_s: float) -> None:
        service = self._service
        service.leave()
        if drain_s > 0:
            log.info("Stopping: /ready answers 503, requests are served for another %g s", drain_s)
            await self._wait(drain_s, lambda: False)
        service.drain()
        wait = f"; accepted ones have {grace_s:g} s ({self._left})" if self._left else ""
        log.info("Stopping: new requests are refused%s", wait)
        await self._wait(grace_s, lambda: not self._left)
        if self._left:
            log.warning("Stopping: the time is over; given up are %s", self._left)
        self.should_exit = True

    @property
    def _left(self) -> str:
        """What the end waits for; empty if nothing is left."""
        counts = {"requests": self._service.accepted, "answers being read": self._unsent}
        return ", ".join(f"{what}: {count}" for what, count in counts.items() if count)

    @property
    def _unsent(self) -> int:
        """Number of clients that have not read all of their answer; a stream of samples is none."""
        return sum(
            bool(one.transport and one.transport.get_write_buffer_size())
            for one in self.server_state.connections
            if (getattr(one, "scope", None) or {}).get("path") != EVENTS
        )

    async def _wait(self, limit_s: float, over: Callable[[], bool]) -> None:
        until = time.monotonic() + limit_s
        while not (over() or self._hurry or time.monotonic() >= until):
            await asyncio.sleep(LOOK_S)
        self._hurry = False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer the remaining requests, then close the connections."""
        self._end_within(END_S)
        storing = self._service.retrieval.storing
        also = f"; latents of {storing} pictures are stored" if storing else ""
        log.info("Stopping: the workers end%s", also)
        await self._service.close()
        await super().shutdown(sockets)

    def _end_within(self, limit_s: float) -> None:
        """End the process after `limit_s` seconds, even if a thread or a call in the loop hangs."""

        def end() -> None:
            self._service.kill()
            _exit(1 if self._service.problem else 0)

        self._timers.append(_timer(limit_s, end))

    def ended(self) -> None:
        """Cancel the timers that would end the process."""
        for timer in self._timers:
            timer.cancel()


def exit_within(limit_s: float, status: int) -> None:
    """End the process with a status after `limit_s`, even if a thread of it hangs."""
    _timer(limit_s, lambda: _exit(status))


def _timer(limit_s: float, end: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    return timer


def _exit(status: int) -> NoReturn:
    log.warning("A thread or a call hangs; the process ends all the same")
    os._exit(status)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; accepted requests then get `grace_s` seconds.

    Raises BadRequest and ModelError for settings that cannot be served, NotEnoughMemory when the
    model does not fit, InUse when another server uses the data folder.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server handles it
    torch.set_num_threads(1)  # the prompt encoder is small; the workers need the cores
    lock = DataLock(settings.data)
    service = Service(settings)
    config = uvicorn.Config(
        new_app(service),
        host=settings.host,
        port=settings.port,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        log_config=None,  # `argus serve` has configured the log
        access_log=settings.log_level == "debug",
    )
    server = Server(config, service)
    try:
        server.run()
    finally:
        server.ended()
        service.kill()
        lock.release()
    log.info("Stopped")
    if service.problem is not None:
        raise service.problem
