"""Errors for users. Every message says what was wrong and what would be right."""


class ArgusError(Exception):
    """An error that is reported as a sentence rather than a traceback."""


class BadRequest(ArgusError, ValueError):
    """A request that is invalid or cannot be served as it is."""


class ModelError(ArgusError):
    """A model cannot be used: it is missing, unsupported or out of reach."""


class NotEnoughMemory(ArgusError):
    """The device cannot hold the model or the job."""


class Expired(ArgusError):
    """The deadline of a job passed before it began."""
