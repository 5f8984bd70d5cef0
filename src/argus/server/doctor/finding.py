"""What a check found."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    """`PROBLEM`: a server does not start, or makes no pictures. `WARNING`: it does, and something
    is not as it should be."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """`says` is what was found about the subject of a `check`, `advice` what to do about it."""

    check: str
    level: Level
    says: str
    advice: str = ""


def ok(check: str, says: str) -> Finding:
    return Finding(check, Level.OK, says)


def warning(check: str, says: str, advice: str) -> Finding:
    return Finding(check, Level.WARNING, says, advice)


def problem(check: str, says: str, advice: str = "") -> Finding:
    return Finding(check, Level.PROBLEM, says, advice)


def sized(size_bytes: float) -> str:
    """A number of bytes for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes / 1e3:.3g} kB"
