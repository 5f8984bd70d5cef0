"""For several servers: totals, changes that others follow, and integers of 64 bits.

The index of prompts is a hash on PostgreSQL, whose B-trees take no text of more than 2.7 kB.
"""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")
COLUMNS = {
    "entries": ("id",),
    "latents": ("entry", "size_bytes", "uses"),
    "samples": ("id",),
}


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":  # SQLite's have 64 bits anyway
        for table, columns in COLUMNS.items():
            for column in columns:
                op.alter_column(table, column, type_=sa.BigInteger)
                if column == "id":
                    sequence = sa.func.pg_get_serial_sequence(table, column)
                    name = connection.execute(sa.select(sequence)).scalar_one()
                    op.execute(f"ALTER SEQUENCE {name} AS bigint")
    op.create_index("entries_by_prompt", "entries", ["prompt"], postgresql_using="hash")
    op.create_table(
        "changes",
        sa.Column("version", BIG, primary_key=True, autoincrement=False),
        sa.Column("entry", BIG, primary_key=True, autoincrement=False),
        sa.Column("scope", sa.String(32), nullable=False),
    )
    totals = op.create_table(
        "totals",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("entries", BIG, nullable=False),
        sa.Column("size_bytes", BIG, nullable=False),
        sa.Column("version", BIG, nullable=False),
        sa.Column("forgotten", BIG, nullable=False),
        sa.Column("swept_at", sa.Float, nullable=False),
    )
    entries = sa.select(sa.func.count()).select_from(sa.table("entries"))
    latents = sa.table("latents", sa.column("size_bytes", sa.BigInteger))
    size = sa.select(sa.func.coalesce(sa.func.sum(latents.c.size_bytes), 0))
    op.execute(
        totals.insert().values(
            id=1,
            entries=connection.execute(entries).scalar_one(),
            size_bytes=int(connection.execute(size).scalar_one()),
            version=0,
            forgotten=0,
            swept_at=0.0,
        )
    )
    identity = sa.table("identity", sa.column("id", sa.String))
    known = connection.execute(sa.select(sa.func.min(identity.c.id))).scalar()
    if known is None:
        op.execute(identity.insert().values(id=uuid.uuid4().hex[:8]))
    else:  # servers that first started at the same time gave it two
        op.execute(identity.delete().where(identity.c.id != known))
