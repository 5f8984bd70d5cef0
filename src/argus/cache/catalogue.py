"""The catalogue of the cache on disk: entries, their latents, and the uses of each."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import sqlalchemy as sa

from argus.cache.index import Vector
from argus.cache.latents import StoredLatents
from argus.cache.scope import Scope

_meta = sa.MetaData()
_entries = sa.Table(
    "entries",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("scope", sa.String(32), nullable=False),
    sa.Column("namespace", sa.Text, nullable=False, index=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Index("entries_by_scope", "scope"),
    sqlite_autoincrement=True,
)
_latents = sa.Table(
    "latents",
    _meta,
    sa.Column("entry", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("k", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("uses", sa.Integer, nullable=False),
    sa.Column("used_at", sa.Float, nullable=False),
)

_VECTORS = sa.select(_entries.c.id, _entries.c.scope, _entries.c.vector)
_identity = sa.Table("identity", _meta, sa.Column("id", sa.String(8), primary_key=True))
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
    """The catalogue in a database: SQLite by default, or any that SQLAlchemy supports, by URL.

    `id` distinguishes a catalogue's objects from another's in the same store.
    """

    def __init__(self, url: str) -> None:
        self._engine = new_engine(url)
        _meta.create_all(self._engine)
        self.id = self._own_id()

    def close(self) -> None:
        self._engine.dispose()

    def add(
        self,
        scope: Scope,
        prompt: str,
        vector: Vector,
        latents: Iterable[StoredLatents],
        now: float,
    ) -> int:
        """Add an entry with its latents in one transaction. Returns its id."""
        with self._engine.begin() as connection:
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
            connection.execute(_latents.insert(), _rows(entry, latents, now))
        return int(entry)

    def add_latents(self, entry: int, latents: Iterable[StoredLatents], now: float) -> bool:
        """Add latents to an entry that lacks them. Returns False, and adds nothing, if the entry is
        gone."""
        with self._engine.connect() as connection:
            connection.execute(_latents.insert(), _rows(entry, latents, now))
            there = connection.execute(locked(entry)).first() is not None
            if there:
                connection.commit()
        return there

    def entry(self, entry: int) -> Entry | None:
        return next(iter(self._select(_entries.c.id == entry)), None)

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

    def ids(self, scope: str) -> set[int]:
        """The entries of a scope, given by its key, that have latents."""
        query = (
            sa.select(_entries.c.id)
            .join(_latents, _latents.c.entry == _entries.c.id)
            .where(_entries.c.scope == scope)
        )
        with self._engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def ids_by_scope(self) -> dict[str, set[int]]:
        """Every entry, by the key of its scope."""
        query = sa.select(_entries.c.scope, _entries.c.id)
        found: dict[str, set[int]] = {}
        with self._engine.connect() as connection:
            for some in connection.execute(query).partitions(10_000):
                for scope, entry in some:
                    found.setdefault(scope, set()).add(entry)
        return found

    def vectors(self) -> Iterator[tuple[int, str, Vector]]:
        """Id, scope key and vector (d,) of every entry, to rebuild the index."""
        with self._engine.connect() as connection:
            for entry, scope, data in connection.execute(_VECTORS):
                yield entry, scope, np.frombuffer(data, np.float16).astype(np.float32)

    def vectors_of(self, entries: Iterable[int]) -> Iterator[tuple[int, str, Vector]]:
        """As `vectors`, of some entries; those that are gone are left out."""
        left = iter(sorted(entries))
        while some := list(islice(left, 500)):
            with self._engine.connect() as connection:
                for entry, scope, data in connection.execute(
                    _VECTORS.where(_entries.c.id.in_(some))
                ):
                    yield entry, scope, np.frombuffer(data, np.float16).astype(np.float32)

    def names(self) -> set[str]:
        """The names of all latents objects."""
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(_latents.c.name)).scalars())

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
                _latents.c.entry == sa.bindparam("of", type_=sa.Integer),
                _latents.c.k == sa.bindparam("after", type_=sa.Integer),
            )
            .values(
                uses=_latents.c.uses + sa.bindparam("more", type_=sa.Integer),
                used_at=sa.case((_latents.c.used_at < at, at), else_=_latents.c.used_at),
            )
        )
        rows = [
            {"of": entry, "after": k, "more": one.count, "at": one.last_at}
            for (entry, k), one in sorted(uses.items(), key=lambda item: item[0])
        ]
        with self._engine.begin() as connection:
            connection.execute(query, rows)

    def count(self) -> int:
        """Number of entries."""
        with self._engine.connect() as connection:
            query = sa.select(sa.func.count()).select_from(_entries)
            return int(connection.execute(query).scalar_one())

    def size_bytes(self) -> int:
        """The bytes of all latents."""
        query = sa.select(sa.func.coalesce(sa.func.sum(_latents.c.size_bytes), 0))
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

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
        """(entry, K, bytes) in the order of eviction, one of `ORDERS`."""
        query = sa.select(_latents.c.entry, _latents.c.k, _latents.c.size_bytes).order_by(
            *ORDERS[order]
        )
        with self._engine.connect() as connection:
            for row in connection.execute(query):
                yield row.entry, row.k, row.size_bytes

    def remove_latents(self, pairs: Iterable[tuple[int, int]]) -> list[Removed]:
        """Remove latents by (entry, K), and entries that have none left, in one transaction."""
        removed: list[Removed] = []
        with self._engine.begin() as connection:
            for entry, k in sorted(pairs):  # in one order, or two such transactions may deadlock
                where = (_latents.c.entry == entry) & (_latents.c.k == k)
                gone = connection.execute(_latents.delete().where(where).returning(_latents.c.name))
                name = gone.scalar_one_or_none()
                if name is None:  # another process has removed it
                    continue
                connection.execute(locked(entry)).first()
                left = connection.execute(
                    sa.select(_latents.c.k).where(_latents.c.entry == entry).limit(1)
                ).first()
                scope = None
                if left is None:
                    scope = connection.execute(
                        _entries.delete().where(_entries.c.id == entry).returning(_entries.c.scope)
                    ).scalar_one_or_none()
                removed.append(Removed(entry, name, scope))
        return removed

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

    def _own_id(self) -> str:
        with self._engine.begin() as connection:
            known = connection.execute(sa.select(_identity.c.id)).scalar()
            if known is None:
                known = uuid.uuid4().hex[:8]
                connection.execute(_identity.insert().values(id=known))
        return str(known)

    def _select(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Entry]:
        query = (
            sa.select(_entries, _latents.c.k, _latents.c.size_bytes)
            .join(_latents, _latents.c.entry == _entries.c.id)
            .where(*conditions)
            .order_by(_entries.c.id.desc(), _latents.c.k)
        )
        found: dict[int, Entry] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(query):
                known = found.get(row.id)
                if known is None and limit is not None and len(found) == limit:
                    break
                skips = (row.k,) if known is None else (*known.skips, row.k)
                size = row.size_bytes + (known.size_bytes if known else 0)
                found[row.id] = Entry(
                    row.id, row.scope, row.namespace, row.model, row.prompt,
                    row.created_at, skips, size,
                )  # fmt: skip
        return list(found.values())


def new_engine(url: str) -> sa.Engine:
    """A database engine, set up for several threads and processes if it is SQLite."""
    engine = sa.create_engine(url, hide_parameters=True)  # errors would quote prompts
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _set_up_sqlite)
    return engine


def locked(entry: int) -> sa.Select[tuple[int]]:
    """Select an entry's row and lock it until the transaction ends, before its remaining latents
    are read. Otherwise two transactions that each remove one of the last two would both leave the
    entry. On SQLite this is a plain SELECT, since only one transaction writes at a time."""
    return sa.select(_entries.c.id).where(_entries.c.id == entry).with_for_update()


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


def _set_up_sqlite(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()
