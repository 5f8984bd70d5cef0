"""Predicts the quality of every variant's picture of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from argus.core.errors import ModelError
from argus.files import written_aside

Numbers = NDArray[np.float32]
WEIGHTS, FACTS = "predictor.safetensors", "predictor.json"


@dataclass(frozen=True)
class Prediction:
    """Of every variant (v,): the expected quality of its picture, and a lower bound of what such
    prompts get on average: of ten groups of prompts with similar expectations, nine are above.
    (Where a picture is right or wrong, a bound of single pictures would say nothing.) The exact
    variant's quality is 1. A variant that skips has NaN where there is no neighbour."""

    mean: Numbers
    low: Numbers


class Predictor:
    """The average of several small networks that were trained on different prompts.

    They take a prompt's embedding x (d,), what its neighbour's y differs in, y - x, and where the
    similarity of both is between a few similarities, the `knots`, and return a mean for every
    variant. Variants that do not skip, and all without a neighbour, see zeros in place of the last
    two. `weights` are

    - `w1` (e, 2·d + k, h), `b1` (e, h), `w2` (e, h, h), `b2` (e, h): two hidden layers of e
      networks
    - `w3` (e, h, v), `b3` (e, v): means; with `gain` (1,), of a scorer that says right or wrong,
      the log-odds of a right picture, and quality is 1 + (p_v - p_exact) / gain
    - `knots` (k,), ascending; `usual` (v,), the mean quality over prompts, and `trust` (v,), from 0
      to 1, the factor of the networks' difference from it
    - `widening` (v,): how far bounds are below means, so that they hold for new prompts
    - `centre` (d,) and `spread` (d, d): mean and covariance of the training prompts' embeddings
    - `scores` (2,): s₀ and the mean of s_exact - s₀, by which a score becomes quality

    Where no variant skips, there may be a kernel regression for each network, which replaces its
    means: `anchors` (m, d), the training prompts' embeddings, `sharpness` (e,) of Gaussian kernels
    around them, `pull` (e, m, v), 0 at prompts it was not trained on, and `level` (e, v).
    """

    def __init__(
        self,
        variants: Sequence[str],
        skips: Sequence[bool],
        made_for: str,
        weights: Mapping[str, Numbers],
    ) -> None:
        self.variants, self.skips, self.made_for = tuple(variants), tuple(skips), made_for
        self.weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
        self._skips = np.array(self.skips)

    @property
    def usual(self) -> Numbers:
        """The mean quality (v,) over the prompts it was trained on."""
        return self.weights["usual"]

    def quality_of(self, score: float, exact: float | None = None) -> float:
        """The quality of a picture with a score: 1 + (s - s_exact) / mean(s_exact - s₀), with the
        mean exact score if that of its prompt is not known. Raises ModelError without `scores`."""
        if "scores" not in self.weights:
            raise ModelError("This predictor does not say what scores mean: train it again.")
        unrelated, gained = (float(value) for value in self.weights["scores"])
        beside = unrelated + gained if exact is None else exact
        return 1 + (score - beside) / gained

    def predict(self, vector: Numbers, near: Numbers | None = None) -> Prediction:
        """Of a prompt with an embedding (d,) and its neighbour's embedding (d,), None without
        one."""
        mean, low = self.predict_all(vector[None], None if near is None else near[None])
        return Prediction(mean[0], low[0])

    def predict_all(self, vectors: Numbers, near: Numbers | None = None) -> tuple[Numbers, Numbers]:
        """Means and bounds (n, v) of prompts with embeddings (n, d) whose neighbours have
        embeddings `near` (n, d), NaN for those without; None: nobody has a neighbour."""
        w = self.weights
        out = _outputs(w, features(vectors, None, w["knots"]))
        if self._skips.any():
            resumed = np.nan if near is None else _outputs(w, features(vectors, near, w["knots"]))
            out = np.asarray(np.where(self._skips, resumed, out), np.float32)
        if "gain" in w:
            chance: Numbers = np.asarray(1 / (1 + np.exp(-out)), np.float32)
            out = 1 + (chance - chance[:, :1]) / w["gain"]
        if "anchors" in w:
            out = kernel_mean(w, vectors)
        mean: Numbers = np.asarray(w["usual"] + w["trust"] * (out - w["usual"]), np.float32)
        low: Numbers = mean - w["widening"]
        mean[:, 0], low[:, 0] = 1.0, 1.0  # by definition
        return mean, low

    def save(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write both files, each whole or not at all. `facts` are for readers of the file alone."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "made_for": self.made_for, "variants": self.variants, "skips": self.skips,
            **(facts or {}),
        }  # fmt: skip
        with written_aside(folder / WEIGHTS) as aside, written_aside(folder / FACTS) as described:
            save_file(self.weights, aside)
            described.write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, made_for: str) -> Predictor:
        """Read what `save` wrote. Raises ModelError if it is missing, broken, or not made for
        `made_for`, the fingerprint of a family."""
        try:
            content = json.loads((folder / FACTS).read_text())
            weights = load_file(folder / WEIGHTS)
            found = cls(content["variants"], content["skips"], content["made_for"], weights)
            inputs = 2 * len(weights["centre"]) + len(weights["knots"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder} holds no predictor that can be read: {error}. `argus train` makes one."
            ) from error
        if found.made_for != made_for:
            raise ModelError(
                f"The predictor in {folder} was trained for other variants, weights or another "
                "text encoder: train one for this family (`argus train`)."
            )
        if weights["w1"].shape[1] != inputs:
            raise ModelError(
                f"The predictor in {folder} is of an earlier version of Argus, which did not look "
                "at neighbours' prompts: train it again (`argus train`)."
            )
        return found


def facts_of(folder: Path) -> dict[str, Any]:
    """What a predictor's folder says of it. Raises ModelError if it holds none."""
    try:
        facts = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no predictor that can be read: {error}. `argus train` makes one."
        ) from error
    return dict(facts)


def features(vectors: Numbers, near: Numbers | None, knots: Numbers) -> Numbers:
    """What the networks take (n, 2·d + k) of embeddings (n, d) and those of neighbours (n, d), NaN
    for those without; None: none is looked at."""
    n, d = vectors.shape
    result: Numbers = np.zeros((n, 2 * d + len(knots)), np.float32)
    result[:, :d] = vectors
    if near is not None:
        result[:, d : 2 * d] = near - vectors
        result[:, 2 * d :] = hats(knots, similarities(vectors, near))
    return result


def similarities(vectors: Numbers, near: Numbers) -> Numbers:
    """The cosines (n,) of embeddings (n, d) and those of neighbours, NaN where these are."""
    lengths = np.sqrt(np.vecdot(vectors, vectors) * np.vecdot(near, near))
    cosines: Numbers = np.vecdot(vectors, near) / np.maximum(lengths, np.float32(1e-9))
    return cosines


def hats(knots: Numbers, at: Numbers) -> Numbers:
    """The weights (n, k) of the knots for linear interpolation at `at` (n,), beyond the last those
    of it; NaN where `at` is."""
    numbers = np.arange(len(knots))
    place = np.interp(at, knots, numbers)[:, None]  # 2.5 is halfway from knot 2 to knot 3
    rows: Numbers = np.maximum(1 - np.abs(place - numbers), 0).astype(np.float32)
    rows[np.isnan(at)] = np.nan  # np.interp gives numbers there if there is one knot
    return rows


def _outputs(w: Mapping[str, Numbers], inputs: Numbers) -> Numbers:
    """The networks' average (n, v), for `features` (n, 2·d + k)."""
    hidden = np.maximum(np.matmul(inputs, w["w1"]) + w["b1"][:, None], 0)
    hidden = np.maximum(np.matmul(hidden, w["w2"]) + w["b2"][:, None], 0)
    out: Numbers = (np.matmul(hidden, w["w3"]) + w["b3"][:, None]).mean(0)
    return out


def kernel_mean(w: Mapping[str, Numbers], vectors: Numbers) -> Numbers:
    """Means (n, v) of the kernel regressions' average, for embeddings (n, d)."""
    apart = squared_distances(vectors, w["anchors"])
    total = sum(
        np.exp(-sharp * apart) @ pull + level
        for sharp, pull, level in zip(w["sharpness"], w["pull"], w["level"], strict=True)
    )
    mean: Numbers = np.asarray(total / len(w["sharpness"]), np.float32)
    return mean


def squared_distances(a: Numbers, b: Numbers) -> Numbers:
    """Squared distances (n, m) of the rows of (n, d) and (m, d)."""
    apart: Numbers = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.maximum(apart, 0)
