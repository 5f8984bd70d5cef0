"""Changes of the database's tables, oldest first."""
