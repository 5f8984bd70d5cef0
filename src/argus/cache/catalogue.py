"""The catalogue of the cache on disk: entries, their latents, and the uses of each."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import sqlalchemy as sa

from argus.cache.database import BIG, open_database
from argus.cache.index import Vector
from argus.cache.latents import StoredLatents
from argus.cache.scope import Scope

_meta = sa.MetaData()
_entries = sa.Table(
    "entries",
    _meta,
    sa.Column("id", BIG, primary_key=True, autoincrement=True),
    sa.Column("scope", sa.String(32), nullable=False),
    sa.Column("namespace", sa.Text, nullable=False, index=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("entries_by_scope", "scope"),
    sa.Index("entries_by_prompt", "prompt", postgresql_using="hash"),
    sqlite_autoincrement=True,
)
_latents = sa.Table(
    "latents",
    _meta,
    sa.Column("entry", BIG, primary_key=True, autoincrement=False),
    sa.Column("k", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size_bytes", BIG, nullable=False),
    sa.Column("uses", BIG, nullable=False),
    sa.Column("used_at", sa.Float, nullable=False),
)

_VECTORS = sa.select(_entries.c.id, _entries.c.scope, _entries.c.vector)
_identity = sa.Table("identity", _meta, sa.Column("id", sa.String(8), primary_key=True))
_changes = sa.Table(  # the entries that transactions added or removed
    "changes",
    _meta,
    sa.Column("version", BIG, primary_key=True, autoincrement=False),
    sa.Column("entry", BIG, primary_key=True, autoincrement=False),
    sa.Column("scope", sa.String(32), nullable=False),
)
_totals = sa.Table(  # one row
    "totals",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("entries", BIG, nullable=False),
    sa.Column("size_bytes", BIG, nullable=False),
    sa.Column("version", BIG, nullable=False),
    sa.Column("forgotten", BIG, nullable=False),  # the newest version whose changes were deleted
    sa.Column("swept_at", sa.Float, nullable=False),
)
PAGE = 10_000  # rows of one read of a long table
ORDERS: dict[str, tuple[sa.ColumnElement[float], ...]] = {
    # Uses times the steps that each saves; among equals the least recently used first (Nirvana,
    # NSDI 2024). Storing does not count as a use: otherwise latents of a large K that were never
    # fetched would outlast latents of a small K that were fetched often.
    "lcbfu": (_latents.c.uses * _latents.c.k, _latents.c.used_at),
    "lru": (_latents.c.used_at, _latents.c.k),
    "fifo": (_latents.c.entry, _latents.c.k),
}


@dataclass(frozen=True)
class Entry:
    """A cached prompt. `skips` are the steps K with stored latents, ascending."""

    id: int
    scope: str
    namespace: str
    model: str
    prompt: str
    created_at: float
    skips: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class Stats:
    """Totals of the cache. `uses` counts fetches; `namespaces` has the entries of each."""

    entries: int
    latents: int
    size_bytes: int
    uses: int
    namespaces: dict[str, int]


@dataclass(frozen=True)
class Totals:
    """Entries and their bytes, of all servers, as of a version of the catalogue."""

    entries: int
    size_bytes: int
    version: int


@dataclass(frozen=True)
class Change:
    """An entry that was added or removed: its vector (d,), or None if it is not there."""

    version: int
    entry: int
    scope: str
    vector: Vector | None


@dataclass(frozen=True)
class Changes:
    """All changes up to the version `upto`, in their order. `more` if there are later ones."""

    found: list[Change]
    upto: int
    more: bool


class Forgotten(Exception):
    """Changes were deleted that the caller has not seen."""


@dataclass(frozen=True)
class Uses:
    """Number of fetches of latents since the last write to the catalogue, and the time of the
    last."""

    count: int
    last_at: float

    def __add__(self, other: Uses) -> Uses:
        return Uses(self.count + other.count, max(self.last_at, other.last_at))


@dataclass(frozen=True)
class Removed:
    """Latents removed from the catalogue; `scope` is set if their entry was removed with them."""

    entry: int
    name: str
    scope: str | None


class Catalogue:
    """The catalogue in the database at `url`: SQLite or PostgreSQL (`open_database`), which many
    processes may share.

    `id` distinguishes a catalogue's objects from another's in the same store. `totals` are as of
    the last write, `refresh` or `changes` of this process.

    Every transaction that adds or removes latents updates the row of totals last, just before it
    commits, and thereby takes the next version. That row is locked until the commit, so the next
    version is taken only after the changes of this one can be seen: whoever sees a version sees
    all earlier ones, and "later than the last version seen" misses nothing, which would not hold
    for numbers of a sequence. A transaction that holds this lock waits for no other.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)
        # a single statement needs no transaction, which costs two more round trips
        self._reading = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lock = threading.Lock()
        self.totals = Totals(0, 0, -1)
        with self._reading.connect() as connection:
            self.id = str(connection.execute(sa.select(_identity.c.id)).scalar_one())
        self.refresh()

    def close(self) -> None:
        self._engine.dispose()

    def add(
        self,
        scope: Scope,
        prompt: str,
        vector: Vector,
        latents: Iterable[StoredLatents],
        now: float,
    ) -> int | None:
        """Add an entry with its latents in one transaction. Returns its id; None, and adds nothing,
        if the scope has an entry for this prompt."""
        rows = list(latents)
        others = sa.select(_entries.c.id).where(
            _entries.c.scope == scope.key, _entries.c.prompt == prompt
        )
        with self._engine.connect() as connection:
            (entry,) = connection.execute(
                _entries.insert()
                .values(
                    scope=scope.key,
                    namespace=scope.namespace,
                    model=scope.model,
                    prompt=prompt,
                    vector=vector.astype(np.float16).tobytes(),
                    created_at=now,
                )
                .returning(_entries.c.id)
            ).one()
            connection.execute(_latents.insert(), _rows(entry, rows, now))
            size = sum(one.size_bytes for one in rows)
            totals = _count(connection, 1, size, [(entry, scope.key)])
            # with the totals locked, all entries of other transactions can be seen
            if connection.execute(others.where(_entries.c.id != entry)).first() is not None:
                return None
            connection.commit()
        self._saw(totals)
        return int(entry)

    def add_latents(self, entry: int, latents: Iterable[StoredLatents], now: float) -> bool:
        """Add latents to an entry that lacks them. Returns False, and adds nothing, if the entry is
        gone."""
        rows = list(latents)
        with self._engine.connect() as connection:
            connection.execute(_locked([entry])).all()
            connection.execute(_latents.insert(), _rows(entry, rows, now))
            # again: on SQLite the entry may be removed until the first write of this transaction
            if connection.execute(_locked([entry])).first() is None:
                return False
            totals = _count(connection, 0, sum(one.size_bytes for one in rows), [])
            connection.commit()
        self._saw(totals)
        return True

    def refresh(self) -> Totals:
        """Read the totals."""
        query = sa.select(_totals.c.entries, _totals.c.size_bytes, _totals.c.version)
        with self._reading.connect() as connection:
            totals = Totals(*connection.execute(query).one())
        self._saw(totals)
        return totals

    def changes(self, after: int, limit: int = PAGE) -> Changes:
        """What was added or removed since the version `after`, `limit` at most, which has to be
        more than one transaction's. Reads one row if nothing was.

        Raises Forgotten if some of the changes were deleted, or the version is from before a backup
        was restored.
        """
        totals = self.refresh()
        upto = totals.version
        if upto < after:
            self.totals = totals
            raise Forgotten(f"{upto} is earlier than {after}")
        if upto == after:
            return Changes([], after, more=False)
        query = (
            sa.select(_changes, _entries.c.vector)
            .outerjoin(_entries, _entries.c.id == _changes.c.entry)
            .where(_changes.c.version > after)
            .order_by(_changes.c.version, _changes.c.entry)
            .limit(limit)
        )
        with self._reading.connect() as connection:
            rows = connection.execute(query).all()
            # read after the changes, which are deleted after this was written
            forgotten = connection.execute(sa.select(_totals.c.forgotten)).scalar_one()
        if forgotten > after:
            raise Forgotten(f"{forgotten} is later than {after}")
        if more := len(rows) == limit:  # the rest of the last version may be missing
            upto = rows[-1].version - 1
        return Changes(
            [_change(row) for row in rows if row.version <= upto or not more], upto, more
        )

    def forget_changes(self, kept: int) -> None:
        """Delete all but the changes of the last `kept` versions."""
        oldest = _totals.c.version - kept
        with self._engine.begin() as connection:
            moved = connection.execute(
                _totals.update().where(oldest > _totals.c.forgotten).values(forgotten=oldest)
            ).rowcount
        if not moved:
            return
        with self._reading.connect() as connection:
            forgotten = connection.execute(sa.select(_totals.c.forgotten)).scalar_one()
            first = connection.execute(sa.select(sa.func.min(_changes.c.version))).scalar()
        while first is not None and first <= forgotten:
            first += PAGE
            until = min(first, forgotten + 1)
            with self._engine.begin() as connection:
                connection.execute(_changes.delete().where(_changes.c.version < until))

    def take_turn(self, now: float, every_s: float) -> bool:
        """Whether nobody has swept in the last `every_s` seconds; then the caller has to."""
        due = sa.func.abs(_totals.c.swept_at - now) >= every_s  # also after a clock ran ahead
        with self._engine.begin() as connection:
            taken = connection.execute(_totals.update().where(due).values(swept_at=now)).rowcount
        return bool(taken)

    def of_ids(self, entries: Collection[int]) -> dict[int, Entry]:
        """Those of the entries, given by id, that exist and have latents."""
        if not entries:
            return {}
        return {one.id: one for one in self._select(_entries.c.id.in_(entries))}

    def entries(
        self,
        namespace: str | None = None,
        prompt: str | None = None,
        entry: int | None = None,
        limit: int | None = None,
    ) -> list[Entry]:
        """Entries, newest first, filtered by the arguments that are not None."""
        given = ((_entries.c.namespace, namespace), (_entries.c.prompt, prompt))
        conditions = [column == value for column, value in given if value is not None]
        if entry is not None:
            conditions.append(_entries.c.id == entry)
        return self._select(*conditions, limit=limit)

    def stored(self, scope: Scope, prompt: str) -> Entry | None:
        """A scope's entry for a prompt."""
        here = (_entries.c.scope == scope.key, _entries.c.prompt == prompt)
        return next(iter(self._select(*here, limit=1)), None)

    def ids_by_scope(self) -> dict[str, set[int]]:
        """Every entry, by the key of its scope. Entries that are added or removed meanwhile may be
        among them or not."""
        query = sa.select(_entries.c.scope, _entries.c.id).order_by(_entries.c.id).limit(PAGE)
        found: dict[str, set[int]] = {}
        last, full = -1, True
        while full:
            with self._reading.connect() as connection:
                page = connection.execute(query.where(_entries.c.id > last)).all()
            full = len(page) == PAGE
            for scope, entry in page:
                last = entry
                found.setdefault(scope, set()).add(entry)
        return found

    def vectors(self) -> Iterator[tuple[int, str, Vector]]:
        """Id, scope key and vector (d,) of every entry, to rebuild the index. Entries that are
        added or removed meanwhile may be among them or not."""
        query = _VECTORS.order_by(_entries.c.id).limit(PAGE)
        last, full = -1, True
        while full:  # page by page: a long read would keep the database from cleaning up
            with self._reading.connect() as connection:
                page = connection.execute(query.where(_entries.c.id > last)).all()
            full = len(page) == PAGE
            for row in page:
                last = row.id
                yield row.id, row.scope, _vector(row.vector)

    def vectors_of(self, entries: Iterable[int]) -> Iterator[tuple[int, str, Vector]]:
        """As `vectors`, of some entries; those that are gone are left out."""
        left = iter(sorted(entries))
        while some := list(islice(left, 500)):
            with self._reading.connect() as connection:
                rows = connection.execute(_VECTORS.where(_entries.c.id.in_(some))).all()
            for row in rows:
                yield row.id, row.scope, _vector(row.vector)

    def names(self) -> set[str]:
        """The names of all latents objects. What is added or removed meanwhile may be among them or
        not."""
        entry, k = _latents.c.entry, _latents.c.k
        query = sa.select(_latents.c.name, entry, k).order_by(entry, k).limit(PAGE)
        names: set[str] = set()
        last, full = (-1, -1), True
        while full:
            after = (entry > last[0]) | ((entry == last[0]) & (k > last[1]))
            with self._reading.connect() as connection:
                page = connection.execute(query.where(entry >= last[0], after)).all()
            names.update(row.name for row in page)
            full = len(page) == PAGE
            if full:
                last = (page[-1].entry, page[-1].k)
        return names

    def latents(self, entry: int, k: int) -> StoredLatents | None:
        query = sa.select(_latents).where(_latents.c.entry == entry, _latents.c.k == k)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else StoredLatents(row.k, row.name, row.sha256, row.size_bytes)

    def used(self, uses: Mapping[tuple[int, int], Uses]) -> None:
        """Add to the uses of latents by (entry, K), in one transaction."""
        at = sa.bindparam("at", type_=sa.Float)
        query = (
            _latents.update()
            .where(
                _latents.c.entry == sa.bindparam("of", type_=BIG),
                _latents.c.k == sa.bindparam("after", type_=sa.Integer),
            )
            .values(
                uses=_latents.c.uses + sa.bindparam("more", type_=BIG),
                used_at=sa.case((_latents.c.used_at < at, at), else_=_latents.c.used_at),
            )
        )
        rows = [
            {"of": entry, "after": k, "more": one.count, "at": one.last_at}
            for (entry, k), one in sorted(uses.items(), key=lambda item: item[0])
        ]
        with self._engine.begin() as connection:
            connection.execute(query, rows)

    def stats(self) -> Stats:
        by_namespace = (
            sa.select(_entries.c.namespace, sa.func.count())
            .group_by(_entries.c.namespace)
            .order_by(_entries.c.namespace)
        )
        stored = sa.func.coalesce(sa.func.sum(_latents.c.size_bytes), 0)
        used = sa.func.coalesce(sa.func.sum(_latents.c.uses), 0)
        with self._engine.connect() as connection:
            namespaces = {name: int(n) for name, n in connection.execute(by_namespace)}
            count, size, uses = connection.execute(
                sa.select(sa.func.count(), stored, used).select_from(_latents)
            ).one()
        return Stats(sum(namespaces.values()), int(count), int(size), int(uses), namespaces)

    def least_worth(self, order: str = "lcbfu") -> Iterator[tuple[int, int, int]]:
        """(entry, K, bytes) in the order of eviction, one of `ORDERS`; read as far as it is
        consumed."""
        query = sa.select(_latents.c.entry, _latents.c.k, _latents.c.size_bytes).order_by(
            *ORDERS[order]
        )
        with self._engine.connect() as connection:
            for row in connection.execute(query.execution_options(yield_per=PAGE)):
                yield row.entry, row.k, row.size_bytes

    def remove_latents(self, pairs: Iterable[tuple[int, int]]) -> list[Removed]:
        """Remove latents by (entry, K), and entries that have none left, in one transaction.

        Rows are locked in one order, entries before latents: otherwise two such transactions, or
        one of them and `used` or `add_latents`, may deadlock.
        """
        chosen = sorted(set(pairs))
        if not chosen:
            return []
        these = sa.tuple_(_latents.c.entry, _latents.c.k).in_(chosen)
        found = sa.select(_latents.c.k).where(these).order_by(_latents.c.entry, _latents.c.k)
        of = (_latents.c.entry, _latents.c.k, _latents.c.name, _latents.c.size_bytes)
        gone = _latents.delete().where(these).returning(*of)
        empty = ~sa.exists().where(_latents.c.entry == _entries.c.id)
        with self._engine.begin() as connection:
            connection.execute(_locked({entry for entry, _ in chosen})).all()
            connection.execute(found.with_for_update()).all()
            rows = sorted(connection.execute(gone).all())  # others may have removed some already
            if not rows:
                return []
            touched = _entries.c.id.in_({row.entry for row in rows})
            left = _entries.delete().where(touched, empty)
            deleted = connection.execute(left.returning(_entries.c.id, _entries.c.scope))
            whole = {row.id: row.scope for row in deleted}
            size = sum(row.size_bytes for row in rows)
            totals = _count(connection, -len(whole), -size, whole.items())
        self._saw(totals)
        return [Removed(row.entry, row.name, whole.get(row.entry)) for row in rows]

    def remove_entry(self, entry: int) -> list[Removed]:
        """Remove an entry with all its latents."""
        query = sa.select(_latents.c.k).where(_latents.c.entry == entry)
        with self._engine.connect() as connection:
            skips = connection.execute(query).scalars().all()
        return self.remove_latents((entry, k) for k in skips)

    def probe(self) -> None:
        """Write something that changes nothing. Raises SQLAlchemyError if the write fails."""
        with self._engine.begin() as connection:
            connection.execute(_identity.update().values(id=_identity.c.id))

    def _saw(self, totals: Totals) -> None:
        with self._lock:
            if totals.version > self.totals.version:
                self.totals = totals

    def _select(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Entry]:
        query = (
            sa.select(_entries, _latents.c.k, _latents.c.size_bytes)
            .join(_latents, _latents.c.entry == _entries.c.id)
            .where(*conditions)
            .order_by(_entries.c.id.desc(), _latents.c.k)
        )
        if limit is not None:
            has_latents = sa.exists().where(_latents.c.entry == _entries.c.id)
            newest = sa.select(_entries.c.id).where(*conditions, has_latents)
            newest = newest.order_by(_entries.c.id.desc()).limit(limit)
            query = query.where(_entries.c.id.in_(newest))
        found: dict[int, Entry] = {}
        with self._reading.connect() as connection:
            for row in connection.execute(query):
                known = found.get(row.id)
                skips = (row.k,) if known is None else (*known.skips, row.k)
                size = row.size_bytes + (known.size_bytes if known else 0)
                found[row.id] = Entry(
                    row.id, row.scope, row.namespace, row.model, row.prompt,
                    row.created_at, skips, size,
                )  # fmt: skip
        return list(found.values())


def _count(
    connection: sa.Connection, entries: int, size_bytes: int, changed: Iterable[tuple[int, str]]
) -> Totals:
    """Add to the totals, and note the entries, with their scopes, that come or go. The last of a
    transaction."""
    row = connection.execute(
        _totals.update()
        .values(
            entries=_totals.c.entries + entries,
            size_bytes=_totals.c.size_bytes + size_bytes,
            version=_totals.c.version + 1,
        )
        .returning(_totals.c.entries, _totals.c.size_bytes, _totals.c.version)
    ).one()
    notes = [{"version": row.version, "entry": entry, "scope": scope} for entry, scope in changed]
    if notes:
        connection.execute(_changes.insert(), notes)
    return Totals(*row)


def _locked(entries: Collection[int]) -> sa.Select[tuple[int]]:
    """Select the entries' rows, in the order of their ids, and lock them until the transaction
    ends, before their latents are changed. Otherwise two transactions that each remove one of the
    last two latents would both leave the entry. On SQLite this is a plain SELECT, since only one
    transaction writes at a time."""
    found = sa.select(_entries.c.id).where(_entries.c.id.in_(entries))
    return found.order_by(_entries.c.id).with_for_update()


def _change(row: sa.Row[Any]) -> Change:
    vector = None if row.vector is None else _vector(row.vector)
    return Change(row.version, row.entry, row.scope, vector)


def _vector(data: bytes) -> Vector:
    return np.frombuffer(data, np.float16).astype(np.float32)


def _rows(entry: int, latents: Iterable[StoredLatents], now: float) -> list[dict[str, object]]:
    return [
        {
            "entry": entry,
            "k": stored.k,
            "name": stored.name,
            "sha256": stored.sha256,
            "size_bytes": stored.size_bytes,
            "uses": 0,
            "used_at": now,
        }
        for stored in latents
    ]
