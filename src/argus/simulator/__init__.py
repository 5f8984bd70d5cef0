"""A virtual cluster driven by the policies that serve, and the traces that load it."""
