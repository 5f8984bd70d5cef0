"""The history of the database's tables, for Alembic: one file of `versions` a change.

`open_database` applies what a database lacks. A new change is a new file, whose `down_revision` is
`HEAD` as it was and whose `revision` becomes `HEAD`; files of released versions never change.
"""

HEAD = "0004"
