"""The best mix of variants for a budget, and its quality on pictures it was not chosen by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]

RIDGE = 10.0


def best_mix(q: Numbers, costs: Numbers, budget: float, weights: Numbers) -> Numbers:
    """Shares (n, variants) that maximise mean quality at a mean cost of at most `budget`.

    `q` (n, variants) are the qualities of n prompts or groups that count `weights` (n,). The linear
    programme has one constraint, so at its price λ every row takes argmax q − λ·cost, and two such
    choices are mixed to meet the budget. A variant of cost 0 must be among them: shedding.
    """

    def chosen(price: float) -> Numbers:
        best: Numbers = np.eye(len(costs))[np.argmax(q - price * costs, axis=1)]
        return best

    def cost(shares: Numbers) -> float:
        return float(weights @ (shares @ costs) / weights.sum())

    low, high = 0.0, 1e4 * (1 + np.ptp(q)) / costs.max()
    if cost(chosen(low)) <= budget:
        return chosen(low)
    for _ in range(80):
        price = (low + high) / 2
        low, high = (price, high) if cost(chosen(price)) > budget else (low, price)
    dear, cheap = chosen(low), chosen(high)
    share = (budget - cost(cheap)) / (cost(dear) - cost(cheap))
    return share * dear + (1 - share) * cheap


def judged(q: Numbers, costs: Numbers, budget: float, groups: Whole) -> float:
    """Mean of the qualities `q` (n, variants, seeds) under the mix that is chosen by groups (n,) of
    prompts on all seeds but one and judged on that one, averaged over which it is. Requests beyond
    the budget are shed, at quality 0."""
    names, at = np.unique(groups, return_inverse=True)
    weights = np.bincount(at).astype(float)
    results = []
    q, costs = _with_shedding(q), np.append(costs, 0.0)
    for seed in range(q.shape[2]):
        means = np.zeros((len(names), q.shape[1]))
        np.add.at(means, at, np.delete(q, seed, axis=2).mean(2))
        shares = best_mix(means / weights[:, None], costs, budget, weights)
        results.append(float((shares[at] * q[:, :, seed]).sum(1).mean()))
    return float(np.mean(results))


def judged_by(guess: Numbers, q: Numbers, costs: Numbers, budget: float) -> float:
    """As `judged`, of the mix that is chosen for each prompt by a guess (n, variants) made without
    `q`."""
    costs = np.append(costs, 0.0)
    shares = best_mix(_with_shedding(guess), costs, budget, np.ones(len(q)))
    return float((shares * _with_shedding(q.mean(2))).sum(1).mean())


def judged_knowing(q: Numbers, belief: Numbers, costs: Numbers, budget: float) -> float:
    """As `judged`, of the mix that is chosen for each prompt by the estimates `belief` of one seed
    from the others (`believed`): a prompt-aware oracle that has seen a picture of every variant for
    each of these."""
    seeds = range(q.shape[2])
    found = [judged_by(belief[:, :, s], q[:, :, [s]], costs, budget) for s in seeds]
    return float(np.mean(found))


def believed(q: Numbers) -> Numbers:
    """Estimates (n, variants, seeds) of each seed's qualities from those of the other seeds: a
    ridge regression on all variants' means, fitted to the other half of the prompts.

    A few pictures' scores are mostly noise. Choosing by them alone is worse than choosing without
    them (the winner's curse).
    """
    result, n = np.empty_like(q), len(q)
    half = np.random.default_rng(0).permutation(n) % 2 == 0
    for seed in range(q.shape[2]):
        others = np.delete(q, seed, axis=2).mean(2)
        for out in (half, ~half):
            x, y = others[~out], q[~out, :, seed]
            centre, usual = x.mean(0), y.mean(0)
            x = x - centre
            weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (y - usual))
            result[out, :, seed] = usual + (others[out] - centre) @ weights
    return result


def _with_shedding(q: Numbers) -> Numbers:
    """Qualities with one more variant of quality 0."""
    return np.concatenate([q, np.zeros_like(q[:, :1])], axis=1)
