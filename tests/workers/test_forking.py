from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from multiprocessing import forkserver

import pytest

from argus.core.job import Job
from argus.workers import forking, local, supervised
from argus.workers.local import LocalWorker
from argus.workers.worker import Model
from tests.workers import bodies

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


@LINUX
def test_workers_are_forked_for_the_cpu_only() -> None:
    assert forking.context("cpu").get_start_method() == "forkserver"
    assert forking.context("cuda:0").get_start_method() == "spawn"


@LINUX
def test_preparing_imports_nothing_heavy_here() -> None:
    """Else there was nothing to gain: both processes would import one after the other."""
    program = """
import sys
from multiprocessing import forkserver
import argus.cli.main
from argus.workers import forking
forking.prepare("cuda")
assert forkserver._forkserver._forkserver_pid is None
forking.prepare("cpu")
assert forkserver._forkserver._forkserver_pid is not None
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> LocalWorker:
    monkeypatch.setattr(local, "run_process", bodies.run)
    monkeypatch.setattr(supervised, "FIRST_PAUSE_S", 0.01)
    return LocalWorker(Model("fits"))


def run(use: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(use(), 120)

    asyncio.run(limited())


def tell_fork_server(number: signal.Signals) -> None:
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(pid, number)


@LINUX
def test_a_fork_server_that_dies_takes_no_worker_with_it(fits: LocalWorker) -> None:
    async def use() -> None:
        fits.start()
        await fits.ready()
        tell_fork_server(signal.SIGTERM)  # which a process group gets
        await fits.run(Job("a fish"))
        tell_fork_server(signal.SIGKILL)
        await fits.run(Job("a fish"))
        restarts = fits.restarts
        assert fits.pid is not None
        os.kill(fits.pid, signal.SIGKILL)
        while fits.restarts == restarts:
            await asyncio.sleep(0.01)
        await fits.ready()
        await fits.run(Job("a fish"))
        await fits.stop(grace_s=0.0)

    run(use)


@LINUX
def test_a_worker_can_be_ended_without_the_fork_server(fits: LocalWorker) -> None:
    async def use() -> None:
        fits.start()
        await fits.ready()
        pid = fits.pid
        assert pid is not None
        tell_fork_server(signal.SIGKILL)
        multiprocessing.active_children()  # takes the worker for dead
        fits.kill()
        while alive(pid):
            await asyncio.sleep(0.01)
        await fits.stop(grace_s=0.0)

    run(use)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@LINUX
def test_a_worker_starts_anew_where_the_fork_server_fails(
    fits: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(forkserver, "connect_to_new_process", broken)

    async def use() -> None:
        fits.start()
        await fits.ready()
        await fits.run(Job("a fish"))
        await fits.stop(grace_s=0.0)

    run(use)


@LINUX
def test_a_worker_that_is_stopped_while_it_starts_leaves_no_process(fits: LocalWorker) -> None:
    async def use() -> None:
        fits.start()
        await asyncio.sleep(0)  # its start has begun
        await fits.stop(grace_s=0.0)
        while any(child.is_alive() for child in multiprocessing.active_children()):
            await asyncio.sleep(0.01)

    run(use)
