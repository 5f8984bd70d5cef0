"""Background jobs in the catalogue's database: what is queued, who runs it, and what came of it."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from argus.cache.database import open_database

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
UNFINISHED, FINISHED = (QUEUED, IN_PROGRESS), (COMPLETED, FAILED, CANCELLED)
DELIVERED, GIVEN_UP = "delivered", "given_up"  # outcomes of a webhook
MOST_TRIES = 3
MOST_SWEPT = 500  # jobs in one transaction, which others wait for

_meta = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _meta,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(64), nullable=False),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("as_url", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("expires_at", sa.Float),
    # when an unfinished job may begin: one in progress, when its server's lease ends
    sa.Column("due_at", sa.Float),
    sa.Column("lease", sa.String(32)),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("yields", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("webhook", sa.Text),
    sa.Column("webhook_at", sa.Float),
    sa.Column("webhook_tries", sa.Integer, nullable=False),
    sa.Column("webhook_outcome", sa.String(16)),
    sa.Column("request", sa.LargeBinary),
    sa.Column("result", sa.LargeBinary),
    sa.UniqueConstraint("key", "idempotency_key", name="one_job_per_idempotency_key"),
    sa.Index("jobs_by_key", "key", "created_at"),
    sa.Index("jobs_due", "due_at"),
    sa.Index("jobs_leases", "lease"),
    sa.Index("jobs_expired", "expires_at"),
    sa.Index("jobs_webhooks_due", "webhook_at"),
)


@dataclass(frozen=True)
class NewJob:
    """A job to add. `request` is the body as accepted, `fingerprint` a hash of it as it was sent;
    `size_bytes` is the most that its row should ever take. `as_url` says whether the client wants
    URLs. Times are seconds since the epoch."""

    id: str
    key: str
    idempotency_key: str | None
    fingerprint: str
    as_url: bool
    created_at: float
    size_bytes: int
    webhook: str | None
    request: bytes


@dataclass(frozen=True)
class Job:
    """A job as its client sees it, without request and result. `error` is an error's JSON."""

    id: str
    status: str
    as_url: bool
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    error: str | None
    webhook: str | None
    webhook_tries: int
    webhook_outcome: str | None

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


@dataclass(frozen=True)
class Taken:
    """A job that a server has taken to run. `lease` distinguishes this try from all others;
    `tries` counts it. `yields` counts how often it gave way to other requests."""

    id: str
    key: str
    lease: str
    tries: int
    yields: int
    request: bytes


@dataclass(frozen=True)
class Delivery:
    """A webhook to be called; `tries` counts this call."""

    id: str
    status: str
    finished_at: float
    webhook: str
    tries: int


class KeyReused(Exception):
    """The idempotency key belongs to a job with another body."""


class TooManyJobs(Exception):
    """The API key has as many unfinished jobs as it may have."""


class JobsFull(Exception):
    """The stored jobs, or those of the API key, take as many bytes as they may."""


_SHOWN = [_jobs.c[name] for name in Job.__dataclass_fields__]
_TAKEN = [_jobs.c[name] for name in Taken.__dataclass_fields__]


class JobStore:
    """The jobs in the database at `url`. Safe to call from any thread, and from many servers, whose
    clocks may differ by less than the least that is left of a lease before it is renewed."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _sync_fully)
            self._engine.dispose()  # connections that are open already lack it

    def close(self) -> None:
        self._engine.dispose()

    # --- for clients

    def add(self, new: NewJob, limit: int, limit_bytes: int) -> Job:
        """Add a job; returns the known one if the key has it under the same idempotency key.

        Raises KeyReused if that one has another fingerprint, TooManyJobs if the key has `limit`
        unfinished jobs, JobsFull if all jobs would take more than `limit_bytes`, or those of the
        key more than half of that. Jobs that are added at the same time may exceed the limits.
        """
        known = self._known(new)
        if known is not None:
            return known
        unfinished = sa.select(sa.func.count()).where(
            _jobs.c.key == new.key, _jobs.c.status.in_(UNFINISHED)
        )
        size_bytes = _jobs.c.size_bytes
        own_bytes = sa.case((_jobs.c.key == new.key, size_bytes), else_=0)
        stored = sa.select(
            *(sa.func.coalesce(sa.func.sum(one), 0) for one in (size_bytes, own_bytes))
        )
        with self._engine.connect() as connection:
            if connection.execute(unfinished).scalar_one() >= limit:
                raise TooManyJobs
            of_all, own = connection.execute(stored).one()
            if of_all + new.size_bytes > limit_bytes or own + new.size_bytes > limit_bytes // 2:
                raise JobsFull
        values = asdict(new) | {
            "status": QUEUED, "due_at": new.created_at, "tries": 0, "yields": 0, "webhook_tries": 0,
        }  # fmt: skip
        try:
            with self._engine.begin() as connection:
                query = _jobs.insert().values(**values).returning(*_SHOWN)
                return Job(**connection.execute(query).one()._asdict())
        except sa.exc.IntegrityError:  # another request with the same idempotency key was faster
            known = self._known(new)
            if known is None:
                raise
            return known

    def _known(self, new: NewJob) -> Job | None:
        """The job under the same idempotency key, unless it has expired. Raises KeyReused."""
        if new.idempotency_key is None:
            return None
        same = (_jobs.c.key == new.key, _jobs.c.idempotency_key == new.idempotency_key)
        with self._engine.begin() as connection:
            gone = _jobs.delete().where(*same, _jobs.c.expires_at <= new.created_at)
            connection.execute(gone)
            query = sa.select(*_SHOWN, _jobs.c.fingerprint).where(*same)
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        values = row._asdict()
        if values.pop("fingerprint") != new.fingerprint:
            raise KeyReused
        return Job(**values)

    def read(self, job: str, key: str, now: float) -> tuple[Job, bytes | None] | None:
        """A key's job, and its result if it is completed; None if there is none, or it expired."""
        query = sa.select(*_SHOWN, _jobs.c.result).where(_jobs.c.id == job, *_own(key, now))
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        values = row._asdict()
        result = values.pop("result")
        return Job(**values), result

    def newest(self, key: str, limit: int, after: str | None, now: float) -> list[Job] | None:
        """Up to `limit` jobs of a key, newest first, from the one after job `after` on; None if it
        has no such job."""
        query = sa.select(*_SHOWN).where(*_own(key, now))
        order = sa.tuple_(_jobs.c.created_at, _jobs.c.id)
        with self._engine.connect() as connection:
            if after is not None:
                last = sa.select(_jobs.c.created_at).where(_jobs.c.id == after, *_own(key, now))
                at = connection.execute(last).scalar_one_or_none()
                if at is None:
                    return None
                query = query.where(order < sa.tuple_(sa.literal(at), sa.literal(after)))
            newest = (_jobs.c.created_at.desc(), _jobs.c.id.desc())
            rows = connection.execute(query.order_by(*newest).limit(limit)).all()
        return [Job(**row._asdict()) for row in rows]

    def cancel(self, job: str, key: str, now: float, ttl_s: float) -> bool:
        """Cancel a key's job. Returns False if it has no such job that is unfinished."""
        those = (_jobs.c.id == job, _jobs.c.key == key, _jobs.c.status.in_(UNFINISHED))
        query = _jobs.update().where(*those).values(_end(CANCELLED, now, ttl_s))
        with self._engine.begin() as connection:
            return connection.execute(query).rowcount == 1

    # --- for the servers that run them

    def due(self, now: float) -> tuple[bool, bool]:
        """Whether a job is to be run, and whether a webhook is to be called. Locks nothing."""
        columns = (_jobs.c.due_at, _jobs.c.webhook_at)
        query = sa.select(*(sa.exists().where(column <= now) for column in columns))
        with self._engine.connect() as connection:
            row = connection.execute(query).one()
        return bool(row[0]), bool(row[1])

    def take(self, now: float, lease_s: float, own: Collection[str] = ()) -> Taken | None:
        """Take the oldest job that is due, for `lease_s` seconds; None if none is due. No two
        servers take the same, and none waits for another. `own` are the caller's leases, which it
        keeps even if its clock says that they ran out."""
        query = (
            _jobs.update()
            .where(_jobs.c.id == _first(sa.and_(_jobs.c.due_at <= now, _not_leased(own))))
            .values(
                status=IN_PROGRESS,
                lease=secrets.token_hex(16),
                due_at=now + lease_s,
                tries=_jobs.c.tries + 1,
                started_at=sa.func.coalesce(_jobs.c.started_at, now),
            )
            .returning(*_TAKEN)
        )
        with self._engine.begin() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Taken(**row._asdict())

    def fail_exhausted(
        self, now: float, ttl_s: float, error: str, own: Collection[str] = ()
    ) -> int:
        """End the jobs whose lease, none of `own`, ran out in their last try. Returns how many."""
        those = (
            _not_leased(own),
            _jobs.c.status == IN_PROGRESS,
            _jobs.c.due_at <= now,
            _jobs.c.tries >= MOST_TRIES,
        )
        query = _jobs.update().where(*those).values(_end(FAILED, now, ttl_s, error))
        with self._engine.begin() as connection:
            return connection.execute(query).rowcount

    def renew(self, leases: Collection[str], until: float) -> set[str]:
        """Extend leases; returns those that are still in force."""
        query = (
            _jobs.update()
            .where(_jobs.c.lease.in_(leases))
            .values(due_at=until)
            .returning(_jobs.c.lease)
        )
        with self._engine.begin() as connection:
            return set(connection.execute(query).scalars())

    def held(self, leases: Collection[str]) -> set[str]:
        """Those of some leases that are still in force: of jobs that were neither cancelled nor
        taken by another server."""
        query = sa.select(_jobs.c.lease).where(_jobs.c.lease.in_(leases))
        with self._engine.connect() as connection:
            return set(connection.execute(query).scalars())

    def give_back(self, taken: Taken, due_at: float, counts: bool, yielded: bool = False) -> bool:
        """Queue a job again, to begin at `due_at` or later; `counts` says whether the try counts.
        Returns False if the lease is not in force."""
        query = (
            _jobs.update()
            .where(_jobs.c.lease == taken.lease)
            .values(
                status=QUEUED,
                lease=None,
                due_at=due_at,
                tries=taken.tries if counts else taken.tries - 1,
                yields=taken.yields + yielded,
            )
        )
        with self._engine.begin() as connection:
            return connection.execute(query).rowcount == 1

    def finish(
        self,
        taken: Taken,
        now: float,
        ttl_s: float,
        result: bytes | None = None,
        error: str | None = None,
    ) -> bool:
        """Record a job's result, or the error that ended it. Returns False, and records nothing, if
        the lease is not in force: the job was cancelled, or another server has it."""
        status = FAILED if result is None else COMPLETED
        values = _end(status, now, ttl_s, error, result)
        query = _jobs.update().where(_jobs.c.lease == taken.lease).values(values)
        with self._engine.begin() as connection:
            return connection.execute(query).rowcount == 1

    def counts(self) -> dict[str, int]:
        """Number of unfinished jobs by status."""
        query = (
            sa.select(_jobs.c.status, sa.func.count())
            .where(_jobs.c.due_at.is_not(None))
            .group_by(_jobs.c.status)
        )
        with self._engine.connect() as connection:
            found = {status: int(count) for status, count in connection.execute(query)}
        return {status: found.get(status, 0) for status in UNFINISHED}

    def sweep(self, now: float) -> int:
        """Remove expired jobs, up to `MOST_SWEPT` of them. Returns how many."""
        expired = sa.select(_jobs.c.id).where(_jobs.c.expires_at <= now).limit(MOST_SWEPT)
        query = _jobs.delete().where(_jobs.c.id.in_(expired.with_for_update(skip_locked=True)))
        with self._engine.begin() as connection:
            return connection.execute(query).rowcount

    # --- webhooks

    def next_delivery(self, now: float, again_at: float) -> Delivery | None:
        """The webhook of the oldest job whose is due, to be called now; None if none is. Without
        `delivered`, it is due again at `again_at`."""
        shown = [_jobs.c.id, _jobs.c.status, _jobs.c.finished_at, _jobs.c.webhook]
        query = (
            _jobs.update()
            .where(_jobs.c.id == _first(_jobs.c.webhook_at <= now))
            .values(webhook_at=again_at, webhook_tries=_jobs.c.webhook_tries + 1)
            .returning(*shown, _jobs.c.webhook_tries.label("tries"))
        )
        with self._engine.begin() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Delivery(**row._asdict())

    def delivered(
        self, delivery: Delivery, outcome: str | None, again_at: float | None, called: bool = True
    ) -> None:
        """Record how a call of a webhook ended: for good (`outcome`), or to be repeated at
        `again_at`. One that was not `called` is no try."""
        those = (_jobs.c.id == delivery.id, _jobs.c.webhook_tries == delivery.tries)
        values = {
            "webhook_at": again_at,
            "webhook_outcome": outcome,
            "webhook_tries": delivery.tries if called else delivery.tries - 1,
        }
        with self._engine.begin() as connection:
            connection.execute(_jobs.update().where(*those).values(values))


def _own(key: str, now: float) -> Sequence[sa.ColumnElement[bool]]:
    expires_at = _jobs.c.expires_at
    return _jobs.c.key == key, sa.or_(expires_at.is_(None), expires_at > now)


def _not_leased(leases: Collection[str]) -> sa.ColumnElement[bool]:
    return sa.or_(_jobs.c.lease.is_(None), _jobs.c.lease.not_in(leases))


def _first(due: sa.ColumnElement[bool]) -> sa.ScalarSelect[str]:
    """The id of the oldest job that is due; jobs that another transaction changes are passed over.
    SQLite has no such locks: there the statement is the only one that writes."""
    query = sa.select(_jobs.c.id).where(due).order_by(_jobs.c.created_at, _jobs.c.id).limit(1)
    return query.with_for_update(skip_locked=True).scalar_subquery()


def _end(
    status: str, now: float, ttl_s: float, error: str | None = None, result: bytes | None = None
) -> dict[sa.Column[object], object]:
    """The values of a job that has ended. Its request, with the prompt, is not kept."""
    columns = _jobs.c
    webhook_at = sa.case((columns.webhook.is_not(None), sa.literal(now)), else_=sa.null())
    return {
        columns.status: status,
        columns.lease: None,
        columns.due_at: None,
        columns.finished_at: now,
        columns.expires_at: now + ttl_s,
        columns.size_bytes: len(result or b"") + len(error or ""),
        columns.error: error,
        columns.request: None,
        columns.result: result,
        columns.webhook_at: webhook_at,
    }


def _sync_fully(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
    """What was accepted must outlast a power cut; the catalogue's own data need not."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
