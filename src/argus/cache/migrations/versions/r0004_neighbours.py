"""Samples say what their neighbour was."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("samples", sa.Column("near", sa.LargeBinary))
