"""Families of models: the bundled one, and files that name others."""
