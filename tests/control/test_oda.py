from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog

from argus.control.oda import align
from argus.control.variants import Numbers

shares = arrays(np.float64, 4, elements=st.one_of(st.just(0.0), st.floats(0.01, 1))).filter(
    lambda x: x.sum() > 0.1
)


@given(shares, shares)
def test_it_is_a_conditional_distribution_that_meets_the_shares(h: Numbers, f: Numbers) -> None:
    h, f = h / h.sum(), f / f.sum()
    coupling = align(h, f)
    np.testing.assert_allclose(coupling.sum(axis=1), 1)
    np.testing.assert_allclose(h @ coupling, f, atol=1e-9)


@given(shares)
def test_prompts_keep_their_best_level_when_the_shares_match(h: Numbers) -> None:
    h = h / h.sum()
    coupling = align(h, h)
    np.testing.assert_allclose(coupling[h > 0], np.eye(4)[h > 0], atol=1e-6)


@given(shares, shares)
def test_it_loses_least_of_all_couplings_when_losses_are_monge(h: Numbers, f: Numbers) -> None:
    h, f = h / h.sum(), f / f.sum()
    loss = (np.subtract.outer(np.arange(4), np.arange(4)) ** 2).astype(float)  # convex: Monge
    ours = (h[:, None] * align(h, f) * loss).sum()
    rows = [np.kron(np.eye(4)[k], np.ones(4)) for k in range(4)]
    columns = [np.kron(np.ones(4), np.eye(4)[j]) for j in range(4)]
    best = linprog(loss.ravel(), A_eq=np.array(rows + columns), b_eq=np.concatenate([h, f]))
    assert ours == pytest.approx(best.fun, abs=1e-7)


def test_the_published_walk() -> None:
    """Half want the slow level, half the fast; a fifth can be served slowly: of the slow half, two
    in five are, and the rest are moved to the fast level (shares spill to the next level over)."""
    coupling = align(np.array([0.5, 0.5]), np.array([0.2, 0.8]))
    np.testing.assert_allclose(coupling, [[0.4, 0.6], [0.0, 1.0]])
