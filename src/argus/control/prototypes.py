"""Recent prompts as a few prototypes, for which a plan is made."""

from __future__ import annotations

import numpy as np

from argus.control.planner import Demand
from argus.control.variants import Flags, Numbers, Whole

COUNT = 64
ROUNDS = 6


def demand_of(
    rate: float, quality: Numbers, allowed: Flags, slo: Whole, count: int = COUNT
) -> Demand:
    """Prompts with `quality` and `allowed` (p, v) as prototypes whose rates sum to `rate`.

    Prompts of one prototype share the SLO class and the allowed variants; large groups are split by
    k-means on quality.
    """
    keys = np.concatenate([slo[:, None], allowed.astype(np.int64)], axis=1)
    _, kinds = np.unique(keys, axis=0, return_inverse=True)
    kinds = kinds.ravel()
    label = np.zeros(len(quality), dtype=np.int64)
    begin = 0
    for kind in range(kinds.max() + 1):
        members = np.flatnonzero(kinds == kind)
        parts = max(1, round(count * len(members) / len(quality)))
        seen = np.where(allowed[members], quality[members], 0.0)
        label[members] = begin + _parted(seen, parts)
        begin += parts
    used, label = np.unique(label, return_inverse=True)
    label = label.ravel()
    sizes = np.bincount(label).astype(float)
    centres = np.stack([np.bincount(label, weights=column) / sizes for column in quality.T], axis=1)
    first = np.array([np.flatnonzero(label == one)[0] for one in range(len(used))])
    return Demand(rate * sizes / sizes.sum(), centres, allowed[first], slo[first])


def _parted(rows: Numbers, count: int) -> Whole:
    """The cluster (n,) of each row, of at most `count`; k-means from evenly spread rows."""
    if count <= 1 or len(rows) <= count:
        return np.arange(len(rows)) % max(1, count)
    order = rows.sum(axis=1).argsort(kind="stable")
    centres = rows[order[np.linspace(0, len(rows) - 1, count).round().astype(int)]]
    label = np.zeros(len(rows), dtype=np.int64)
    for _ in range(ROUNDS):
        distance = (centres**2).sum(1)[None, :] - 2 * rows @ centres.T
        label = distance.argmin(axis=1)
        sizes = np.bincount(label, minlength=count)
        sums = np.stack([np.bincount(label, weights=c, minlength=count) for c in rows.T], axis=1)
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)
    return label
