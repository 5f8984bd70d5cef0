"""Foretells what every variant's picture of a prompt would be worth."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from argus.core.errors import ModelError

Numbers = NDArray[np.float32]
WEIGHTS, FACTS = "predictor.safetensors", "predictor.json"


@dataclass(frozen=True)
class Prediction:
    """Of every variant (v,): the quality to expect of its picture, and a lower bound of what such
    prompts get on average: of ten groups of prompts with like expectations, nine are above. (Where
    a picture is right or wrong, a bound of single pictures would say nothing.) Quality is 1 for
    what the exact variant makes of the prompt. A variant that skips has NaN where there is no
    neighbour."""

    mean: Numbers
    low: Numbers


class Predictor:
    """Some small networks that were trained on different prompts, averaged.

    They take a prompt's embedding (d,) and give every variant a mean at each of a few similarities,
    the `knots`; between two knots it is on a straight line, beyond the last it stays as it is. Only
    variants that skip have more than one. `weights` are

    - `w1` (e, d, h), `b1` (e, h), `w2` (e, h, h), `b2` (e, h): two hidden layers of e networks
    - `w3` (e, h, v·k), `b3` (e, v·k): means; with `gain` (1,), of a scorer that says right or
      wrong, the log-odds of a right picture, and quality is 1 + (p_v - p_exact) / gain
    - `knots` (k,); `usual` (v,), the mean over prompts, and `trust` (v,), from 0 to 1, in what the
      networks say beyond it
    - `widening` (v,): how far bounds are below means, so that they hold for new prompts
    - `centre` (d,) and `scatter` (1,): the mean of the training prompts' embeddings, and the mean
      square of their distance from it; `scores` (2,): s₀ and the mean of s_exact - s₀, by which a
      score becomes quality
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

    @property
    def usual(self) -> Numbers:
        """The mean quality (v,) over the prompts it was trained on."""
        return self.weights["usual"]

    def quality_of(self, score: float, exact: float | None = None) -> float:
        """What a picture of this score is worth: 1 + (s - s_exact) / mean(s_exact - s₀), beside the
        mean exact picture if that of its prompt is not known. Raises ModelError without scores."""
        if "scores" not in self.weights:
            raise ModelError("This predictor does not say what scores mean: train it again.")
        unrelated, gained = (float(value) for value in self.weights["scores"])
        beside = unrelated + gained if exact is None else exact
        return 1 + (score - beside) / gained

    def predict(self, vector: Numbers, similarity: float | None) -> Prediction:
        """For a prompt's embedding (d,), and how similar its neighbour is, None without one."""
        mean, low = self.predict_all(vector[None], np.array([_number(similarity)], np.float32))
        return Prediction(mean[0], low[0])

    def predict_all(self, vectors: Numbers, similarities: Numbers) -> tuple[Numbers, Numbers]:
        """Means and bounds (n, v) of prompts with embeddings (n, d) and similarities (n,), NaN for
        those without a neighbour."""
        w = self.weights
        mean = _outputs(w, vectors, len(self.variants))
        if "gain" in w:
            mean = (1 / (1 + np.exp(-mean))).astype(np.float32)
        mean = (mean * places(w["knots"], self.skips, similarities)).sum(2)
        if "gain" in w:
            mean = 1 + (mean - mean[:, :1]) / w["gain"]
        mean = w["usual"] + w["trust"] * (mean - w["usual"])
        low = mean - w["widening"]
        mean[:, 0], low[:, 0] = 1.0, 1.0  # the exact variant is what quality is measured by
        return mean, low

    def save(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write both files, each whole or not at all. `facts` are kept for people to read."""
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{WEIGHTS}.new"
        save_file(self.weights, aside)
        content = {
            "made_for": self.made_for, "variants": self.variants, "skips": self.skips,
            **(facts or {}),
        }  # fmt: skip
        described = folder / f"{FACTS}.new"
        described.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(aside, folder / WEIGHTS)
        os.replace(described, folder / FACTS)

    @classmethod
    def load(cls, folder: Path, made_for: str) -> Predictor:
        """Read what `save` wrote. Raises ModelError if it is not there, is broken, or was made for
        something else than `made_for`, the fingerprint of a family."""
        try:
            content = json.loads((folder / FACTS).read_text())
            weights = load_file(folder / WEIGHTS)
            found = cls(content["variants"], content["skips"], content["made_for"], weights)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"{folder} holds no predictor that can be read: {error}. `argus train` makes one."
            ) from error
        if found.made_for != made_for:
            raise ModelError(
                f"The predictor in {folder} was trained for other variants, weights or another "
                "text encoder: train one for this family (`argus train`)."
            )
        outputs = len(found.variants) * found.weights["knots"].size
        if found.weights["b3"].shape[1] != outputs:
            raise ModelError(
                f"The predictor in {folder} is of an earlier version of Argus, whose bounds were "
                "of single pictures: train it again (`argus train`)."
            )
        return found


def _outputs(w: Mapping[str, Numbers], vectors: Numbers, count: int) -> Numbers:
    """The networks' average (n, v, k), for embeddings (n, d)."""
    hidden = np.maximum(np.einsum("nd,edh->enh", vectors, w["w1"]) + w["b1"][:, None], 0)
    hidden = np.maximum(np.einsum("enh,ehi->eni", hidden, w["w2"]) + w["b2"][:, None], 0)
    out: Numbers = (np.einsum("enh,eho->eno", hidden, w["w3"]) + w["b3"][:, None]).mean(0)
    return out.reshape(len(vectors), count, -1)


def hats(knots: Numbers, at: Numbers) -> Numbers:
    """The weights (n, k) of the knots whose straight lines give the value at `at` (n,); NaN where
    that is NaN."""
    x = np.clip(at, knots[0], knots[-1])
    eye = np.eye(len(knots), dtype=np.float32)
    rows: Numbers = np.stack([np.interp(x, knots, row) for row in eye], axis=1).astype(np.float32)
    return rows


def places(knots: Numbers, skips: Sequence[bool], at: Numbers) -> Numbers:
    """The weights (n, v, k) of the knots: `hats` for variants that skip, the first for others."""
    first = np.eye(1, len(knots), dtype=np.float32)
    rows: Numbers = np.where(np.array(skips)[:, None], hats(knots, at)[:, None], first)
    return rows


def _number(similarity: float | None) -> float:
    return float("nan") if similarity is None else similarity
