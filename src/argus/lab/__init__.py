"""Measures a family offline: what its variants cost, and what their pictures are worth."""
