"""The tables before there were revisions. Those that a database has already are left as they are.

Samples of the first versions, which have no namespace, are removed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    known = sa.inspect(op.get_bind())
    if not known.has_table("entries"):
        op.create_table(
            "entries",
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
    if not known.has_table("latents"):
        op.create_table(
            "latents",
            sa.Column("entry", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("k", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("sha256", sa.String(64), nullable=False),
            sa.Column("size_bytes", sa.Integer, nullable=False),
            sa.Column("uses", sa.Integer, nullable=False),
            sa.Column("used_at", sa.Float, nullable=False),
        )
    if not known.has_table("identity"):
        op.create_table("identity", sa.Column("id", sa.String(8), primary_key=True))
    if known.has_table("samples"):
        columns = {column["name"] for column in known.get_columns("samples")}
        if "namespace" not in columns:
            op.drop_table("samples")
            known.clear_cache()
    if not known.has_table("samples"):
        op.create_table(
            "samples",
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
            sa.Column("namespace", sa.Text, nullable=False, index=True),
            sa.Column("prompt", sa.Text, nullable=False),
            sa.Column("variant", sa.Text, nullable=False),
            sa.Column("seed", sa.BigInteger, nullable=False),
            sa.Column("similarity", sa.Float),
            sa.Column("score", sa.Float, nullable=False),
            sa.Column("s_exact", sa.Float, nullable=False),
            sa.Column("quality", sa.Float, nullable=False),
            sa.Column("predicted", sa.Float),
            sa.Column("low", sa.Float),
            sa.Column("made_for", sa.String(32), nullable=False),
            sa.Column("at", sa.Float, nullable=False, index=True),
            sqlite_autoincrement=True,
        )
    if not known.has_table("usage"):
        op.create_table(
            "usage",
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
