"""Measures a family offline: the cost and the quality of its variants."""
