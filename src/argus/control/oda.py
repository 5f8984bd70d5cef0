"""ODA, Argus' optimised distribution aligner: which level serves a prompt whose best is another.

Levels are ordered from the slowest (exact) to the fastest. ODA is the comonotone coupling of two
distributions over them: both are laid out along [0, 1] in level order, and their overlaps are the
joint shares. It loses least quality among all couplings when losses are Monge in the level order.
"""

from __future__ import annotations

import numpy as np

from argus.control.variants import Numbers


def align(best: Numbers, served: Numbers) -> Numbers:
    """P(served level j | best level k), (k, j), for shares `best` and `served` that each sum to 1.

    A level that is best for no prompt gets the served level at the same place of [0, 1].
    """
    ends_best, ends_served = np.cumsum(best), np.cumsum(served)
    ends_best[-1] = ends_served[-1] = 1.0
    low = np.maximum((ends_best - best)[:, None], (ends_served - served)[None, :])
    high = np.minimum(ends_best[:, None], ends_served[None, :])
    overlap = np.clip(high - low, 0.0, None)
    totals = overlap.sum(axis=1)
    for k in np.flatnonzero(totals <= 0):
        place = min(float(ends_best[k]), 1.0)
        overlap[k, min(int(np.searchsorted(ends_served, place - 1e-12)), len(served) - 1)] = 1.0
    result: Numbers = overlap / overlap.sum(axis=1, keepdims=True)
    return result
