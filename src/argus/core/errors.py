"""Errors for users. Every message says what was wrong and what would be right.

Messages may quote prompts, which belong to their tenant alone: a log gets `traced` or `named`
errors.
"""

from __future__ import annotations

import traceback


class ArgusError(Exception):
    """An error that is reported as a sentence rather than a traceback."""


class BadRequest(ArgusError, ValueError):
    """A request that is invalid or cannot be served as it is."""


class ModelError(ArgusError):
    """A model cannot be used: it is missing, unsupported or out of reach."""


class NotEnoughMemory(ArgusError):
    """The device cannot hold the model or the job."""


class InUse(ArgusError):
    """Another process has what this one needs for itself."""


class Expired(ArgusError):
    """The deadline of a job passed before it began."""


def traced(error: BaseException) -> str:
    """The traceback of an error and of what caused it, without their messages."""
    parts: list[str] = []
    one: BaseException | None = error
    while one is not None and len(parts) < 10:
        frames = "".join(traceback.format_tb(one.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_name(one)}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\n\nwhich led to\n\n".join(reversed(parts))


def named(error: BaseException) -> str:
    """An error's name and, where that is the system's or the database's and quotes nothing, the
    first line of its message; else where it was raised."""
    cause = getattr(error, "orig", None) or error  # SQLAlchemy's own message quotes the row
    if isinstance(error, OSError) or cause is not error:
        return f"{_name(error)}: {str(cause).partition(chr(10))[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{_name(error)} in {frames[-1].name}" if frames else _name(error)


def _name(error: BaseException) -> str:
    kind = type(error)
    place = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{place}{kind.__qualname__}"
