"""Plain data and errors for all other parts, without torch."""
