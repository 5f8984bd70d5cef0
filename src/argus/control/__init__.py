"""The brain: numbers in, decisions out. No clock, no torch, no network."""
