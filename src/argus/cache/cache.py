"""The approximate cache as the server uses it: find a neighbour, fetch latents, keep new ones."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from argus.cache.catalogue import Catalogue, Entry, Removed, Stats
from argus.cache.index import SimilarityIndex, Vector
from argus.cache.latents import BrokenLatents, LatentStore, StoredLatents
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
    deleted after it has forgotten them; `sweep` removes what a crash leaves in between. Several
    processes may use one catalogue; each sees what the others removed when it comes upon it, and
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
        self._bytes = catalogue.size_bytes()

    @cached_property
    def _index(self) -> SimilarityIndex:
        """Built when it is first asked for, since who only looks after the cache does not."""
        return SimilarityIndex(self._catalogue.vectors())

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        self._catalogue.close()

    def find(self, scope: Scope, vector: Vector, count: int = 1) -> list[Neighbour]:
        """The `count` nearest entries of a scope, nearest first, or as many as there are.

        `vector` (d,) need not have unit length.
        """
        while True:
            nearest = self._index.nearest(scope.key, vector, count)
            found = [
                Neighbour(number, entry.prompt, similarity, entry.skips)
                for number, similarity in nearest
                if (entry := self._catalogue.entry(number)) is not None
            ]
            if len(found) == len(nearest):
                return found
            # Another process removed some, and maybe many more.
            self._index.keep_only(scope.key, self._catalogue.ids(scope.key))

    def fetch(self, neighbour: Neighbour, k: int) -> Tensor | None:
        """A neighbour's latents (1, c, h, w) after K steps, or None if they are gone or broken.

        Broken ones are dropped and logged, once because they are dropped. Raises OSError while
        the store cannot be read; nothing is dropped then.
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
        try:
            self._catalogue.used(neighbour.entry, k, self._clock())
        except SQLAlchemyError as error:
            log.warning("A use of entry %d was not counted: %s", neighbour.entry, error)
        return latents

    def probe(self) -> None:
        """Read the newest latents, if there are any, to see how the store is.

        Raises OSError while it cannot be read.
        """
        for entry in self._catalogue.entries(limit=1):
            for k in entry.skips[-1:]:
                stored = self._catalogue.latents(entry.id, k)
                if stored is not None:
                    with suppress(BrokenLatents):  # the store answers
                        self._store.get(stored)

    def keep(
        self, scope: Scope, prompt: str, vector: Vector, latents: Mapping[int, Tensor]
    ) -> int | None:
        """Store a full run's latents by K. Gives the entry's id, or None if nothing was stored.

        A prompt that the scope already holds gets those K that it lacks. Evicts what is worth
        least. What was written before an error is deleted again.
        """
        with self._lock:  # so that two runs of one prompt are stored once
            held = self._catalogue.stored(scope, prompt)
            lacking = sorted(set(latents) - set(held.skips if held else ()))
            written: list[StoredLatents] = []
            try:
                for k in lacking:
                    written.append(self._store.put(k, latents[k]))
                if not written:
                    entry = held.id if held else None
                elif held is None:
                    entry = self._catalogue.add(scope, prompt, vector, written, self._clock())
                else:
                    entry = held.id
                    self._catalogue.add_latents(entry, written, self._clock())
            except Exception:
                self._store.delete([one.name for one in written])
                raise
            if entry is not None:
                self._index.add(scope.key, entry, vector)
            self._bytes += sum(one.size_bytes for one in written)
            if self._bytes > self._limit:
                self._evict()
        return entry if written else None

    def stored(self, scope: Scope, prompt: str) -> Entry | None:
        """A scope's entry for a prompt."""
        return self._catalogue.stored(scope, prompt)

    def stats(self) -> Stats:
        return self._catalogue.stats()

    def entries(self, namespace: str | None = None, limit: int | None = None) -> list[Entry]:
        """Entries, newest first, of a namespace if given."""
        return self._catalogue.entries(namespace, limit=limit)

    def remove(
        self, entry: int | None = None, prompt: str | None = None, namespace: str | None = None
    ) -> int:
        """Remove entries by id, by exact prompt, by namespace; gives how many there were.

        What is given narrows; with nothing given, everything goes.
        """
        found = self._catalogue.entries(namespace, prompt, entry)
        for one in found:
            self._forget(self._catalogue.remove_entry(one.id))
        return len(found)

    def sweep(self) -> None:
        """Delete objects no catalogue row names and that nobody can still be writing."""
        known, now = self._catalogue.names(), self._clock()
        self._store.delete(
            [
                name
                for name, written_at in self._store.written()
                if name not in known and now - written_at > ORPHAN_AGE_S
            ]
        )

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
        indexed = "_index" in self.__dict__
        for one in removed:
            if one.scope is not None and indexed:
                self._index.remove(one.scope, one.entry)
        self._store.delete([one.name for one in removed])
        with self._lock:
            self._bytes = self._catalogue.size_bytes()
