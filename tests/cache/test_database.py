"""The database: made, adopted and shared, SQLite and a real PostgreSQL."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import OperationalError

from argus.cache import catalogue as catalogue_module
from argus.cache.catalogue import Catalogue, Uses
from argus.cache.database import new_engine, open_database
from argus.cache.latents import StoredLatents
from argus.cache.scope import Scope
from argus.core.errors import BadRequest
from argus.server import job_store
from argus.server import samples as samples_module
from argus.server import usage as usage_module
from argus.server.samples import Sample, Samples

if TYPE_CHECKING:
    from tests.postgres import Postgres

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
VECTOR = np.ones(4, np.float32)


def stored(k: int = 5, name: str = "a name", size_bytes: int = 100) -> StoredLatents:
    return StoredLatents(k, name, "a hash", size_bytes)


def differences(url: str) -> list[object]:
    """What the tables of a database have other than the code's."""
    modules = (catalogue_module, job_store, samples_module, usage_module)
    used = [module._meta for module in modules]
    with open_database(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, used))  # type: ignore[arg-type]


def test_the_tables_are_those_that_the_code_uses(database: str) -> None:
    assert differences(database) == []


# as Argus made them before there were revisions; a serial is PostgreSQL's autoincrement
OLD = """
CREATE TABLE entries (id {serial}, scope VARCHAR(32) NOT NULL, namespace TEXT NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, vector {bytes} NOT NULL, created_at FLOAT NOT NULL);
CREATE INDEX entries_by_scope ON entries (scope);
CREATE INDEX ix_entries_namespace ON entries (namespace);
CREATE TABLE latents (entry INTEGER NOT NULL, k INTEGER NOT NULL, name TEXT NOT NULL,
    sha256 VARCHAR(64) NOT NULL, size_bytes INTEGER NOT NULL, uses INTEGER NOT NULL,
    used_at FLOAT NOT NULL, PRIMARY KEY (entry, k));
CREATE TABLE identity (id VARCHAR(8) NOT NULL, PRIMARY KEY (id));
CREATE TABLE samples (id {serial}, prompt TEXT NOT NULL);
INSERT INTO entries (scope, namespace, model, prompt, vector, created_at)
    VALUES ('{scope}', 'alice', 'tiny', 'a red fish', {vector}, 1.5);
INSERT INTO latents VALUES (1, 5, 'one', 'its hash', 100, 7, 2.5);
INSERT INTO latents VALUES (1, 10, 'two', 'its hash', 50, 0, 2.5);
INSERT INTO identity VALUES ('0badcafe');
INSERT INTO samples (prompt) VALUES ('whose is this?')
"""


def old_database(url: str) -> None:
    engine = new_engine(url)
    data = VECTOR.astype(np.float16).tobytes().hex()
    words = {
        "sqlite": {
            "serial": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "bytes": "BLOB",
            "vector": f"x'{data}'",
        },
        "postgresql": {
            "serial": "SERIAL PRIMARY KEY", "bytes": "BYTEA", "vector": f"'\\x{data}'",
        },
    }[engine.dialect.name]  # fmt: skip
    with engine.begin() as connection:
        for statement in OLD.format(scope=SCOPE.key, **words).split(";"):
            connection.exec_driver_sql(statement)
    engine.dispose()


def test_a_database_of_an_earlier_version_keeps_what_it_has(database: str) -> None:
    old_database(database)
    catalogue = Catalogue(database)
    assert catalogue.id == "0badcafe"
    (entry,) = catalogue.entries()
    assert (entry.id, entry.prompt) == (1, "a red fish")
    assert (entry.skips, entry.size_bytes) == ((5, 10), 150)
    ((number, scope, vector),) = catalogue.vectors()
    assert (number, scope) == (1, SCOPE.key)
    assert np.array_equal(vector, VECTOR)
    assert catalogue.stats().uses == 7
    assert (catalogue.totals.entries, catalogue.totals.size_bytes) == (1, 150)
    assert catalogue.add(SCOPE, "a blue boat", VECTOR, [stored()], 3.0) == 2
    assert Catalogue(database).totals.entries == 2
    samples = Samples(database)
    assert samples.count() == 0  # samples without a namespace are nobody's
    samples.add(
        Sample("alice", "a red fish", "quick", 2**40, None, None, 0, 0, 1, None, None, "x", 0)
    )
    assert samples.count() == 1
    assert differences(database) == []


def test_a_database_of_a_newer_version_is_refused(database: str) -> None:
    engine = open_database(database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(BadRequest, match=r"newer version of Argus .*9999.*: upgrade Argus"):
        Catalogue(database)


def test_servers_that_start_at_once_on_an_empty_database_agree(database: str) -> None:
    begin = threading.Barrier(6, timeout=60)
    ids: list[str] = []

    def start() -> None:
        begin.wait()
        ids.append(Catalogue(database).id)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6
    assert len(set(ids)) == 1


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadRequest, match=r"pip install 'argus-t2i\[postgres\]'"):
        open_database("postgresql://argus@127.0.0.1/argus")


def test_other_kinds_of_database_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"a mysql database: give sqlite:///FILE or postgresql://"):
        open_database("mysql://argus@127.0.0.1/argus")


def test_the_driver_may_be_named_in_the_url(postgres: Postgres) -> None:
    url = postgres.new_database()
    first = Catalogue(url)
    for scheme in ("postgresql+psycopg", "postgres"):
        assert Catalogue(url.replace("postgresql", scheme, 1)).id == first.id


def test_a_database_that_does_not_answer_is_no_hang(tmp_path: Path) -> None:
    with pytest.raises(OperationalError):
        open_database("postgresql://argus@127.0.0.1:1/argus")


def test_what_a_restart_of_postgresql_breaks_off_works_again(postgres: Postgres) -> None:
    catalogue = Catalogue(postgres.new_database())
    catalogue.add(SCOPE, "a red fish", VECTOR, [stored()], 0.0)
    postgres.stop()
    with pytest.raises(OperationalError):
        catalogue.entries()
    postgres.start()
    assert [one.prompt for one in catalogue.entries()] == ["a red fish"]
    assert catalogue.add(SCOPE, "a blue boat", VECTOR, [stored()], 0.0) is not None


def test_prompts_of_any_length_and_large_counts_fit(database: str) -> None:
    catalogue = Catalogue(database)
    prompt = " ".join(str(n) for n in range(20_000))
    entry = catalogue.add(SCOPE, prompt, VECTOR, [stored(5, size_bytes=2**40), stored(10)], 0.0)
    assert entry is not None
    found = catalogue.stored(SCOPE, prompt)
    assert found is not None and found.id == entry
    catalogue.used({(entry, 5): Uses(2**31, 1.0), (entry, 10): Uses(2**31 - 1, 1.0)})
    assert catalogue.stats().uses == 2**32 - 1
    assert [k for _, k, _ in catalogue.least_worth()] == [5, 10]
    assert catalogue.totals.size_bytes == 2**40 + 100


def test_a_scope_has_a_prompt_once_even_if_two_servers_store_it(database: str) -> None:
    one, other = Catalogue(database), Catalogue(database)
    entry = one.add(SCOPE, "a red fish", VECTOR, [stored(name="one")], 0.0)
    assert other.add(SCOPE, "a red fish", VECTOR, [stored(name="other")], 0.0) is None
    assert [found.id for found in one.entries()] == [entry]
    assert other.refresh().entries == 1
    assert one.names() == {"one"}


def test_long_tables_are_read_page_by_page(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(database)
    ids = [
        catalogue.add(SCOPE, f"{n} fish", VECTOR, [stored(5, f"{n}-5"), stored(10, f"{n}-10")], 0.0)
        for n in range(7)
    ]
    for page in (1, 2, 7, 100):
        monkeypatch.setattr(catalogue_module, "PAGE", page)
        assert [number for number, _, _ in catalogue.vectors()] == ids
        assert catalogue.names() == {f"{n}-{k}" for n in range(7) for k in (5, 10)}
