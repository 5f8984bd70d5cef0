"""The interface of scorers, and quality from scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from argus.core.errors import ModelError

Scores = NDArray[np.float32]


class Scorer(Protocol):
    """Judges pictures. Higher is better; each scorer has its own scale."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
        """The score (n,) of each picture for the prompt at the same place."""


@runtime_checkable
class ManyScorer(Protocol):
    """A scorer that values pictures in several ways; `score` is the first of them."""

    def scores(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Scores]:
        """Scores (n,) by name, as `Scorer.score`."""


def all_scores(
    scorer: Scorer, prompts: Sequence[str], images: Sequence[Image.Image]
) -> dict[str, Scores]:
    """Every score (n,) of each picture by name; of a scorer with one only, `score`."""
    if isinstance(scorer, ManyScorer):
        return scorer.scores(prompts, images)
    return {"score": scorer.score(prompts, images)}


@dataclass(frozen=True)
class ChosenScore:
    """A scorer whose score is one of its several, by name."""

    scorer: ManyScorer
    name: str

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Scores:
        return self.scores(prompts, images)[self.name]

    def scores(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Scores]:
        """The chosen one first. Raises ModelError if there is no such score."""
        found = self.scorer.scores(prompts, images)
        if self.name not in found:
            raise ModelError(f"The scorer has no score {self.name!r}, but {', '.join(found)}.")
        return {self.name: found[self.name], **found}


def unrelated_score(
    scorer: Scorer, prompts: Sequence[str], images: Sequence[Image.Image], shift: int | None = None
) -> float:
    """s₀: the mean score of pictures of unrelated prompts, by giving every picture another prompt.

    `shift` is how far along the list that prompt is, by default half the list.
    Raises ValueError with fewer than two pictures.
    """
    if len(images) < 2:
        raise ValueError("Unrelated pictures need at least two prompts.")
    by = len(images) // 2 if shift is None else shift
    return float(np.mean(scorer.score([*prompts[by:], *prompts[:by]], images)))


def quality(score: Scores, exact: Scores, unrelated: float) -> Scores:
    """q = (s − s₀) / (s_exact − s₀), as DESIGN.md defines it, never clipped.

    `exact` are the exact variant's scores for the same prompts, `unrelated` is s₀. q is NaN where
    the exact picture scores no more than s₀.
    """
    gained = exact - unrelated
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(gained > 0, (score - unrelated) / gained, np.nan)
    return q.astype(np.float32)


def raw_ratio(score: Scores, exact: Scores) -> Scores:
    """s / s_exact, which the published figures use. NaN where s_exact is not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(exact > 0, score / exact, np.nan).astype(np.float32)
