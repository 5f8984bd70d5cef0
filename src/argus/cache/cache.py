"""The approximate cache as the server uses it: find a neighbour, fetch latents, keep new ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from argus.cache.catalogue import Catalogue, Entry, Removed, Stats
from argus.cache.index import SimilarityIndex, Vector
from argus.cache.latents import BrokenLatents, LatentStore
from argus.cache.scope import Scope

log = logging.getLogger(__name__)

ROOM = 0.02  # share of the limit that one round of eviction frees beyond what it must
ORPHAN_AGE_S = 600.0


@dataclass(frozen=True)
class Neighbour:
    """The cached prompt nearest to a prompt. `skips` are the K it can be resumed from."""

    entry: int
    prompt: str
    similarity: float
    skips: tuple[int, ...]


class ApproximateCache:
    """Latents of full runs by prompt, at most `limit_bytes` of them; `eviction` as in `ORDERS`.

    What is on disk is whole or absent: objects are written before the catalogue names them and
    deleted after it has forgotten them; what a crash leaves in between is removed at the next
    start. Several processes may use one catalogue; each sees what the others removed at once and
    what they added when it starts. Threads may share one cache.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: LatentStore,
        limit_bytes: int,
        clock: Callable[[], float] = time.time,
        eviction: str = "lcbfu",
    ) -> None:
        self._catalogue, self._store, self._limit = catalogue, store, limit_bytes
        self._clock, self._eviction = clock, eviction
        self._lock = threading.RLock()
        self._index = SimilarityIndex(catalogue.vectors())
        self._bytes = catalogue.size_bytes()
        store.delete(self._orphans())

    @property
    def size_bytes(self) -> int:
        return self._bytes

    @property
    def limit_bytes(self) -> int:
        return self._limit

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        self._catalogue.close()

    def find(self, scope: Scope, vector: Vector, count: int = 1) -> list[Neighbour]:
        """The `count` nearest entries of a scope, nearest first, or as many as there are.

        `vector` (d,) need not have unit length.
        """
        found = []
        for number, similarity in self._index.nearest(scope.key, vector, count):
            entry = self._catalogue.entry(number)
            if entry is None:  # another process removed it
                self._index.remove(scope.key, number)
                return self.find(scope, vector, count)
            found.append(Neighbour(number, entry.prompt, similarity, entry.skips))
        return found

    def fetch(self, neighbour: Neighbour, k: int) -> Tensor | None:
        """A neighbour's latents (1, c, h, w) after K steps, or None if they are gone or broken.

        Broken ones are dropped and logged, once because they are dropped.
        """
        stored = self._catalogue.latents(neighbour.entry, k)
        if stored is None:
            return None
        try:
            latents = self._store.get(stored)
        except BrokenLatents as error:
            log.warning("Dropped latents of entry %d at K=%d: %s", neighbour.entry, k, error)
            self._forget(self._catalogue.remove_latents([(neighbour.entry, k)]))
            return None
        self._catalogue.used(neighbour.entry, k, self._clock())
        return latents

    def keep(
        self, scope: Scope, prompt: str, vector: Vector, latents: Mapping[int, Tensor]
    ) -> int | None:
        """Store a full run's latents by K. Gives the entry's id, or None if nothing was stored.

        A prompt that the scope already holds is not stored again. Evicts what is worth least.
        """
        if not latents or self._catalogue.holds(scope, prompt):
            return None
        stored = [self._store.put(k, tensor) for k, tensor in sorted(latents.items())]
        entry = self._catalogue.add(scope, prompt, vector, stored, self._clock())
        self._index.add(scope.key, entry, vector)
        with self._lock:
            self._bytes += sum(one.size_bytes for one in stored)
            if self._bytes > self._limit:
                self._evict()
        return entry

    def holds(self, scope: Scope, prompt: str) -> bool:
        return self._catalogue.holds(scope, prompt)

    def stats(self) -> Stats:
        return self._catalogue.stats()

    def entries(
        self, namespace: str | None = None, prompt: str | None = None, limit: int | None = None
    ) -> list[Entry]:
        return self._catalogue.entries(namespace, prompt, limit)

    def remove(
        self, entry: int | None = None, prompt: str | None = None, namespace: str | None = None
    ) -> int:
        """Remove entries by id, by exact prompt, by namespace; gives how many there were.

        What is given narrows; with nothing given, everything goes.
        """
        numbers = [
            found.id
            for found in self._catalogue.entries(namespace, prompt)
            if entry is None or found.id == entry
        ]
        self._forget([gone for number in numbers for gone in self._catalogue.remove_entry(number)])
        return len(numbers)

    def _evict(self) -> None:
        """Remove the least worth keeping until a little room is left below the limit."""
        excess = self._catalogue.size_bytes() - self._limit * (1 - ROOM)
        chosen = []
        for entry, k, size in self._catalogue.least_worth(self._eviction):
            if excess <= 0:
                break
            chosen.append((entry, k))
            excess -= size
        self._forget(self._catalogue.remove_latents(chosen))

    def _forget(self, removed: list[Removed]) -> None:
        for one in removed:
            if one.scope is not None:
                self._index.remove(one.scope, one.entry)
        self._store.delete([one.name for one in removed])
        with self._lock:
            self._bytes = self._catalogue.size_bytes()

    def _orphans(self) -> list[str]:
        """Objects no catalogue row names, and old enough that nobody is still writing them."""
        known, now = self._catalogue.names(), self._clock()
        return [
            name
            for name, written_at in self._store.written()
            if name not in known and now - written_at > ORPHAN_AGE_S
        ]
