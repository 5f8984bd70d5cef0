"""Run by Alembic: applies migrations on the connection that `open_database` gives."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():  # the caller's, which the caller commits
    context.run_migrations()
