"""The front door: the HTTP API, and the way of a request behind it."""
