"""One of several processes that use a cache together, for `test_consistency`: resumes from what it
finds, keeps what it does not find, evicts, sweeps. `python -m tests.cache.member URL FOLDER LIMIT
SECONDS HOT_SHARE`.

It says that it is ready, and after a line on its input begins. When its time is over it prints its
hits by prompt as JSON, and after another line how much its index and totals hold.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter

import numpy as np
import torch

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.index import Vector
from argus.cache.latents import LatentStore
from argus.cache.scope import Scope

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
HOT, PROMPTS = 8, 400  # the first are asked for with a probability of their own
SKIPS = (5, 10)
TICK_S = 0.5


def vector(prompt: int) -> Vector:
    return np.random.default_rng(prompt).standard_normal(16).astype(np.float32)


def latents(prompt: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(prompt)
    return {k: torch.randn(1, 4, 8, 8, generator=generator) for k in SKIPS}


def open_cache(url: str, folder: str, limit_bytes: int) -> ApproximateCache:
    catalogue = Catalogue(url)
    return ApproximateCache(catalogue, LatentStore(folder, catalogue.id), limit_bytes)


def use(cache: ApproximateCache, prompt: int) -> bool:
    """Resume from a prompt's own latents, or keep them. Whether it was resumed."""
    found = next(iter(cache.find(SCOPE, vector(prompt))), None)
    if found is None or found.prompt != str(prompt):
        cache.keep(SCOPE, str(prompt), vector(prompt), latents(prompt))
        return False
    k = random.choice(found.skips)
    fetched = cache.fetch(found, k)
    if fetched is not None:
        assert torch.equal(fetched, latents(prompt)[k])
    return fetched is not None


def main(url: str, folder: str, limit: str, seconds: str, hot_share: str) -> None:
    cache = open_cache(url, folder, int(limit))
    cache.load()
    print("ready", flush=True)
    sys.stdin.readline()
    over = threading.Event()

    def tick() -> None:
        while not over.wait(TICK_S):
            cache.follow()
            cache.count_uses()
            cache.sweep_in_turn(1.0)

    ticking = threading.Thread(target=tick)
    ticking.start()
    hits: Counter[int] = Counter()
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        hot = random.random() < float(hot_share)
        prompt = random.randrange(HOT) if hot else random.randrange(HOT, PROMPTS)
        hits[prompt] += use(cache, prompt)
    over.set()
    ticking.join()
    cache.count_uses()
    print(json.dumps(hits), flush=True)
    sys.stdin.readline()
    cache.follow()
    print(json.dumps([len(cache), cache.size_bytes]), flush=True)
    cache.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
