from __future__ import annotations

import numpy as np

from argus.quality.drift import Drift

RNG = np.random.default_rng(0)


def test_errors_around_nothing_are_no_drift_and_a_shift_is() -> None:
    drift = Drift()
    for error in RNG.normal(0, 0.3, 500):
        drift.saw_error(float(error))
        assert not drift.errors
    for error in RNG.normal(-0.3, 0.3, 100):
        drift.saw_error(float(error))
    assert drift.errors
    drift.forget()
    assert not drift.errors


def test_a_certain_but_small_error_does_not_matter() -> None:
    drift = Drift()
    for _ in range(100):
        drift.saw_error(0.02 + 1e-3 * float(RNG.normal()))
    assert not drift.errors


def test_prompts_of_another_kind_are_noticed() -> None:
    centre, far = np.zeros(8, np.float32), np.zeros(8, np.float32)
    far[0] = 1.0
    drift = Drift(centre, scatter=1.0)
    for _ in range(400):
        drift.saw_prompt(RNG.normal(0, 8**-0.5, 8).astype(np.float32))
    assert not drift.prompts
    assert drift.moved < 0.02
    for _ in range(400):
        drift.saw_prompt(far + RNG.normal(0, 0.1, 8).astype(np.float32))
    assert drift.prompts
