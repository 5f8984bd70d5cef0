"""Samples: the measured quality of served pictures, stored in the catalogue's database.

The newest `KEPT`, of requests whose prompts may be stored.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pandas as pd
import sqlalchemy as sa

from argus.cache.database import BIG, open_database

KEPT = 5000  # more make training slower, and the predictor little better

_meta = sa.MetaData()
_samples = sa.Table(
    "samples",
    _meta,
    sa.Column("id", BIG, primary_key=True, autoincrement=True),
    sa.Column("namespace", sa.Text, nullable=False, index=True),
    sa.Column("prompt", sa.Text, nullable=False),
    sa.Column("variant", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("similarity", sa.Float),
    sa.Column("near", sa.LargeBinary),
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("s_exact", sa.Float, nullable=False),
    sa.Column("quality", sa.Float, nullable=False),
    sa.Column("predicted", sa.Float),
    sa.Column("low", sa.Float),
    sa.Column("made_for", sa.String(32), nullable=False),
    sa.Column("at", sa.Float, nullable=False, index=True),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True)
class Sample:
    """A served picture's quality beside the exact picture of its prompt and seed.

    `near` is the embedding (d,), float16, of the cached prompt from which it was or could have been
    resumed, at `similarity`; not its words, which may be removed from the cache. `score` and
    `s_exact` are the scorer's, `quality` is 1 + (score - s_exact) / mean gain; `predicted` and
    `low` are the prediction's mean and bound. `made_for` is the fingerprint of the family, `at`
    seconds since the epoch.
    """

    namespace: str
    prompt: str
    variant: str
    seed: int
    similarity: float | None
    near: bytes | None
    score: float
    s_exact: float
    quality: float
    predicted: float | None
    low: float | None
    made_for: str
    at: float


class Samples:
    """The samples in the database at `url`. Safe to call from any thread."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)

    def add(self, sample: Sample, kept: int = KEPT) -> None:
        """Add a sample, and remove all but the newest `kept`."""
        oldest = sa.select(_samples.c.id).order_by(_samples.c.id.desc()).offset(kept).limit(1)
        with self._engine.begin() as connection:
            connection.execute(_samples.insert().values(**asdict(sample)))
            last = connection.execute(oldest).scalar()
            if last is not None:
                connection.execute(_samples.delete().where(_samples.c.id <= last))

    def remove(self, namespace: str | None = None, prompt: str | None = None) -> int:
        """Remove the samples of a namespace, of a prompt, or of both, or all samples; returns how
        many were removed."""
        given = {"namespace": namespace, "prompt": prompt}
        those = [_samples.c[name] == value for name, value in given.items() if value is not None]
        with self._engine.begin() as connection:
            return connection.execute(_samples.delete().where(*those)).rowcount

    def read(self, made_for: str, limit: int = KEPT) -> pd.DataFrame:
        """The newest `limit` samples of a family, oldest first, as a table with `Sample`'s
        columns."""
        query = (
            sa.select(_samples)
            .where(_samples.c.made_for == made_for)
            .order_by(_samples.c.id.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            rows = pd.read_sql(query, connection)
        return rows.drop(columns="id").iloc[::-1].reset_index(drop=True)

    def count(self) -> int:
        query = sa.select(sa.func.count()).select_from(_samples)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def close(self) -> None:
        self._engine.dispose()
