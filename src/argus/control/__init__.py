"""Plans and decisions: numbers in, decisions out. No clock, no torch, no network."""
