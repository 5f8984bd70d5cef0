"""A virtual cluster, driven by the same policies as the server, and the traces that load it."""
