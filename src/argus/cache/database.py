"""Opens the catalogue's database, SQLite or PostgreSQL, and brings its tables up to date."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from argus.cache.migrations import HEAD
from argus.core.errors import BadRequest

log = logging.getLogger(__name__)

BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite's integers have 64 bits
VERSION_TABLE = "alembic_version"
MIGRATING = 7_246_551_104  # key of PostgreSQL's advisory lock that is held while tables are changed
WAIT_S = 60  # for another process that changes the tables
WAL_TRIES, WAL_PAUSE_S = 200, 0.05
CONNECT_S = 5
POOL_WAIT_S = 5.0  # for a free connection
STATEMENT_S = 30
IDLE_S = 30  # in which a transaction may do nothing: a process that hangs must not keep its locks
# libpq's: connections to a machine that is gone end after about this long
LIBPQ = {
    "application_name": "argus",
    "connect_timeout": CONNECT_S,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}


def open_database(url: str) -> sa.Engine:
    """The database at `url` with tables as this version of Argus needs them.

    `url` is SQLAlchemy's: `sqlite:///FILE`, or `postgresql://USER:PASSWORD@HOST/NAME`. An empty
    database gets its tables, one of an earlier version keeps its rows. Several processes may open
    the same database at once. Raises BadRequest for a database of a newer version, another kind of
    database and a missing driver, and SQLAlchemyError if the database cannot be reached.
    """
    engine = new_engine(url)
    try:
        with engine.connect() as connection:
            current = _revision(connection) == HEAD
        if not current:
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def new_engine(url: str) -> sa.Engine:
    """A database engine for several threads and processes. Raises BadRequest for a kind of database
    that cannot be used and for a missing driver, ArgumentError for what is no URL."""
    parsed = sa.make_url(url)
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql", "postgres"):
        raise BadRequest(
            f"The catalogue cannot be in a {kind} database: give sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/NAME."
        )
    if kind == "sqlite":
        engine = sa.create_engine(parsed, hide_parameters=True)  # errors would quote prompts
        sa.event.listen(engine, "connect", _set_up_sqlite)
        return engine
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    try:
        engine = sa.create_engine(
            parsed,
            hide_parameters=True,
            pool_pre_ping=True,  # a database that was restarted costs no failed call
            pool_timeout=POOL_WAIT_S,
            connect_args={name: value for name, value in LIBPQ.items() if name not in parsed.query},
        )
    except ImportError as error:
        raise BadRequest(
            f"PostgreSQL needs a driver, which cannot be imported ({error}): "
            "pip install 'argus-t2i[postgres]'."
        ) from error
    sa.event.listen(engine, "connect", _set_up_postgresql)
    return engine


def revision_of(url: str) -> str | None:
    """The version of a database's tables, which stay as they are; None if it has none. Raises as
    `open_database`."""
    engine = new_engine(url)
    try:
        with engine.connect() as connection:
            return _revision(connection)
    finally:
        engine.dispose()


def _revision(connection: sa.Connection) -> str | None:
    """The revision of a database's tables; None if it has none, or those of a version of Argus
    without revisions."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    table = sa.table(VERSION_TABLE, sa.column("version_num", sa.String))
    return connection.execute(sa.select(table.c.version_num)).scalar()


def _migrate(engine: sa.Engine) -> None:
    """Bring the tables up to date, in one transaction, while no other process does."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from alembic import command  # here, because it takes a second to import
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(sa.text(f"SET LOCAL lock_timeout = '{WAIT_S}s'"))
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))  # indices take long
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATING)))
        before = _revision(connection)
        if before == HEAD:
            return  # another process was faster
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if before is not None and before not in known:
            raise BadRequest(
                f"The catalogue's database has tables of a newer version of Argus (revision "
                f"{before}, this version knows {HEAD}): upgrade Argus, or name another database."
            )
        adopted = before or sa.inspect(connection).has_table("entries")
        config.attributes["connection"] = connection
        command.upgrade(config, HEAD)
        connection.commit()
    if adopted:
        log.info("The catalogue's tables were brought up to date (revision %s)", HEAD)


def _switch_to_wal(cursor: Any) -> None:
    """Turn the write-ahead log on; once it is, this changes nothing. Of several processes that do
    it at the same moment SQLite refuses all but one at once, whatever `busy_timeout` says."""
    for left in reversed(range(WAL_TRIES)):
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if not left:
                raise
            time.sleep(WAL_PAUSE_S)
        else:
            return


def _set_up_sqlite(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=10000")
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _set_up_postgresql(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET statement_timeout = '{STATEMENT_S}s'")
    cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_S}s'")
    cursor.close()
    connection.commit()
