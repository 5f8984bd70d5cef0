"""Trains a new predictor with a server's samples, and compares it with the old one."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from argus.core.errors import BadRequest
from argus.core.family import EXACT, Family
from argus.lab.training import EPOCHS, Examples, Numbers, OnEpoch, Single, train
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor
from argus.quality.sentences import embed_all

SOURCE = "ARGUS_FROM_CATALOGUE"  # the variable that may say where samples are
NO_BETTER = 6  # exit status of a training whose predictor is not better
FEWEST_SAMPLES = 40
SEEN_SHARE = 0.5  # of all weight, for the server's samples; the rest is for the table
HELD_OUT = 3  # a prompt in so many is held out, by its hash


@dataclass(frozen=True)
class Retrained:
    """A new predictor, and the mean absolute errors of the old and the new one on `judged_on`
    samples that neither was trained on."""

    predictor: Predictor
    old_error: float
    new_error: float
    judged_on: int

    @property
    def better(self) -> bool:
        return self.new_error < self.old_error


def retrain(
    samples: pd.DataFrame,
    family: Family,
    encoder: PromptEncoder,
    old: Predictor,
    table: Examples | None,
    seed: int = 0,
    epochs: int = EPOCHS,
    on_epoch: OnEpoch = lambda done, of: None,
) -> Retrained:
    """Train on `samples` (columns of the server's `Sample`) and the examples of the family's
    `table`, if there is one. The samples of every third prompt are held out to judge both
    predictors: always the same prompts, so that the old one was not trained on them either.

    Raises BadRequest for too few samples.
    """
    samples = samples[samples["variant"].isin(list(family.variants))]
    resumed = samples["variant"].map(lambda name: family.variants[name].skip > 0)
    samples = samples[~resumed | samples["near"].notna()]  # else they say nothing of resuming
    if len(samples) < FEWEST_SAMPLES:
        raise BadRequest(
            f"There are {len(samples)} samples; training needs {FEWEST_SAMPLES}. A server takes "
            "them while its workers idle (`truth_share`)."
        )
    judging = np.array([is_held_out(prompt) for prompt in samples["prompt"]])
    if min(judging.sum(), (~judging).sum()) < FEWEST_SAMPLES // (2 * HELD_OUT):
        raise BadRequest(
            f"Of {len(samples)} samples {judging.sum()} are of prompts that judge a training, and "
            f"{(~judging).sum()} of others: samples of more prompts are needed."
        )
    vectors = embed_all(encoder, list(samples["prompt"]))
    near = np.full_like(vectors, np.nan)
    for i, one in enumerate(samples["near"]):
        if one is not None:
            near[i] = np.frombuffer(one, np.float16)
    scores = old.weights.get("scores")
    seen = _examples(samples[~judging], vectors[~judging], near[~judging], family, scores)
    data = seen if table is None else _joined(table, seen)
    new = train(data, old.made_for, seed, epochs, on_epoch).predictor
    if "scores" in old.weights:  # what scores mean does not change by training
        new.weights["scores"] = old.weights["scores"]
    held = samples[judging], vectors[judging], near[judging]
    return Retrained(new, _error(old, *held), _error(new, *held), int(judging.sum()))


def is_held_out(prompt: str) -> bool:
    """Whether a prompt's samples judge predictors, whatever other samples there are."""
    return zlib.crc32(prompt.encode()) % HELD_OUT == 0


def _examples(
    samples: pd.DataFrame, vectors: Single, near: Single, family: Family, scores: Single | None
) -> Examples:
    """One example for each sample: quality 1 of the exact variant, the measured one, else NaN.
    `scores` (2,) are s₀ and the mean gain, if they are known."""
    variants = tuple(family.variants)

    def spread(exact: pd.Series[float] | float, measured: pd.Series[float]) -> Numbers:
        found = np.full((len(samples), len(variants), 1), np.nan)
        found[:, variants.index(EXACT), 0] = exact
        column = [variants.index(name) for name in samples["variant"]]
        found[np.arange(len(samples)), column, 0] = measured
        return found

    quality = spread(1.0, samples["quality"])
    counted = scores is not None and samples[["score", "s_exact"]].isin((0, 1)).all(axis=None)
    return Examples(
        tuple(samples["prompt"]),
        variants,
        tuple(bool(one.skip) for one in family.variants.values()),
        vectors,
        near,
        quality,
        right=spread(samples["s_exact"], samples["score"]) if counted else None,
        gain=1.0 if scores is None else float(scores[1]),
    )


def _joined(table: Examples, seen: Examples) -> Examples:
    """Both, the seen ones with `SEEN_SHARE` of the weight of all that was measured."""
    seeds = table.quality.shape[2]
    padding = np.full((*seen.quality.shape[:2], seeds - 1), np.nan)
    right = None
    if table.right is not None and seen.right is not None:
        right = np.concatenate([table.right, np.concatenate([seen.right, padding], axis=2)])
    known, others = (int((~np.isnan(one.quality[:, 1:])).sum()) for one in (seen, table))
    weight = SEEN_SHARE / (1 - SEEN_SHARE) * others / max(1, known)
    return replace(
        table,
        prompts=table.prompts + seen.prompts,
        vectors=np.concatenate([table.vectors, seen.vectors]),
        near=np.concatenate([table.near, seen.near]),
        quality=np.concatenate([table.quality, np.concatenate([seen.quality, padding], axis=2)]),
        weight=np.concatenate([table.weights, np.full(len(seen.prompts), weight, np.float32)]),
        right=right,
        judged=np.concatenate([table.judging, seen.judging]),
    )


def _error(predictor: Predictor, samples: pd.DataFrame, vectors: Single, near: Single) -> float:
    mean, _ = predictor.predict_all(vectors, near)
    column = [predictor.variants.index(name) for name in samples["variant"]]
    predicted = mean[np.arange(len(samples)), column]
    return float(np.nanmean(np.abs(samples["quality"].to_numpy() - predicted)))
