"""What a routing policy is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Candidate:
    """A prompt to be routed.

    `similarity` is the cosine of its embedding and its neighbour's, None without a neighbour;
    `stored` are the K whose latents of that neighbour are there.
    """

    similarity: float | None = None
    stored: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """The name of the variant that serves a prompt, and why, for who reads the answer."""

    variant: str
    reason: str


class Policy(Protocol):
    def route(self, candidate: Candidate) -> Decision:
        """Choose the variant for a prompt."""
