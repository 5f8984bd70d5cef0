"""Loads the scorer that a family names."""

from __future__ import annotations

import importlib

from argus.core.errors import ModelError
from argus.core.family import ScorerSpec
from argus.quality.scorer import ChosenScore, ManyScorer, Scorer


def load_scorer(spec: ScorerSpec, device: str = "cpu") -> Scorer:
    """Load a scorer. `module:Class` is imported and loaded with `Class.load(source, device)`.

    Raises ModelError if it is missing, cannot be loaded or lacks the score that is asked for.
    """
    scorer = _imported(spec, device) if ":" in spec.kind else _of_clip(spec, device)
    if spec.score is None:
        return scorer
    if not isinstance(scorer, ManyScorer):
        raise ModelError(f"The scorer {spec.kind} has one score only: leave {spec.score!r} out.")
    return ChosenScore(scorer, spec.score)


def _of_clip(spec: ScorerSpec, device: str) -> Scorer:
    if spec.source is None:
        raise ModelError(f"The scorer {spec.kind} needs a source: a folder or a hub id.")
    from argus.quality.clip import ClipScore, PickScore  # takes seconds to import

    kind = {"clip": ClipScore, "pickscore": PickScore}[spec.kind]
    scorer: Scorer = kind.load(spec.source, device)
    return scorer


def _imported(spec: ScorerSpec, device: str) -> Scorer:
    module, name = spec.kind.split(":")
    try:
        scorer: Scorer = getattr(importlib.import_module(module), name).load(spec.source, device)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"The scorer {spec.kind} cannot be imported: {error}") from error
    return scorer
