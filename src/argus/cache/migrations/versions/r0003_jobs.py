"""Background jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "jobs",
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
