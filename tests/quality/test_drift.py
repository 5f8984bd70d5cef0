from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np

from argus.engine.sources import family_fingerprint, model_folder
from argus.families.catalog import default_family
from argus.quality.drift import FEWEST_PROMPTS, WINDOW, Drift, Numbers, moments
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor

RNG = np.random.default_rng(0)


def test_errors_around_nothing_are_no_drift_and_a_shift_is() -> None:
    drift = Drift()
    for error in RNG.normal(0, 0.3, 500):
        drift.saw_error(float(error))
        assert not drift.errors
    for error in RNG.normal(-0.3, 0.3, 200):
        drift.saw_error(float(error))
    assert drift.errors


def test_a_certain_but_small_error_does_not_matter() -> None:
    drift = Drift()
    for _ in range(100):
        drift.saw_error(0.02 + 1e-3 * float(RNG.normal()))
    assert not drift.errors


def test_an_error_that_is_no_number_changes_nothing() -> None:
    drift = Drift()
    for error in (math.nan, math.inf, -math.inf):
        drift.saw_error(error)
    for error in RNG.normal(-0.5, 0.3, 200):
        drift.saw_error(float(error))
    assert drift.errors


def test_an_alarm_lasts_until_errors_are_made_up_for() -> None:
    drift = Drift()
    for error in RNG.normal(-0.5, 0.3, 200):
        drift.saw_error(float(error))
    assert drift.errors
    for error in RNG.normal(0, 0.3, 20):
        drift.saw_error(float(error))
    assert drift.errors
    for error in RNG.normal(0, 0.3, 2000):
        drift.saw_error(float(error))
    assert not drift.errors


def test_bursts_of_errors_around_nothing_are_no_drift() -> None:
    """Half a day of measured pictures: pictures of one prompt err alike, variants err differently,
    and rare pictures fail altogether."""
    drift, alarms = Drift(), 0
    for _ in range(500):
        spread, few = RNG.choice([0.1, 0.3, 0.6]), RNG.integers(1, 20)
        errors = np.repeat(RNG.normal(0, spread, few), 2)
        failed = RNG.random(len(errors)) < 0.05
        for error in np.where(failed, -1.0, errors + 0.05):
            drift.saw_error(float(error))
            alarms += drift.errors
    assert not alarms


def prompts(count: int, d: int = 8) -> Numbers:
    vectors: Numbers = RNG.normal(0, d**-0.5, (count, d)).astype(np.float32)
    return vectors


TRAINING = prompts(2000)


def drift_of(seen: Numbers) -> Drift:
    drift = Drift(*moments(TRAINING, np.ones(len(TRAINING))))
    for vector in seen:
        drift.saw_prompt(vector)
    return drift


def test_prompts_of_another_kind_are_noticed() -> None:
    assert drift_of(prompts(WINDOW)).moved < 0.2
    far = prompts(WINDOW) / 10 + np.eye(8, dtype=np.float32)[0]
    before = drift_of(prompts(2 * WINDOW))
    assert not before.prompts
    for vector in far:
        before.saw_prompt(vector)
    assert before.prompts


def test_any_fashion_among_known_prompts_is_none() -> None:
    """The twentieth of all prompts that lies furthest in a direction."""
    many = prompts(20 * WINDOW)
    fashion = many[np.argsort(many[:, 0])[-WINDOW:]]
    assert not drift_of(fashion).prompts


def test_who_repeats_himself_moves_nothing() -> None:
    """A script that asks for a few extreme prompts for ever, beside a few others' ones."""
    script = 2 * np.eye(8, dtype=np.float32)
    drift = drift_of(prompts(WINDOW))
    for n, vector in enumerate(prompts(3 * WINDOW)):
        drift.saw_prompt(vector if n % 3 == 0 else script[0])
    assert not drift.prompts


def test_too_few_different_prompts_say_nothing() -> None:
    far = np.eye(8, dtype=np.float32)[0]
    assert not drift_of(prompts(FEWEST_PROMPTS - 1) / 10 + far).prompts
    assert drift_of(prompts(FEWEST_PROMPTS) / 10 + far).prompts


def test_a_hundred_simple_prompts_of_the_familys_own_words_are_no_drift() -> None:
    drift, encoder = bundled()
    for number, colour, thing in itertools.product(NUMBERS, COLOURS, THINGS):
        drift.saw_prompt(encoder.embed(f"{number} {colour} {thing}").vector)
    assert len(drift._often) >= FEWEST_PROMPTS
    assert 0 < drift.moved < 1


def test_other_words_are_drift() -> None:
    drift, encoder = bundled()
    for what, owner, thing in itertools.product(WHAT, OWNERS, OTHERS):
        drift.saw_prompt(encoder.embed(f"{what} of {owner} {thing}").vector)
    assert drift.prompts


NUMBERS, COLOURS = ("a", "two", "three"), ("red", "blue", "green", "black", "purple")
THINGS = ("fish", "house", "boat", "tree", "sun", "key", "cup", "star")
WHAT = ("a photo", "an oil painting", "a cinematic portrait")
OWNERS = ("my old", "the president's", "an angry", "somebody's broken", "a cyberpunk")
OTHERS = ("dog", "laptop", "neighbour", "bicycle", "grandmother", "violin", "cathedral")


def bundled() -> tuple[Drift, PromptEncoder]:
    """The bundled family's test, as a server begins with it, and its encoder."""
    family = default_family()
    made_for = family_fingerprint(family)
    predictor = Predictor.load(Path(family.folder) / "predictor", made_for)
    encoder = PromptEncoder.load(model_folder(family.models[family.exact.model]))
    return Drift(predictor.weights["centre"], predictor.weights["spread"]), encoder
