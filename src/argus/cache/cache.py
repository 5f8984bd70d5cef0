"""The approximate cache as the server uses it: find a neighbour, fetch latents, keep new ones."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from argus.cache.catalogue import Catalogue, Entry, Forgotten, Removed, Stats, Uses
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
MOST_EVICTED = 512  # latents in one round of eviction, which has to end before the next begins
AT_ONCE = 32  # latents removed or counted in one transaction, so that no transaction is long
ROUNDS = 2  # of a search that finds entries which another process removed
FOLLOWED = 1000  # changes of other processes that are applied at a time
CHANGES_KEPT = 200_000  # versions; a process that lags more rebuilds its index
WRITE_S = ORPHAN_AGE_S / 2  # objects that are not in the catalogue after this time are given up


@dataclass(frozen=True)
class Neighbour:
    """A cached prompt near to a prompt, and its `vector` (d,). `skips` are the K whose latents are
    stored."""

    entry: int
    prompt: str
    similarity: float
    skips: tuple[int, ...]
    vector: Vector = field(default_factory=lambda: np.zeros(0, np.float32), compare=False)


class ApproximateCache:
    """Latents of full runs by prompt, `limit_bytes` at most; `eviction` is one of `ORDERS`.

    Objects are written before the catalogue names them and deleted after it has removed them (on a
    full disk before: fetches pass over what is missing);
    `sweep` deletes what a crash leaves in between. Several processes may use one catalogue and one
    store; each applies the changes of the others when it calls `follow`, and their removals also
    when a search meets them. The limit is of all together, and the smallest limit is what counts.
    Threads may share one cache.
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
        self._index: SimilarityIndex | None = None
        self._following = threading.Lock()
        self._followed = -1  # the catalogue's version that the index has
        self._index_file, self._saved = index_file, 0  # changes of the index that are saved
        self._building, self._saving = threading.Lock(), threading.Lock()
        self._uses: dict[tuple[int, int], Uses] = {}
        self._noting, self._evicting = threading.Lock(), threading.Lock()

    def load(self) -> None:
        """Restore the similarity index, or build it from the catalogue, which otherwise the first
        search does. Building takes minutes for hundreds of thousands of entries."""
        self._built()

    def _built(self) -> SimilarityIndex:
        with self._building:
            if self._index is None:
                self._followed = self._catalogue.refresh().version  # before the vectors are read
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
                with self._building:
                    if self._index is index:
                        self._saved = changes

    def _index_if_built(self) -> SimilarityIndex | None:
        """The index; None if it is not built yet. Waits while it is being built, so that a change
        of the catalogue can be applied to it; an index built later reads the changed catalogue."""
        with self._building:
            return self._index

    def follow(self, wait: bool = True) -> None:
        """Bring the totals, and the index if it is built, up to the catalogue, which other
        processes change as well. Reads one row where nothing changed.

        Additions reach the index only here, in the order of the catalogue's versions, those of this
        process too; so it never keeps an entry that was removed right after it was added. Searches
        wait for one change at most. Without `wait`, returns at once if another thread is following,
        and applies at most `FOLLOWED` changes. Raises SQLAlchemyError.
        """
        if not self._following.acquire(blocking=wait):
            return
        try:
            index, more = self._index_if_built(), True
            if index is None:
                self._catalogue.refresh()
                return
            while more:
                changes = self._catalogue.changes(self._followed, FOLLOWED)
                for one in changes.found:
                    if one.vector is None:
                        index.remove(one.scope, one.entry)
                    else:
                        index.add(one.scope, one.entry, one.vector)
                self._followed = changes.upto
                more = changes.more and wait
        except Forgotten:
            if wait:
                log.warning("The cache's index lags too far behind and is built anew")
                self._rebuild()
        finally:
            self._following.release()

    def _rebuild(self) -> None:
        """Build another index, while searches use the old one."""
        followed = self._catalogue.refresh().version
        index = SimilarityIndex(self._catalogue.vectors())
        with self._building:
            self._index, self._followed, self._saved = index, followed, 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all latents, as of the last write or `follow`."""
        return self._catalogue.totals.size_bytes

    @property
    def limit_bytes(self) -> int:
        """Most bytes of all latents."""
        return self._limit

    def __len__(self) -> int:
        """Number of entries. Neither reads the catalogue nor builds the index."""
        index = self._index
        return self._catalogue.totals.entries if index is None else len(index)

    def close(self) -> None:
        try:
            self.count_uses()
        except SQLAlchemyError as error:
            log.warning("Uses of latents were not counted: %s", named(error))
        self._catalogue.close()

    def is_empty(self, scope: Scope) -> bool:
        """Whether a search of a scope finds nothing, as far as is known at once: False while the
        index is not built. Never waits."""
        index = self._index
        return index is not None and index.is_empty(scope.key)

    def find(self, scope: Scope, vector: Vector, count: int = 1) -> list[Neighbour]:
        """The `count` nearest entries of a scope, nearest first, or as many as there are.

        `vector` (d,) need not have unit length.
        """
        found: list[Neighbour] = []
        for _ in range(ROUNDS):
            index = self._built()
            nearest = index.nearest(scope.key, vector, count)
            entries = self._catalogue.of_ids([number for number, _ in nearest])
            found = [
                Neighbour(entry.id, entry.prompt, similarity, entry.skips, known)
                for number, similarity in nearest
                if (entry := entries.get(number)) is not None
                and (known := index.vector(scope.key, number)) is not None
            ]
            if len(found) == len(nearest):
                break
            for number, _ in nearest:  # another process removed these, and maybe more
                if number not in entries:
                    index.remove(scope.key, number)
            self.follow(wait=False)
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
            removed = self._catalogue.remove_latents([(neighbour.entry, k)])
            if removed:  # else another process has just removed them
                log.warning("Removed latents of entry %d at K=%d: %s", neighbour.entry, k, error)
            self._drop(removed)
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
        prompt that another thread is storing, or another process has just stored. Evicts latents
        beyond the limit, and on a disk that is full before the limit is reached. What was written
        before an error is deleted; by `sweep`, if it is the catalogue's error.
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
            self._free_disk(SPARE * sum(one.nbytes for one in latents.values()))
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
        begun = time.monotonic()
        try:
            for k in lacking:
                written.append(self._store.put(k, latents[k]))
            if written and time.monotonic() - begun > WRITE_S:
                raise TimeoutError(f"writing took longer than {WRITE_S:g} s: see `sweep`")
            if written:
                with self._lock:
                    now = self._clock()
                    if entry is None or not self._catalogue.add_latents(entry, written, now):
                        entry = self._catalogue.add(scope, prompt, vector, written, now)
        except Exception as error:
            # The answer to a commit may be lost: then the catalogue names them. Else, and if
            # deleting fails too, `sweep` deletes.
            if not isinstance(error, SQLAlchemyError) or _is_full(error):
                with suppress(Exception):
                    self._store.delete([one.name for one in written])
            raise
        if written and entry is None:  # another process was faster
            self._store.delete([one.name for one in written])
        elif written:
            self.follow(wait=False)
        if self.size_bytes > self._limit:
            self._evict(sum(one.size_bytes for one in written))
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
            self._drop(self._catalogue.remove_entry(one.id))
        return len(found)

    def sweep(self) -> None:
        """Delete objects that the catalogue does not name and that are too old to be in writing:
        `keep` gives up objects that it has not entered into the catalogue in half of that time.
        Other processes may write and sweep at the same time. Old changes are forgotten."""
        self._catalogue.forget_changes(CHANGES_KEPT)
        now, known = self._clock(), self._catalogue.names()
        self._store.delete(
            [
                name
                for name, written_at in self._store.written(known)
                if now - written_at > ORPHAN_AGE_S
            ]
        )

    def sweep_near(self) -> None:
        """Delete from the disk tier, which other processes do not see, what the catalogue does not
        name."""
        if self.tiered:
            self._store.keep_near(self._catalogue.names())

    def sweep_in_turn(self, every_s: float) -> None:
        """Sweep, unless this or another process has begun to in the last `every_s` seconds."""
        if self._catalogue.take_turn(self._clock(), every_s):
            self.sweep()

    def _evict(self, stored_bytes: int) -> None:
        """Evict latents in the order of `eviction` until a little room is left below the limit, in
        rounds of `MOST_EVICTED` or of twice what was just stored, one with each run that is stored.
        Returns at once if another thread is evicting.

        Where several processes evict at once, each passes over what another has just removed; of
        what each chose, all is gone in the end, so the total is below the limit all the same.
        """
        if not self._evicting.acquire(blocking=False):
            return
        try:
            self.count_uses()
            excess = self._catalogue.refresh().size_bytes - self._limit * (1 - ROOM)
            chosen = self._least_worth(excess, 2 * stored_bytes)
            while chosen:
                self._drop(self._catalogue.remove_latents(chosen[:AT_ONCE]))
                del chosen[:AT_ONCE]
        finally:
            self._evicting.release()

    def _free_disk(self, least_bytes: float) -> None:
        """Evict at least so many bytes, and as much room as one round may free; objects first,
        since the catalogue may need room to write."""
        chosen = self._least_worth(max(ROOM * self.size_bytes, least_bytes), least_bytes)
        while chosen:
            some = chosen[:AT_ONCE]
            stored = [self._catalogue.latents(entry, k) for entry, k in some]
            self._store.delete([one.name for one in stored if one is not None])
            self._drop(self._catalogue.remove_latents(some))
            del chosen[:AT_ONCE]

    def _least_worth(self, size_bytes: float, least_bytes: float) -> list[tuple[int, int]]:
        """(entry, K) of the first latents in the order of `eviction`: `size_bytes` in all, or
        `MOST_EVICTED` of them if these have `least_bytes`."""
        chosen: list[tuple[int, int]] = []
        freed = 0
        for entry, k, size in self._catalogue.least_worth(self._eviction):
            if freed >= size_bytes or (freed >= least_bytes and len(chosen) >= MOST_EVICTED):
                break
            chosen.append((entry, k))
            freed += size
        return chosen

    def _drop(self, removed: list[Removed]) -> None:
        """Remove latents that left the catalogue from the index and the store."""
        index = self._index_if_built()
        for one in removed:
            if one.scope is not None and index is not None:
                index.remove(one.scope, one.entry)
        self._store.delete([one.name for one in removed])


def _is_full(error: Exception) -> bool:
    """Whether an error says that a disk is full."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return getattr(error, "errno", None) in FULL or code == sqlite3.SQLITE_FULL
