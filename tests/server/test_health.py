"""What cannot be stored is left alone until it can be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from argus.server import health
from argus.server.health import StorageHealth


class Store:
    """Has room, or not."""

    full = True
    probed = 0

    def probe(self) -> None:
        self.probed += 1
        if self.full:
            raise OSError("no space left")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_EVERY_S", 0.01)


def run(use: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(use(), 60)

    asyncio.run(limited())


def test_what_failed_is_probed_until_it_works_and_only_changes_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()

    async def use() -> None:
        works = StorageHealth()
        works.add("pictures", store.probe)
        works.add("latents", store.probe)
        assert works.works("pictures", "latents")
        assert store.probed == 0
        for _ in range(5):
            works.failed("pictures", OSError("no space left"))
        assert works.degraded == ["pictures"]
        assert works.works("latents")
        assert not works.works("pictures", "latents")
        while store.probed < 3:
            await asyncio.sleep(0.01)
        assert works.degraded == ["pictures"]
        store.full = False
        while works.degraded:
            await asyncio.sleep(0.01)

    run(use)
    first, second = (record.getMessage() for record in caplog.records)
    assert "pictures cannot be stored (OSError: no space left)" in first
    assert "pictures can be stored again" in second


def test_a_probe_that_hangs_keeps_no_other_waiting() -> None:
    released, store = threading.Event(), Store()
    store.full = False

    def hang() -> None:
        released.wait()

    async def use() -> None:
        works = StorageHealth()
        works.add("latents", hang)
        works.add("pictures", store.probe)
        for kind in works.kinds:
            works.failed(kind, OSError("no space left"))
        while works.degraded != ["latents"]:
            await asyncio.sleep(0.01)
        released.set()
        while works.degraded:
            await asyncio.sleep(0.01)

    run(use)


def test_the_pause_after_a_probe_that_failed_is_the_first_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store that hung once is not looked at as rarely as one that hangs."""
    pauses, sleep = list[float](), asyncio.sleep
    loop: asyncio.AbstractEventLoop | None = None
    outcomes = [
        TimeoutError(),
        TimeoutError(),
        OSError("no space left"),
        OSError("still none"),
        None,
    ]

    async def noted(pause_s: float) -> None:
        if asyncio.get_running_loop() is not loop:  # another test's server
            await sleep(pause_s)
            return
        pauses.append(pause_s)
        await sleep(0)

    def probe() -> None:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    async def use() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(asyncio, "sleep", noted)
        works = StorageHealth()
        works.add("latents", probe)
        works.failed("latents", OSError("no space left"))
        while works.degraded:
            await sleep(0)

    monkeypatch.setattr(health, "PROBE_EVERY_S", 5.0)
    run(use)
    assert pauses == [5, 10, 20, 5, 5]


def test_a_check_finds_out_by_itself() -> None:
    store = Store()

    async def use() -> None:
        works = StorageHealth()
        works.add("predictor", store.probe)
        await works.check("predictor")
        assert works.degraded == ["predictor"]
        works.close()

    run(use)


def test_probes_that_hang_never_space_out_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store that hung for an hour is left alone for days."""
    released, pauses, sleep = threading.Event(), list[float](), asyncio.sleep
    loop: asyncio.AbstractEventLoop | None = None

    def hang() -> None:
        released.wait()

    async def noted(pause_s: float) -> None:
        if asyncio.get_running_loop() is loop:  # else another test's server
            pauses.append(pause_s)
            pause_s = 0
        await sleep(pause_s)

    async def use() -> None:
        nonlocal loop
        loop, works = asyncio.get_running_loop(), StorageHealth()
        works.add("latents", hang)
        works.failed("latents", OSError("no space left"))
        while len(pauses) < 20:
            await sleep(0.01)
        released.set()
        while works.degraded:
            await sleep(0.01)

    monkeypatch.setattr(health, "PROBE_LIMIT_S", 0.001)
    monkeypatch.setattr(health, "MOST_PAUSE_S", 0.04)
    monkeypatch.setattr(asyncio, "sleep", noted)
    run(use)
    assert max(pauses) == 0.04


def test_the_pause_doubles_while_writes_fail_though_probes_succeed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An almost full disk has room for a probe and none for what is to be written."""
    pauses, sleep, now = list[float](), asyncio.sleep, [0.0]
    loop: asyncio.AbstractEventLoop | None = None

    async def noted(pause_s: float) -> None:
        if asyncio.get_running_loop() is not loop:  # another test's server
            await sleep(pause_s)
            return
        pauses.append(pause_s)
        now[0] += pause_s
        await sleep(0)

    async def use() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: now[0])
        monkeypatch.setattr(asyncio, "sleep", noted)
        works = StorageHealth()
        works.add("latents", lambda: None)
        for _ in range(8):
            works.failed("latents", OSError("no space left"))
            while works.degraded:
                await sleep(0)
        now[0] += 60
        works.failed("latents", OSError("no space left"))
        while works.degraded:
            await sleep(0)

    monkeypatch.setattr(health, "PROBE_EVERY_S", 5.0)
    run(use)
    assert pauses == [5, 10, 20, 40, 60, 60, 60, 60, 5]
