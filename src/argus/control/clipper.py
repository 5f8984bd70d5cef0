"""Clipper (Crankshaw et al., NSDI 2017) as the Argus paper uses it: one variant for everyone."""

from __future__ import annotations

from argus.control.policy import Candidate, Decision
from argus.core.family import EXACT, Family


class ClipperHA:
    """Highest accuracy: every prompt gets the exact variant."""

    def __init__(self, family: Family) -> None:
        del family  # its exact variant is known by name

    def route(self, candidate: Candidate) -> Decision:
        del candidate
        return Decision(EXACT, "this policy serves every prompt exactly")
