"""The approximate cache as the server uses it: find a neighbour, fetch latents, keep new ones."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from argus.cache.catalogue import Catalogue, Entry, Removed, Stats, Uses
from argus.cache.disk_tier import FULL
from argus.cache.index import SimilarityIndex, Vector
from argus.cache.latents import BrokenLatents, LatentStore, StoredLatents
from argus.cache.saved_index import restored, save
from argus.cache.scope import Scope
from argus.core.errors import named

log = logging.getLogger(__name__)

ROOM = 0.02  # share of the limit that one round of eviction frees beyond what it must
ORPHAN_AGE_S = 600.0
SPARE = 8  # times the size of what does not fit is evicted from a full disk
AT_ONCE = 32  # latents removed or counted in one transaction, so that no transaction is long
ROUNDS = 2  # of a search that finds entries which another process removed


@dataclass(frozen=True)
class Neighbour:
    """A cached prompt near to a prompt. `skips` are the K whose latents are stored."""

    entry: int
    prompt: str
    similarity: float
    skips: tuple[int, ...]


class ApproximateCache:
    """Latents of full runs by prompt, `limit_bytes` at most; `eviction` is one of `ORDERS`.

    Objects are written before the catalogue names them and deleted after it has removed them (on a
    full disk before: fetches pass over what is missing);
    `sweep` deletes what a crash leaves in between. Several processes may use one catalogue; each
    notices removals by others when it meets them, and additions by others when it starts. Threads
    may share one cache.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: LatentStore,
        limit_bytes: int,
        clock: Callable[[], float] = time.time,
        eviction: str = "lcbfu",
        index_file: Path | None = None,
    ) -> None:
        """`index_file` is where `save_index` saves the index, and where it is restored from."""
        self._catalogue, self._store, self._limit = catalogue, store, limit_bytes
        self._clock, self._eviction = clock, eviction
        self._lock = threading.RLock()  # held while the catalogue is written, not the store
        self._keeping: set[tuple[str, str]] = set()
        self._entries, self._bytes = catalogue.count(), catalogue.size_bytes()
        self._index: SimilarityIndex | None = None
        self._index_file, self._saved = index_file, 0  # changes of the index that are saved
        self._building, self._saving = threading.Lock(), threading.Lock()
        self._uses: dict[tuple[int, int], Uses] = {}
        self._noting = threading.Lock()

    def load(self) -> None:
        """Restore the similarity index, or build it from the catalogue, which otherwise the first
        search does. Building takes minutes for hundreds of thousands of entries."""
        self._built()

    def _built(self) -> SimilarityIndex:
        with self._building:
            if self._index is None:
                if self._index_file is None:
                    self._index = SimilarityIndex(self._catalogue.vectors())
                else:
                    self._index = restored(self._index_file, self._catalogue)
            return self._index

    def save_index(self, least: float = 0.0) -> None:
        """Save the similarity index, if there is a file for it and more than the share `least` of
        it has changed since. Raises OSError."""
        index = self._index
        if self._index_file is None or index is None:
            return
        with self._saving:
            changes = index.changes
            if changes - self._saved > least * len(index):
                save(index, self._index_file, self._catalogue.id)
                self._saved = changes

    def _index_if_built(self) -> SimilarityIndex | None:
        """The index; None if it is not built yet. Waits while it is being built, so that a change
        of the catalogue can be applied to it; an index built later reads the changed catalogue."""
        with self._building:
            return self._index

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        """Number of entries. Neither reads the catalogue nor builds the index."""
        index = self._index
        return self._entries if index is None else len(index)

    def close(self) -> None:
        try:
            self.count_uses()
        except SQLAlchemyError as error:
            log.warning("Uses of latents were not counted: %s", named(error))
        self._catalogue.close()

    def find(self, scope: Scope, vector: Vector, count: int = 1) -> list[Neighbour]:
        """The `count` nearest entries of a scope, nearest first, or as many as there are.

        `vector` (d,) need not have unit length.
        """
        index, found = self._built(), []
        for _ in range(ROUNDS):
            nearest = index.nearest(scope.key, vector, count)
            found = [
                Neighbour(number, entry.prompt, similarity, entry.skips)
                for number, similarity in nearest
                if (entry := self._catalogue.entry(number)) is not None
            ]
            if len(found) == len(nearest):
                break
            # Another process removed these entries, and maybe more. `known` is read first, so that
            # entries added meanwhile stay.
            known = index.entries(scope.key)
            for number in known - self._catalogue.ids(scope.key):
                index.remove(scope.key, number)
        return found

    def fetch(self, neighbour: Neighbour, k: int) -> Tensor | None:
        """A neighbour's latents (1, c, h, w) after K steps, or None if they are gone or broken.

        Broken latents are removed and logged. Raises OSError while the store cannot be read;
        nothing is removed then. `count_uses` writes the use to the catalogue later, since a write
        may wait for other transactions.
        """
        stored = self._catalogue.latents(neighbour.entry, k)
        if stored is None:
            return None
        try:
            latents = self._store.get(stored)
        except BrokenLatents as error:
            log.warning("Removed latents of entry %d at K=%d: %s", neighbour.entry, k, error)
            self._forget(self._catalogue.remove_latents([(neighbour.entry, k)]))
            return None
        with self._noting:
            self._note((neighbour.entry, k), Uses(1, self._clock()))
        return latents

    @property
    def tiered(self) -> bool:
        """Whether `fetch_near` may find anything."""
        return self._store.tiered

    def fetch_near(self, neighbour: Neighbour, k: int) -> Tensor | None:
        """As `fetch`, from the disk tier alone; None if it does not hold them."""
        stored = self._catalogue.latents(neighbour.entry, k)
        latents = None if stored is None else self._store.near(stored)
        if latents is not None:
            with self._noting:
                self._note((neighbour.entry, k), Uses(1, self._clock()))
        return latents

    def count_uses(self) -> None:
        """Write the counts of fetched latents to the catalogue.

        Raises SQLAlchemyError if the catalogue cannot be written; the rest is written next time.
        """
        with self._noting:
            uses, self._uses = list(self._uses.items()), {}
        try:
            while uses:
                self._catalogue.used(dict(uses[:AT_ONCE]))
                del uses[:AT_ONCE]
        finally:
            with self._noting:
                for of, left in uses:
                    self._note(of, left)

    def _note(self, of: tuple[int, int], uses: Uses) -> None:
        known = self._uses.get(of)
        self._uses[of] = uses if known is None else known + uses

    def probe(self) -> None:
        """Read the newest latents, if there are any, to test the store.

        Raises OSError while it cannot be read.
        """
        for entry in self._catalogue.entries(limit=1):
            for k in entry.skips[-1:]:
                stored = self._catalogue.latents(entry.id, k)
                if stored is not None:
                    with suppress(BrokenLatents):  # the store answers
                        self._store.get(stored)

    def probe_store(self) -> None:
        """Raises OSError, or the store's own error, unless latents can be written."""
        self._store.probe()

    def probe_catalogue(self) -> None:
        """Raises SQLAlchemyError unless the catalogue can be written."""
        self._catalogue.probe()

    def keep(
        self, scope: Scope, prompt: str, vector: Vector, latents: Mapping[int, Tensor]
    ) -> int | None:
        """Store a full run's latents by K. Returns the entry's id, or None if nothing was stored.

        A prompt that the scope already holds gets those K that it lacks; nothing is stored of a
        prompt that another thread is storing. Evicts latents beyond the limit, and on a disk that
        is full before the limit is reached. What was written before an error is deleted.
        """
        one = (scope.key, prompt)
        with self._lock:
            if one in self._keeping:
                return None
            self._keeping.add(one)
        try:
            return self._keep(scope, prompt, vector, latents)
        except (OSError, SQLAlchemyError) as error:
            if not _is_full(error):
                raise
            size = sum(one.nbytes for one in latents.values())
            self._free_disk(max(ROOM * self._bytes, SPARE * size))
            return self._keep(scope, prompt, vector, latents)
        finally:
            self._keeping.discard(one)

    def _keep(
        self, scope: Scope, prompt: str, vector: Vector, latents: Mapping[int, Tensor]
    ) -> int | None:
        held = self._catalogue.stored(scope, prompt)
        entry = held.id if held else None
        lacking = sorted(set(latents) - set(held.skips if held else ()))
        written: list[StoredLatents] = []
        try:
            for k in lacking:
                written.append(self._store.put(k, latents[k]))
            if written:
                with self._lock:
                    now = self._clock()
                    if entry is None or not self._catalogue.add_latents(entry, written, now):
                        entry = self._catalogue.add(scope, prompt, vector, written, now)
                        self._entries += 1
                    self._bytes += sum(one.size_bytes for one in written)
        except Exception:
            with suppress(Exception):  # deleting may fail too; then `sweep` deletes
                self._store.delete([one.name for one in written])
            raise
        index = self._index_if_built()
        if entry is not None and index is not None:
            index.add(scope.key, entry, vector)
        if self._bytes > self._limit:
            self._evict()
        return entry if written else None

    def stored(self, scope: Scope, prompt: str) -> Entry | None:
        """A scope's entry for a prompt."""
        return self._catalogue.stored(scope, prompt)

    def stats(self) -> Stats:
        return self._catalogue.stats()

    def entries(self, namespace: str | None = None, limit: int | None = None) -> list[Entry]:
        """Entries, newest first; of one namespace, if given."""
        return self._catalogue.entries(namespace, limit=limit)

    def remove(
        self, entry: int | None = None, prompt: str | None = None, namespace: str | None = None
    ) -> int:
        """Remove the entries that match every argument given, or all; returns their number."""
        found = self._catalogue.entries(namespace, prompt, entry)
        for one in found:
            self._forget(self._catalogue.remove_entry(one.id))
        return len(found)

    def sweep(self) -> None:
        """Delete objects that the catalogue does not name and that are too old to be in writing,
        and from the disk tier what the catalogue does not name."""
        known, now = self._catalogue.names(), self._clock()
        self._store.keep_near(known)
        self._store.delete(
            [
                name
                for name, written_at in self._store.written(known)
                if now - written_at > ORPHAN_AGE_S
            ]
        )

    def _evict(self) -> None:
        """Evict latents in the order of `eviction` until a little room is left below the limit."""
        self.count_uses()
        excess = self._catalogue.size_bytes() - self._limit * (1 - ROOM)
        chosen = self._least_worth(excess)
        try:
            while chosen:
                self._drop(self._catalogue.remove_latents(chosen[:AT_ONCE]))
                del chosen[:AT_ONCE]
        finally:
            self._recount()

    def _free_disk(self, size_bytes: float) -> None:
        """Evict so many bytes, objects first, since the catalogue may need room to write."""
        chosen = self._least_worth(size_bytes)
        while chosen:
            some = chosen[:AT_ONCE]
            stored = [self._catalogue.latents(entry, k) for entry, k in some]
            self._store.delete([one.name for one in stored if one is not None])
            self._forget(self._catalogue.remove_latents(some))
            del chosen[:AT_ONCE]

    def _least_worth(self, size_bytes: float) -> list[tuple[int, int]]:
        """(entry, K) of the first latents in the order of `eviction`, `size_bytes` in all."""
        chosen = []
        for entry, k, size in self._catalogue.least_worth(self._eviction):
            if size_bytes <= 0:
                break
            chosen.append((entry, k))
            size_bytes -= size
        return chosen

    def _forget(self, removed: list[Removed]) -> None:
        try:
            self._drop(removed)
        finally:
            self._recount()

    def _drop(self, removed: list[Removed]) -> None:
        """Remove latents that left the catalogue from the index and the store."""
        index = self._index_if_built()
        for one in removed:
            if one.scope is not None and index is not None:
                index.remove(one.scope, one.entry)
        self._store.delete([one.name for one in removed])

    def _recount(self) -> None:
        with self._lock:
            self._entries, self._bytes = self._catalogue.count(), self._catalogue.size_bytes()


def _is_full(error: Exception) -> bool:
    """Whether an error says that a disk is full."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return getattr(error, "errno", None) in FULL or code == sqlite3.SQLITE_FULL
