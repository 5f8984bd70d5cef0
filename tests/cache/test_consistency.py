"""Minutes of two processes that insert, hit, evict and sweep over one PostgreSQL and one folder
(`CONSISTENCY_MINUTES`, 1 by default), while a third is killed again and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from argus.cache.cache import ORPHAN_AGE_S, ApproximateCache
from argus.cache.database import new_engine
from argus.cache.latents import LatentStore
from tests.cache.member import HOT, PROMPTS, latents, open_cache, use

if TYPE_CHECKING:
    from tests.postgres import Postgres

LIMIT = 150_000  # bytes, of about 450 kB that all prompts would take
WRITERS = 3  # each over the limit by one run, until it has evicted
KILL_EVERY_S = 5.0
TRUTH = sa.text(
    "SELECT size_bytes, (SELECT sum(size_bytes) FROM latents), entries,"
    " (SELECT count(*) FROM entries), (SELECT count(DISTINCT entry) FROM latents) FROM totals"
)


class Member:
    """A process of `tests.cache.member`; `ready` once it waits to begin."""

    def __init__(self, url: str, folder: Path, seconds: float, hot_share: float) -> None:
        given = (url, str(folder), str(LIMIT), str(seconds), str(hot_share))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cache.member", *given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdin is not None
        self._out, self._in = self.process.stdout, self.process.stdin
        self.ready = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        if self._out.readline() == "ready\n":
            self.ready.set()

    def tell(self) -> None:
        self._in.write("\n")
        self._in.flush()

    def told(self) -> Any:
        return json.loads(self._out.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def begin(member: Member) -> None:
    if member.ready.wait(300):
        with suppress(OSError):  # it may have been killed
            member.tell()


@pytest.mark.cluster
def test_servers_that_share_a_cache_agree_with_it_under_load(
    tmp_path: Path, postgres: Postgres
) -> None:
    url, folder = postgres.new_database(), tmp_path / "latents"
    seconds = 60 * float(os.environ.get("CONSISTENCY_MINUTES", "1"))
    cache = open_cache(url, str(folder), LIMIT)
    for prompt in range(HOT):
        for _ in range(200):  # never worth least: never evicted
            use(cache, prompt)
    cache.count_uses()
    hot = {one.prompt: one.id for one in cache.entries()}
    before = cache.stats().uses
    run_bytes = cache.size_bytes // HOT
    engine = new_engine(url)
    orphan = LatentStore(str(folder), cache._catalogue.id).put(5, latents(0)[5])
    members = [Member(url, folder, seconds, hot_share=0.5) for _ in range(2)]
    victim = Member(url, folder, 1e6, hot_share=0.0)
    for one in (*members, victim):
        assert one.ready.wait(300)
        one.tell()
    kills = looks = most = 0
    until, next_kill = time.monotonic() + seconds, time.monotonic() + KILL_EVERY_S
    while time.monotonic() < until:
        gone = cache._catalogue.names() - {one.name for one in folder.iterdir()}
        assert not gone & cache._catalogue.names(), "entries whose objects were deleted"
        with engine.connect() as connection:
            size, summed, entries, counted, with_latents = connection.execute(TRUTH).one()
        assert (size, entries) == (summed, counted)
        assert entries == with_latents
        assert size <= LIMIT + WRITERS * run_bytes
        looks, most = looks + 1, max(most, size)
        if victim.ready.is_set() and time.monotonic() > next_kill:
            victim.kill()
            kills, next_kill = kills + 1, time.monotonic() + KILL_EVERY_S
            victim = Member(url, folder, 1e6, hot_share=0.0)
            threading.Thread(target=begin, args=(victim,)).start()
    victim.kill()
    hits = [{int(n): count for n, count in one.told().items()} for one in members]
    stats = cache.stats()
    for one in members:
        one.tell()
        assert one.told() == [stats.entries, stats.size_bytes]
        assert one.process.wait() == 0
    assert stats.size_bytes <= LIMIT
    assert stats.entries > HOT
    # of the prompts that were there all the time, which the killed processes did not ask for
    assert {one.prompt: one.id for one in cache.entries() if int(one.prompt) < HOT} == hot
    told = sum(counts.get(prompt, 0) for counts in hits for prompt in range(HOT))
    uses = sa.text("SELECT sum(uses) FROM latents WHERE entry = ANY(:hot)")
    with engine.connect() as connection:
        counted = int(connection.execute(uses, {"hot": list(hot.values())}).scalar_one())
    assert counted - before == told > 0
    left = {one.name for one in folder.iterdir()} - cache._catalogue.names()
    store = LatentStore(str(folder), cache._catalogue.id)
    later = ApproximateCache(
        cache._catalogue, store, LIMIT, clock=lambda: time.time() + ORPHAN_AGE_S + 1
    )
    later.sweep()
    assert orphan.name in left
    assert {one.name for one in folder.iterdir()} == cache._catalogue.names()
    print(
        f"\n{seconds:g} s: {told} hits of {HOT} prompts, {counted - before} of them counted; "
        f"{stats.entries} of {PROMPTS} prompts at the end; {most} bytes at most, {LIMIT} allowed; "
        f"{kills} kills, {len(left)} orphans swept; {looks} looks"
    )
