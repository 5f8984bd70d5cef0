"""Minutes of two processes that insert, hit, evict and sweep over one PostgreSQL and one folder
(`CONSISTENCY_MINUTES`, 1 by default), while a third is killed again and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from argus.cache.cache import ORPHAN_AGE_S, ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.database import new_engine
from argus.cache.latents import LatentStore
from tests.cache.member import HOT, PROMPTS, SKIPS, open_cache, use

if TYPE_CHECKING:
    from tests.postgres import Postgres

LIMIT = 150_000  # bytes, of about 450 kB that all prompts would take
WRITERS = 3
TRUTH = sa.text(
    "SELECT size_bytes, (SELECT sum(size_bytes) FROM latents), entries,"
    " (SELECT count(*) FROM entries), (SELECT count(DISTINCT entry) FROM latents) FROM totals"
)


def member(url: str, folder: Path, seconds: float, seed: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cache.member", url, str(folder), str(LIMIT), str(seconds),
         seed],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip


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
    members = [member(url, folder, seconds, seed) for seed in ("one", "other")]
    victim, kills, looks, most = member(url, folder, 1e6, "victim 0"), 0, 0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        named = Catalogue.names(cache._catalogue)
        there = {one.name for one in folder.iterdir()}
        gone = named - there
        assert not gone & cache._catalogue.names(), "entries whose objects were deleted"
        with engine.connect() as connection:
            size, summed, entries, counted, with_latents = connection.execute(TRUTH).one()
        assert (size, entries) == (summed, counted)
        assert entries == with_latents
        assert size <= LIMIT + WRITERS * run_bytes
        looks, most = looks + 1, max(most, size)
        if time.monotonic() > until - seconds * (1 - (kills + 1) / 6):
            victim.kill()
            victim.communicate()
            kills += 1
            victim = member(url, folder, 1e6, f"victim {kills}")
    victim.kill()
    victim.communicate()
    hits = []
    for one in members:
        assert one.stdout is not None
        hits.append({int(n): count for n, count in json.loads(one.stdout.readline()).items()})
    stats = cache.stats()
    for one in members:
        answer, _ = one.communicate("now\n")
        assert json.loads(answer) == [stats.entries, stats.size_bytes]
        assert one.returncode == 0
    assert stats.size_bytes <= LIMIT
    assert stats.entries > HOT
    # what the members counted of prompts that were there all the time; the killed ones' uses come
    # on top, but for those of their last moments
    assert {one.prompt: one.id for one in cache.entries() if int(one.prompt) < HOT} == hot
    told = sum(counts.get(prompt, 0) for counts in hits for prompt in range(HOT))
    uses = sa.text("SELECT sum(uses) FROM latents WHERE entry = ANY(:hot)")
    with engine.connect() as connection:
        counted = int(connection.execute(uses, {"hot": list(hot.values())}).scalar_one())
    assert counted - before >= told > 0
    left = {one.name for one in folder.iterdir()} - cache._catalogue.names()
    store = LatentStore(str(folder), cache._catalogue.id)
    later = ApproximateCache(
        cache._catalogue, store, LIMIT, clock=lambda: time.time() + ORPHAN_AGE_S + 1
    )
    later.sweep()
    assert {one.name for one in folder.iterdir()} == cache._catalogue.names()
    print(
        f"\n{seconds:g} s: {told} hits of {HOT} prompts, {counted - before} counted with those of "
        f"{kills} killed processes; {stats.entries} of {PROMPTS} prompts at the end, {len(SKIPS)} "
        f"latents each at most; {most} bytes at most of {LIMIT}; {looks} looks; "
        f"{len(left)} orphans swept"
    )
