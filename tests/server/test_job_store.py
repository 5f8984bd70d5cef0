"""Jobs in a database that several servers share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from argus.cache.database import new_engine
from argus.server import job_store
from argus.server.job_store import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    MOST_TRIES,
    QUEUED,
    JobsFull,
    JobStore,
    KeyReused,
    NewJob,
    TooManyJobs,
)

TTL_S, LEASE_S = 100.0, 10.0
SERVERS = 4


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('jobs') / 'catalogue.db'}"
    else:
        yield request.getfixturevalue("postgres").new_database()


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    """An empty store."""
    store = JobStore(database)
    in_sql(database, "DELETE FROM jobs")
    yield store
    store.close()


def in_sql(database: str, query: str) -> list[Any]:
    engine = new_engine(database)
    with engine.begin() as connection:
        result = connection.execute(sa.text(query))
        rows = list(result.scalars()) if result.returns_rows else []
    engine.dispose()
    return rows


def new(name: str = "a", at: float = 1.0, **fields: object) -> NewJob:
    values = {
        "id": f"job_{name}", "key": "ann", "idempotency_key": None, "fingerprint": "f",
        "as_url": False, "created_at": at, "size_bytes": 100, "webhook": None, "request": b"{}",
    }  # fmt: skip
    return NewJob(**(values | fields))  # type: ignore[arg-type]


def add(store: JobStore, *jobs: NewJob) -> None:
    for job in jobs:
        store.add(job, 1000, 10**9)


def test_the_oldest_job_that_is_due_is_taken_first(store: JobStore) -> None:
    add(store, new("b", at=2.0), new("a", at=1.0), new("later", at=50.0))
    taken = [store.take(now=10.0, lease_s=LEASE_S) for _ in range(3)]
    assert [job and job.id for job in taken] == ["job_a", "job_b", None]
    assert store.due(10.0) == (False, False)
    assert store.due(50.0) == (True, False)
    assert store.counts() == {QUEUED: 1, IN_PROGRESS: 2}


def test_no_two_servers_take_the_same_job_and_none_is_left(store: JobStore, database: str) -> None:
    add(store, *(new(str(n)) for n in range(60)))
    stores = [JobStore(database) for _ in range(SERVERS)]

    def work(of: JobStore) -> list[str]:
        ids = []
        while (taken := of.take(2.0, LEASE_S)) is not None:
            ids.append(taken.id)
            assert of.finish(taken, 3.0, TTL_S, result=b"{}")
        return ids

    with ThreadPoolExecutor(SERVERS) as pool:
        lists = list(pool.map(work, stores))
    ids = [job for ids in lists for job in ids]
    assert sorted(ids) == sorted(f"job_{n}" for n in range(60))
    for one in stores:
        one.close()


def test_a_lease_that_ran_out_is_taken_again_and_one_result_is_recorded(store: JobStore) -> None:
    add(store, new())
    lost = store.take(1.0, LEASE_S)
    assert lost is not None
    assert store.take(1.0 + LEASE_S - 0.1, LEASE_S) is None
    again = store.take(1.0 + LEASE_S, LEASE_S)
    assert again is not None
    assert (again.id, again.tries) == (lost.id, 2)
    assert store.held([lost.lease, again.lease]) == {again.lease}
    assert not store.finish(lost, 12.0, TTL_S, result=b"lost")
    assert store.finish(again, 12.0, TTL_S, result=b"again")
    assert not store.finish(again, 13.0, TTL_S, result=b"twice")
    found = store.read("job_a", "ann", 20.0)
    assert found is not None
    assert (found[0].status, found[1]) == (COMPLETED, b"again")


def test_a_server_whose_clock_stepped_does_not_take_its_own_job(store: JobStore) -> None:
    add(store, new("running"), new("other", at=2.0))
    for _ in range(MOST_TRIES - 1):
        failed = store.take(1.0, LEASE_S)
        assert failed is not None
        store.give_back(failed, 1.0, counts=True)
    running = store.take(1.0, LEASE_S)
    assert running is not None
    assert store.fail_exhausted(1000.0, TTL_S, "{}", [running.lease]) == 0
    other = store.take(1000.0, LEASE_S, [running.lease])
    assert other is not None
    assert other.id == "job_other"
    assert store.take(1000.0, LEASE_S, [running.lease, other.lease]) is None
    assert store.held([running.lease]) == {running.lease}


def test_a_renewed_lease_holds(store: JobStore) -> None:
    add(store, new())
    taken = store.take(1.0, LEASE_S)
    assert taken is not None
    assert store.renew([taken.lease, "unknown"], until=100.0) == {taken.lease}
    assert store.take(99.0, LEASE_S) is None
    assert store.take(100.0, LEASE_S) is not None


def test_a_job_given_back_is_due_again_and_its_try_counts_or_not(store: JobStore) -> None:
    add(store, new())
    tries = []
    for counts in (False, True, False):
        taken = store.take(5.0, LEASE_S)
        assert taken is not None
        tries.append(taken.tries)
        assert store.give_back(taken, due_at=5.0, counts=counts, yielded=not counts)
        assert not store.give_back(taken, due_at=5.0, counts=counts)
    assert tries == [1, 1, 2]
    taken = store.take(5.0, LEASE_S)
    assert taken is not None
    assert taken.yields == 2


def test_a_job_that_no_server_ends_fails_at_last(store: JobStore) -> None:
    add(store, new())
    now = 1.0
    for _ in range(MOST_TRIES):
        assert store.fail_exhausted(now, TTL_S, '{"code": "lost"}') == 0
        assert store.take(now, LEASE_S) is not None
        now += LEASE_S
    assert store.fail_exhausted(now, TTL_S, '{"code": "lost"}') == 1
    assert store.take(now, LEASE_S) is None
    found = store.read("job_a", "ann", now)
    assert found is not None
    assert (found[0].status, found[0].error) == (FAILED, '{"code": "lost"}')


def test_a_cancelled_job_is_not_taken_and_its_result_is_not_recorded(store: JobStore) -> None:
    add(store, new("queued"), new("running", at=0.0))
    taken = store.take(1.0, LEASE_S)
    assert taken is not None
    for job in ("job_queued", "job_running"):
        assert not store.cancel(job, "bo", 2.0, TTL_S)
        assert store.cancel(job, "ann", 2.0, TTL_S)
        assert not store.cancel(job, "ann", 2.0, TTL_S)
    assert store.held([taken.lease]) == set()
    assert not store.finish(taken, 3.0, TTL_S, result=b"late")
    assert not store.give_back(taken, 3.0, counts=True)
    assert store.take(10.0, LEASE_S) is None
    found = store.read("job_running", "ann", 3.0)
    assert found is not None
    assert (found[0].status, found[1]) == (CANCELLED, None)


def test_equal_idempotency_keys_are_one_job_of_a_key_even_at_the_same_time(
    store: JobStore, database: str
) -> None:
    stores = [JobStore(database) for _ in range(SERVERS)]

    def added(n: int) -> str:
        job = new(str(n), idempotency_key="once")
        return stores[n % SERVERS].add(job, 1000, 10**9).id

    with ThreadPoolExecutor(SERVERS) as pool:
        ids = set(pool.map(added, range(24)))
    assert len(ids) == 1
    other = store.add(new("bo", key="bo", idempotency_key="once"), 1000, 10**9)
    assert other.id == "job_bo"
    with pytest.raises(KeyReused):
        add(store, new("other", idempotency_key="once", fingerprint="g"))
    for one in stores:
        one.close()


def test_an_idempotency_key_is_free_again_once_its_job_expired(store: JobStore) -> None:
    add(store, new(idempotency_key="once"))
    taken = store.take(1.0, LEASE_S)
    assert taken is not None
    store.finish(taken, 2.0, TTL_S, result=b"{}")
    later = new("later", at=2.0 + TTL_S, idempotency_key="once", fingerprint="g")
    assert store.add(later, 1000, 10**9).id == "job_later"


def test_jobs_are_limited_by_number_and_bytes(store: JobStore) -> None:
    store.add(new("a", idempotency_key="once"), 1, 200)
    with pytest.raises(TooManyJobs):
        store.add(new("b"), 1, 1000)
    with pytest.raises(JobsFull):
        store.add(new("b", key="bo", size_bytes=101), 2, 200)
    assert store.add(new("c", idempotency_key="once"), 1, 200).id == "job_a"  # known
    taken = store.take(1.0, LEASE_S)
    assert taken is not None
    store.finish(taken, 2.0, TTL_S, result=b"x" * 50)  # less than the most that it could take
    store.add(new("b", key="bo", size_bytes=150), 1, 300)


def test_one_key_s_jobs_leave_room_for_those_of_others(store: JobStore) -> None:
    store.add(new("a"), 10, 300)
    with pytest.raises(JobsFull):
        store.add(new("b"), 10, 300)
    store.add(new("c", key="bo"), 10, 300)


def test_expired_jobs_are_gone_and_unfinished_ones_are_not(store: JobStore) -> None:
    add(store, new("old"), new("waiting", at=2.0))
    taken = store.take(1.0, LEASE_S)
    assert taken is not None
    store.finish(taken, 2.0, TTL_S, result=b"{}")
    assert store.read("job_old", "ann", 2.0 + TTL_S) is None  # swept or not
    assert store.sweep(2.0 + TTL_S) == 1
    assert store.sweep(1e12) == 0
    assert store.read("job_waiting", "ann", 1e12) is not None


def test_expired_jobs_are_removed_a_part_at_a_time(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "MOST_SWEPT", 2)
    add(store, *(new(str(n)) for n in range(5)))
    for n in range(5):
        store.cancel(f"job_{n}", "ann", 2.0, TTL_S)
    assert [store.sweep(2.0 + TTL_S) for _ in range(4)] == [2, 2, 1, 0]


def test_jobs_are_listed_newest_first_a_page_at_a_time(store: JobStore) -> None:
    add(store, *(new(name, at=at) for at, name in enumerate("abcd")))
    add(store, new("e", at=3.0), new("bo", key="bo"))

    def ids(limit: int, after: str | None = None) -> list[str]:
        found = store.newest("ann", limit, after, 5.0)
        assert found is not None
        return [job.id.removeprefix("job_") for job in found]

    assert ids(10) == ["e", "d", "c", "b", "a"]
    assert ids(2) == ["e", "d"]
    assert ids(2, after="job_d") == ["c", "b"]
    assert ids(2, after="job_a") == []
    assert store.newest("ann", 2, "job_bo", 5.0) is None


def test_a_webhook_is_due_when_its_job_has_ended_and_until_it_is_delivered(
    store: JobStore,
) -> None:
    add(store, new("a", webhook="https://example.com"), new("silent"))
    assert store.next_delivery(1e9, 2e9) is None
    for _ in range(2):
        taken = store.take(1.0, LEASE_S)
        assert taken is not None
        store.finish(taken, 2.0, TTL_S, result=b"{}")
    assert store.due(2.0) == (False, True)
    first = store.next_delivery(2.0, again_at=50.0)
    assert first is not None
    assert (first.id, first.status, first.tries) == ("job_a", COMPLETED, 1)
    assert store.next_delivery(49.0, 100.0) is None  # the caller may have died: then again
    second = store.next_delivery(50.0, again_at=100.0)
    assert second is not None
    store.delivered(first, "given_up", None)  # the first caller was late
    assert store.due(100.0) == (False, True)
    store.delivered(second, None, 60.0, called=False)  # no thread was free: no try
    second = store.next_delivery(60.0, again_at=100.0)
    assert second is not None
    assert second.tries == 2
    store.delivered(second, "delivered", None)
    assert store.due(1e9) == (False, False)
    found = store.read("job_a", "ann", 3.0)
    assert found is not None
    assert (found[0].webhook_outcome, found[0].webhook_tries) == ("delivered", 2)


def test_a_prompt_is_not_kept_longer_than_it_is_needed(store: JobStore, database: str) -> None:
    add(store, new(request=b'{"prompt": "a fish"}'))
    taken = store.take(time.time(), LEASE_S)
    assert taken is not None
    assert taken.request == b'{"prompt": "a fish"}'
    store.cancel("job_a", "ann", time.time(), TTL_S)
    assert in_sql(database, "SELECT request FROM jobs") == [None]
