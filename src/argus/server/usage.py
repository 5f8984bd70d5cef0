"""What pictures took, by hour, API key, SLO class and variant, in the catalogue's database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import sqlalchemy as sa

from argus.cache.database import open_database
from argus.server.errors import ApiError, invalid
from argus.server.health import StorageHealth
from argus.server.request import Picture
from argus.server.schema import Amounts, UsageReport, UsageRow
from argus.server.threads import Threads, TooManyHang

if TYPE_CHECKING:
    from argus.server.service import Service

USAGE = "usage"  # the kind of data, as in `StorageHealth`
HOUR_S = 3600
KEPT_S = 400 * 24 * HOUR_S
USUAL_S = 30 * 24 * HOUR_S  # of a report without `from`
FLUSH_S = 5.0
READ_LIMIT_S = 10.0

_meta = sa.MetaData()
_usage = sa.Table(
    "usage",
    _meta,
    sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("slo", sa.String(255), primary_key=True),
    sa.Column("family", sa.String(255), primary_key=True),
    sa.Column("variant", sa.String(255), primary_key=True),
    sa.Column("pictures", sa.BigInteger, nullable=False),
    sa.Column("gpu_seconds", sa.Float, nullable=False),
    sa.Column("saved_gpu_seconds", sa.Float, nullable=False),
    sa.Column("cost", sa.Float, nullable=False),
    sa.Column("saved_cost", sa.Float, nullable=False),
    sa.Column("energy_joules", sa.Float, nullable=False),
)


Whose = tuple[str, str, str, str]
WHOSE = ("key", "slo", "family", "variant")


@dataclass(frozen=True)
class Account:
    """Whose pictures, of which variant, finished in the hour that begins at `hour` (seconds since
    the epoch)."""

    hour: int
    key: str
    slo: str
    family: str
    variant: str


class UsageStore:
    """The usage in the database at `url`. Safe to call from any thread, and from many servers."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)

    def add(self, used: Mapping[Account, Amounts]) -> None:
        """Add amounts, all or none, and remove what is older than `KEPT_S`."""
        with self._engine.begin() as connection:
            for account, amounts in sorted(used.items(), key=lambda item: astuple(item[0])):
                those = [_usage.c[name] == value for name, value in asdict(account).items()]
                more = amounts.model_dump()
                sums = {name: _usage.c[name] + value for name, value in more.items()}
                update = _usage.update().where(*those).values(**sums)
                if connection.execute(update).rowcount:
                    continue
                try:
                    with connection.begin_nested():
                        insert = _usage.insert().values(**asdict(account), **more)
                        connection.execute(insert)
                except sa.exc.IntegrityError:
                    if not connection.execute(update).rowcount:  # else another server was faster
                        raise
            oldest = time.time() - KEPT_S
            connection.execute(_usage.delete().where(_usage.c.hour < oldest))

    def read(self, begin: int, end: int, key: str | None) -> dict[Whose, Amounts]:
        """The sums over the hours that begin in [begin, end), of one key or of all."""
        whose = [_usage.c[name] for name in WHOSE]
        sums = [sa.func.sum(_usage.c[name]).label(name) for name in Amounts.model_fields]
        query = sa.select(*whose, *sums).group_by(*whose)
        query = query.where(_usage.c.hour >= begin, _usage.c.hour < end)
        if key is not None:
            query = query.where(_usage.c.key == key)
        with self._engine.connect() as connection:
            rows = [row._asdict() for row in connection.execute(query)]
        return {
            (row["key"], row["slo"], row["family"], row["variant"]): Amounts(
                **{name: row[name] for name in Amounts.model_fields}
            )
            for row in rows
        }

    def close(self) -> None:
        self._engine.dispose()


class Usage:
    """Counts what pictures took and stores it every few seconds. For use from one asyncio loop.

    What cannot be stored stays in memory until it can.
    """

    def __init__(self, url: str, family: str, health: StorageHealth) -> None:
        self._store: UsageStore | None = None
        self._url, self._family, self._health = url, family, health
        self._threads = Threads("usage", 1)
        self._lock = asyncio.Lock()  # held while the database is read or written
        self._new: dict[Account, Amounts] = {}
        self._writing: asyncio.Task[None] | None = None
        health.add(USAGE, lambda: self._opened().add({}))

    def saw(self, picture: Picture) -> None:
        """Count a finished picture."""
        request = picture.request
        hour = int(time.time()) // HOUR_S * HOUR_S
        account = Account(hour, request.key, request.slo_name, self._family, picture.accounted)
        self._count(
            account,
            Amounts(
                pictures=1,
                gpu_seconds=request.worker_s,
                saved_gpu_seconds=picture.saved_s,
                cost=request.cost or 0.0,
                saved_cost=picture.saved_cost or 0.0,
                energy_joules=request.joules or 0.0,
            ),
        )

    async def run(self) -> None:
        """Store what is new every `FLUSH_S` seconds; does not return."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self._flush()

    async def read(self, begin: int, end: int, key: str | None) -> dict[Whose, Amounts]:
        """The sums over the hours that begin in [begin, end), of one key or of all, with what is
        not stored yet. Raises what the database raises, and TimeoutError."""
        async with asyncio.timeout(READ_LIMIT_S), self._lock:
            found = await self._threads.run(lambda: self._opened().read(begin, end, key))
        for account, amounts in self._new.items():
            if begin <= account.hour < end and key in (None, account.key):
                whose = (account.key, account.slo, account.family, account.variant)
                found[whose] = _sum([found.get(whose, Amounts()), amounts])
        return found

    async def close(self, limit_s: float) -> None:
        """Store what is new, in at most `limit_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._writing is not None and not self._writing.done():
                    await asyncio.wait((self._writing,))
                await self._write()

    async def _flush(self) -> None:
        """Store what is new. Goes on in a task of its own if it is cancelled."""
        if self._new and self._health.works(USAGE):
            self._writing = asyncio.create_task(self._write())
            await asyncio.shield(self._writing)

    async def _write(self) -> None:
        async with self._lock:
            new, self._new = self._new, {}
            if not new:
                return
            try:  # without a limit: what was given up could be stored after all, and counted twice
                await self._threads.run(lambda: self._opened().add(new))
            except Exception as error:
                self._health.failed(USAGE, error)
                for account, amounts in new.items():
                    self._count(account, amounts)

    def _opened(self) -> UsageStore:
        if self._store is None:
            self._store = UsageStore(self._url)
        return self._store

    def _count(self, account: Account, amounts: Amounts) -> None:
        known = self._new.get(account)
        self._new[account] = amounts if known is None else _sum([known, amounts])


def _sum(amounts: list[Amounts]) -> Amounts:
    names = Amounts.model_fields
    return Amounts(**{name: sum(getattr(one, name) for one in amounts) for name in names})


async def usage_report(
    service: Service, tenant: str, begin: datetime | None, end: datetime | None, key: str | None
) -> UsageReport:
    """The usage that a tenant asks for; other keys' is only for `admin_keys`. Raises ApiError."""
    free = service.is_admin(tenant)
    if not free and key not in (None, tenant):
        raise ApiError(
            HTTPStatus.FORBIDDEN,
            "A key sees its own usage: leave key out, or ask with one of the admin_keys.",
            "not_an_admin_key",
            "key",
        )
    whose = key if free else tenant
    now_s = time.time()
    end_s = now_s if end is None else _seconds(end)
    begin_s = end_s - USUAL_S if begin is None else _seconds(begin)
    if begin_s >= end_s:
        raise invalid("from is not before to.", "from")
    first, last = int(begin_s) // HOUR_S * HOUR_S, int(end_s)
    try:
        found = await service.usage.read(first, max(last, first + 1), whose)
    except (OSError, TimeoutError, TooManyHang, sa.exc.SQLAlchemyError) as error:
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "Usage cannot be read now: ask again.",
            "storage_unavailable",
            headers={"Retry-After": "5"},
        ) from error
    data = [
        UsageRow(key=key, slo=slo, family=family, variant=variant, **amounts.model_dump())
        for (key, slo, family, variant), amounts in sorted(found.items())
    ]
    return UsageReport(
        begin=first,
        end=last,
        currency=service.settings.currency,
        total=_sum(list(found.values())),
        data=data,
    )


def _seconds(when: datetime) -> float:
    """Seconds since the epoch; a time without a zone is UTC."""
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
