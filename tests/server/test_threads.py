"""Calls that hang take a thread each, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Awaitable, Iterator

import pytest

from argus.server.threads import Threads, TooManyHang

SOON_S = 0.01


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def run(use: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(use, 30))


def test_a_call_gives_what_it_returns_or_raises() -> None:
    async def use() -> None:
        threads = Threads("test", 1)
        assert await threads.run(lambda: 7) == 7
        with pytest.raises(ValueError, match="seven"):
            await threads.run(lambda: int("seven"))
        assert threads.hung == 0

    run(use())


def test_so_many_calls_run_at_a_time_and_the_others_wait() -> None:
    running, most = 0, 0
    lock = threading.Lock()
    both = threading.Barrier(2)

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(30)
        with lock:
            running -= 1

    async def use() -> None:
        threads = Threads("test", 2)
        await asyncio.gather(*(threads.run(call) for _ in range(10)))

    run(use())
    assert most == 2


def test_calls_that_hang_keep_no_thread_from_the_next(released: threading.Event) -> None:
    async def use() -> None:
        threads = Threads("test", 2)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await threads.run(released.wait, SOON_S)
        assert threads.hung == 5
        assert await threads.run(lambda: 7) == 7
        released.set()
        while threads.hung:
            await asyncio.sleep(0)

    run(use())


def test_a_call_that_waits_for_a_thread_ends_in_time_too(released: threading.Event) -> None:
    async def use() -> None:
        threads = Threads("test", 1)
        first = asyncio.create_task(threads.run(released.wait))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await threads.run(lambda: 7, SOON_S)
        assert threads.hung == 0  # it was not begun
        released.set()
        await first

    run(use())


def test_beyond_a_bound_calls_fail_at_once_and_are_logged_once(
    released: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    async def use() -> None:
        threads = Threads("test", 2, most_hung=3)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await threads.run(released.wait, SOON_S)
        for _ in range(3):
            with pytest.raises(TooManyHang):
                await threads.run(released.wait)
        released.set()
        while threads.hung:
            await asyncio.sleep(0)
        assert await threads.run(lambda: 7) == 7

    with caplog.at_level(logging.WARNING):
        run(use())
    assert len(caplog.records) == 1


HANGS = """
import asyncio, threading
from argus.server.threads import Threads

async def use():
    try:
        await Threads("test", 1).run(threading.Event().wait, 0.05)
    except TimeoutError:
        print("late")

asyncio.run(use())
"""


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert ended.stdout == "late\n"
