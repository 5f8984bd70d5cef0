"""The HTTP API, and a request's way through the parts below it."""
