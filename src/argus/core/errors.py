"""What can go wrong for a user. Every message says what was wrong and what would be right."""


class ArgusError(Exception):
    """Anything Argus reports as a sentence rather than a traceback."""


class BadRequest(ArgusError, ValueError):
    """A job that asks for something that cannot be: mend the request."""


class ModelError(ArgusError):
    """A model cannot be used: it is missing, of the wrong kind, or out of reach."""


class NotEnoughMemory(ArgusError):
    """The device cannot hold the model or the job."""


class InUse(ArgusError):
    """Another process has what this one needs for itself."""


class Expired(ArgusError):
    """A job whose deadline passed before it began."""
