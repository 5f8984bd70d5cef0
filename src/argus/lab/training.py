"""Trains a predictor from a quality table, with predictions for held-out prompts.

Every network of the predictor is trained without one fold of the prompts, and predicts that fold:
each prompt is held out once, and the predictor learns from all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor

from argus.core.errors import BadRequest
from argus.core.family import EXACT, Family
from argus.quality import table
from argus.quality.drift import moments
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor, features, similarities, squared_distances
from argus.quality.scores import Scores
from argus.quality.sentences import Encoder, embed_all

FOLDS = 5
KNOTS = (0.0, 0.3, 0.6, 0.85, 0.95, 0.98, 0.995)  # shares of the examples' similarities below each
HIDDEN = 64
EPOCHS = 150
RATE, DECAY, DROPOUT = 3e-3, 0.03, 0.4
REPEATED = 0.3  # weight of each prompt beside a cached run of itself
MISSES = 0.1  # of groups are worth less than their bound on average
GROUP = 40  # prompts with like expectations
OVERLAP = 4  # groups that each prompt is in where bounds are chosen
FEWEST = 50
LEAST_SPREAD = 1e-3  # of a number that the networks take: indices keep vectors in float16
# Of kernel regressions, chosen for every fold on a part of up to so many of its training prompts.
SHARPNESS, RIDGES = (0.5, 1.0, 2.0, 4.0), (0.2, 0.5, 1.0, 2.0, 5.0)
PART, MOST = 0.25, 1200

Numbers = NDArray[np.float64]
Single = NDArray[np.float32]
Flags = NDArray[np.bool_]
OnEpoch = Callable[[int, int], None]


@dataclass(frozen=True)
class Examples:
    """Measurements of p prompts: their embeddings `vectors` (p, d), those of the neighbours that
    their pictures were resumed from, `near` (p, d), NaN without one, and `quality` (p, v, s) of
    every variant and seed, NaN where there is none (`table.by_prompt`). `weight` (p,) is their
    weight; None: equal.
    Of a scorer that says right or wrong, `right` (p, v, s) is what it said, 1 or 0, and quality is
    1 + (right - right_exact) / `gain`. By the prompts of `judged` (p,) bounds are chosen and
    decisions judged, None: by all; the others were seen too little of for that.
    """

    prompts: tuple[str, ...]
    variants: tuple[str, ...]
    skips: tuple[bool, ...]
    vectors: Single
    near: Single
    quality: Numbers
    weight: Single | None = None
    right: Numbers | None = None
    gain: float = 1.0
    judged: Flags | None = None

    @property
    def judging(self) -> Flags:
        """Which of the prompts (p,) judge."""
        return np.ones(len(self.prompts), np.bool_) if self.judged is None else self.judged

    @property
    def similarity(self) -> Single:
        """The cosine (p,) of each prompt's embedding and its neighbour's, NaN without one."""
        return similarities(self.vectors, self.near)

    @property
    def weights(self) -> Single:
        """The weight (p,) of each prompt."""
        return np.ones(len(self.prompts), np.float32) if self.weight is None else self.weight


@dataclass(frozen=True)
class Trained:
    """A predictor, and the predictions `mean` (p, v) and `low` (p, v) for each of its examples by
    the network that was not trained on the prompt."""

    predictor: Predictor
    mean: Numbers
    low: Numbers


def examples(rows: pd.DataFrame, family: Family, encoder: PromptEncoder) -> Examples:
    """The examples of a table that `argus calibrate` wrote, by the score that the family names.

    Raises BadRequest if it lacks a variant of the family or holds too few prompts.
    """
    variants = tuple(family.variants)
    rows = by_own_score(rows, family)
    prompts, measured, neighbours = table.by_prompt(rows, variants)
    _enough(len(prompts))
    vectors = embed_all(encoder, prompts)
    judged: Flags = np.all(np.isfinite(measured[:, 0]), axis=1)
    return Examples(
        tuple(prompts),
        variants,
        tuple(bool(one.skip) for one in family.variants.values()),
        vectors,
        embed_some(encoder, neighbours, vectors.shape[1]),
        measured,
        right=_right(rows, variants, measured),
        gain=float(scores_of(rows)[1]),
        judged=judged,
    )


def by_own_score(rows: pd.DataFrame, family: Family) -> pd.DataFrame:
    """A table by the score that the family names, whichever it was made with. Raises BadRequest if
    it does not hold that one."""
    if family.scorer is None or family.scorer.score is None:
        return rows
    return table.scored_by(rows, family.scorer.score)


def embed_some(encoder: Encoder, prompts: Sequence[str | None], width: int) -> Single:
    """The embeddings (n, `width`) of prompts, NaN where there is None."""
    found = np.full((len(prompts), width), np.nan, np.float32)
    there = [i for i, prompt in enumerate(prompts) if prompt is not None]
    if there:
        found[there] = embed_all(encoder, [str(prompts[i]) for i in there])
    return found


def scored(scores: Scores, quality: Numbers, encoder: Encoder) -> Examples:
    """The examples of a table of scores whose `quality` (p, v, s) is given. Raises BadRequest if
    it holds too few prompts."""
    _enough(len(scores.prompts))
    vectors = embed_all(encoder, scores.prompts)
    plain = (False,) * len(scores.variants)
    near = np.full_like(vectors, np.nan)
    return Examples(scores.prompts, scores.variants, plain, vectors, near, quality)


def _enough(prompts: int) -> None:
    if prompts < FEWEST:
        raise BadRequest(f"The table holds {prompts} prompts; training needs {FEWEST} or more.")


def _right(rows: pd.DataFrame, variants: tuple[str, ...], measured: Numbers) -> Numbers | None:
    """The scores (p, v, s) if all of them are 0 or 1."""
    if not rows["score"].isin((0, 1)).all():
        return None
    scores = table.scores_by_prompt(rows, variants)
    return np.where(np.isnan(measured), np.nan, scores)


def scores_of(rows: pd.DataFrame) -> Single:
    """s₀ and the mean of s_exact - s₀ (2,) of a table, for quality from scores."""
    unrelated = float(rows["s0"].iloc[0])
    exact = rows[rows["variant"] == EXACT]["score"]
    return np.array([unrelated, float(exact.mean()) - unrelated], np.float32)


def train(
    data: Examples,
    made_for: str,
    seed: int = 0,
    epochs: int = EPOCHS,
    on_epoch: OnEpoch = lambda done, of: None,
    kernel: bool = False,
) -> Trained:
    """A predictor for the family of fingerprint `made_for`. `on_epoch` is called with the epochs
    that are done and their total.

    That a picture resumed from a run of its own prompt is worth what exact pictures are need not be
    measured: of every prompt this is learnt too.

    With `kernel` its means are by kernel regression, which is better for some thousand prompts with
    noisy scores, and needs variants without skips and pictures by all of them. The networks are
    then for the bounds alone, and without `epochs` these are the same distance below all means.
    """
    fold = folds(len(data.prompts), seed)
    knots = _knots(data.similarity)
    weights = _fit(data, fold, knots, seed, epochs, on_epoch)
    if kernel:
        weights |= _kernels(data, fold, seed)
    usual = _usual(data).astype(np.float32)
    none, full = np.zeros_like(usual), np.ones_like(usual)
    plain = {"knots": knots, "usual": usual, "trust": full, "widening": none}
    if kernel:
        plain["anchors"] = data.vectors
    if data.right is not None:
        plain["gain"] = np.array([data.gain], np.float32)

    def held_out(near: Single) -> Numbers:
        mean = np.empty((len(data.prompts), len(usual)))
        for e in range(FOLDS):
            own = {name: value[e : e + 1] for name, value in weights.items()}
            one = Predictor(data.variants, data.skips, made_for, own | plain)
            out = fold == e
            mean[out], _ = one.predict_all(data.vectors[out], near[out])
        return mean

    if not kernel:  # whose ridge is chosen for prompts that are held out
        plain["trust"] = _trust(data, held_out(data.near), held_out(data.vectors), usual)
    mean = held_out(data.near)
    plain["widening"] = _widening(data, mean, data.judging)
    low = mean.copy()
    for e in range(FOLDS):  # from the other prompts, so that bounds are held out as well
        low[fold == e] -= _widening(data, mean, data.judging & (fold != e))
    centre, spread = moments(data.vectors, data.weights)
    plain |= {"centre": centre, "spread": spread}
    return Trained(Predictor(data.variants, data.skips, made_for, weights | plain), mean, low)


def folds(count: int, seed: int) -> NDArray[np.int64]:
    """The fold (count,) of each prompt."""
    return np.random.default_rng(seed).permutation(count) % FOLDS


def _usual(data: Examples) -> Numbers:
    """The mean measured quality (v,)."""
    known = ~np.isnan(data.quality)
    weights = known * data.weights[:, None, None]
    total = (np.nan_to_num(data.quality) * weights).sum(axis=(0, 2))
    mean: Numbers = total / np.maximum(weights.sum(axis=(0, 2)), 1e-9)
    return mean


def _trust(data: Examples, mean: Numbers, repeated: Numbers, usual: Single) -> Single:
    """The slopes (v,), in [0, 1], of a regression of measured on predicted quality of held-out
    prompts, both less the usual: predictions shrink as far as they fit noise. `repeated` (p, v) is
    predicted where prompts have runs of themselves for neighbours."""
    some = (~np.isnan(data.quality)).any(axis=2)
    measured = np.nansum(data.quality, axis=2) / np.maximum((~np.isnan(data.quality)).sum(2), 1)
    both, own = np.zeros(len(usual)), np.zeros(len(usual))
    beside = some & ~np.isnan(mean), measured, mean, 1.0
    itself = np.broadcast_to(data.skips, some.shape), np.ones_like(measured), repeated, REPEATED
    for known, truth, guess, share in (beside, itself):
        weights = share * known * data.weights[:, None]
        off = np.nan_to_num(guess) - usual
        both += (off * (truth - usual) * weights).sum(0)
        own += (off * off * weights).sum(0)
    slopes = np.divide(both, own, out=np.zeros_like(both), where=own > 0)
    bounded: Single = np.clip(slopes, 0.0, 1.0).astype(np.float32)
    return bounded


def _widening(data: Examples, mean: Numbers, chosen: Flags) -> Single:
    """How much lower than the held-out `mean` (p, v) each variant's bounds must be for nine tenths
    of the groups of `chosen` prompts (p,) to be worth more on average (split conformal prediction,
    Vovk et al. 2005, of groups instead of single prompts)."""
    result = np.zeros(mean.shape[1], np.float32)
    for v in range(1, mean.shape[1]):
        groups = group_means(data, mean[:, v], v, chosen, overlap=OVERLAP)
        excess = [foretold - measured for foretold, measured in groups]
        if excess:
            count = max(1.0, len(excess) / OVERLAP)  # of groups that share no prompt
            share = min(1.0, math.ceil((count + 1) * (1 - MISSES)) / count)
            result[v] = max(0.0, float(np.quantile(excess, share)))
    return result


def group_means(
    data: Examples,
    guess: Numbers,
    v: int,
    chosen: Flags | None = None,
    overlap: int = 1,
) -> list[tuple[float, float]]:
    """The means of `guess` (p,) and of the measured quality of variant v, over groups of `chosen`
    prompts with like guesses; each prompt is in so many groups as `overlap` says."""
    quality = data.quality[:, v]
    known = ~np.isnan(quality)
    some = known.any(1) & ~np.isnan(guess)
    if chosen is not None:
        some &= chosen
    at = np.flatnonzero(some)
    at = at[np.argsort(guess[at], kind="stable")]
    size = min(GROUP, max(1, len(at) // 10))
    weights = known * data.weights[:, None]
    found = []
    begins = list(range(0, len(at) - size + 1, max(1, size // overlap)))
    if begins and begins[-1] < len(at) - size:  # those of most worth
        begins.append(len(at) - size)
    for begin in begins:
        of = at[begin : begin + size]
        w = weights[of]
        foretold = np.average(guess[of], weights=w.sum(1))
        found.append((float(foretold), float(np.average(np.nan_to_num(quality[of]), weights=w))))
    return found


def _fit(
    data: Examples, fold: NDArray[np.int64], knots: Single, seed: int, epochs: int, tell: OnEpoch
) -> dict[str, Single]:
    """The networks' weights as `Predictor` takes them, by Adam on all examples at once."""
    torch.manual_seed(seed)
    plain, resumed = (features(data.vectors, near, knots) for near in (None, data.near))
    centre, spread = _standard(plain, resumed, data.vectors.shape[1])
    alone = torch.from_numpy((plain - centre) / spread)
    beside = torch.from_numpy((resumed - centre) / spread).nan_to_num()
    repeated = (features(data.vectors, data.vectors, knots) - centre) / spread
    itself = torch.from_numpy(repeated.astype(np.float32))
    skips = torch.tensor(data.skips)
    counted = data.right is not None
    measured = data.quality if data.right is None else data.right
    beside_known = np.isfinite(data.near).all(axis=1).reshape(-1, 1, 1)
    taught = beside_known | ~np.array(data.skips)[:, None]
    known = torch.from_numpy(~np.isnan(measured) & taught)
    target = torch.from_numpy(np.nan_to_num(measured)).float()
    counts = known * (torch.arange(FOLDS)[:, None] != torch.from_numpy(fold))[:, :, None, None]
    counts = counts * torch.from_numpy(data.weights)[:, None, None]
    usual = _usual(replace(data, quality=measured))
    if counted:
        shares = np.clip(usual, 0.01, 0.99)
        usual = np.log(shares / (1 - shares))
    w = _start(alone.shape[1], usual)
    optimiser = torch.optim.AdamW(w.values(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=max(1, epochs))
    for epoch in range(epochs):
        mean = torch.where(skips, _outputs(w, beside), _outputs(w, alone))[..., None]
        loss = (_loss(mean, target, counted) * counts).sum()
        if data.skips.count(True):  # what exact's pictures are worth
            again = _outputs(w, itself)[:, :, skips][..., None]
            loss = loss + REPEATED * (_loss(again, target[:, :1], counted) * counts[:, :, :1]).sum()
        loss = loss / counts.sum() * len(skips)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        tell(epoch + 1, epochs)
    if not epochs:
        w["w3"].detach().zero_()
    result = {name: value.detach().numpy() for name, value in w.items()}
    result["b1"] = result["b1"] - (centre / spread) @ result["w1"]
    result["w1"] = result["w1"] / spread[:, None]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in result.items()}


def _loss(mean: Tensor, target: Tensor, counted: bool) -> Tensor:
    """The losses of expected values, of `counted` ones as log-odds of 1 against 0."""
    if not counted:
        return (target - mean).square()
    sure = mean.sigmoid().clamp(1e-6, 1 - 1e-6)
    return -(target * sure.log() + (1 - target) * (1 - sure).log())


def _kernels(data: Examples, fold: NDArray[np.int64], seed: int) -> dict[str, Single]:
    """Kernel ridge regressions of the prompts' mean qualities, each without one fold, as
    `Predictor` takes them."""
    target = np.nanmean(data.quality, axis=2)
    apart = squared_distances(data.vectors, data.vectors).astype(np.float64)
    rng = np.random.default_rng(seed)
    sharpness, level = np.zeros(FOLDS), np.zeros((FOLDS, target.shape[1]))
    pull = np.zeros((FOLDS, *target.shape))
    for e in range(FOLDS):
        used = np.flatnonzero(fold != e)
        sharpness[e], ridge = _chosen(apart, target, rng.permutation(used)[:MOST])
        level[e] = target[used].mean(0)
        near = np.exp(-sharpness[e] * apart[np.ix_(used, used)])
        pull[e, used] = _ridge(near, target[used] - level[e], ridge)
    found = {"sharpness": sharpness, "level": level, "pull": pull}
    return {name: value.astype(np.float32) for name, value in found.items()}


def _chosen(apart: Numbers, target: Numbers, used: NDArray[np.int64]) -> tuple[float, float]:
    """The sharpness and the ridge that predict a part of the prompts `used` best from the others,
    by squared error over variants."""
    out, rest = np.split(used, [int(PART * len(used))])
    level = target[rest].mean(0)
    best = (float("inf"), SHARPNESS[0], RIDGES[0])
    for sharp in SHARPNESS:
        near = np.exp(-sharp * apart[np.ix_(rest, rest)])
        new = np.exp(-sharp * apart[np.ix_(out, rest)])
        for ridge in RIDGES:
            guess = level + new @ _ridge(near, target[rest] - level, ridge)
            best = min(best, (float(np.square(guess - target[out]).sum()), sharp, ridge))
    return best[1:]


def _ridge(near: Numbers, target: Numbers, ridge: float) -> Numbers:
    factor = cho_factor(near + ridge * np.eye(len(near)), check_finite=False)
    solved: Numbers = cho_solve(factor, target, check_finite=False)
    return solved


def _standard(alone: Single, beside: Single, d: int) -> tuple[Single, Single]:
    """Means and deviations of the features without and with neighbours (n, 2·d + k); of what
    neighbours differ in, where there are any."""
    known = beside[np.isfinite(beside).all(axis=1)]
    seen = known if len(known) else alone
    centre = np.concatenate([alone[:, :d].mean(0), seen[:, d:].mean(0)])
    spread = np.concatenate([alone[:, :d].std(0), seen[:, d:].std(0)])
    return centre, np.maximum(spread, LEAST_SPREAD).astype(np.float32)


def _knots(similarity: Single) -> Single:
    """The similarities between which quality is about linear; dense at the top, where prompts are
    the same in other words."""
    known = similarity[~np.isnan(similarity)]
    if not len(known):
        return np.zeros(1, np.float32)
    return np.unique(np.append(np.quantile(known, KNOTS), 1.0).astype(np.float32))


def _start(inputs: int, means: Numbers) -> dict[str, Tensor]:
    """Weights of networks that predict every variant's mean (v,) for every prompt."""
    shapes = {"w1": (inputs, HIDDEN), "w2": (HIDDEN, HIDDEN), "w3": (HIDDEN, len(means))}
    w = {name: torch.randn(FOLDS, *s) * s[0] ** -0.5 for name, s in shapes.items()}
    w["w3"] *= 0.1
    for name, size in (("b1", HIDDEN), ("b2", HIDDEN), ("b3", len(means))):
        w[name] = torch.zeros(FOLDS, size)
    w["b3"][:] = torch.from_numpy(means).float()
    for value in w.values():
        value.requires_grad_()
    return w


def _outputs(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The outputs (e, n, v) of every network, with dropout."""
    drop = torch.nn.functional.dropout
    hidden = drop(torch.relu(x @ w["w1"] + w["b1"][:, None]), DROPOUT)
    hidden = drop(torch.relu(hidden @ w["w2"] + w["b2"][:, None]), DROPOUT)
    return hidden @ w["w3"] + w["b3"][:, None]
