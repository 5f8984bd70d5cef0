"""Judges pictures of this world: finds the things in them and compares with the prompt."""
