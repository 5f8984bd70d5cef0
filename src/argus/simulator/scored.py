"""Worlds from a table of scores: what Argus would bring a cluster of somebody's own models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from argus.control.variants import EXACT, Numbers, VariantTable
from argus.core.errors import BadRequest, ModelError
from argus.quality.scores import Scores, read_scores, words_of
from argus.simulator.world import Drawing, Pictures, Store, World

HELD_OUT = "held_out.parquet"
WORDS = "words"  # the encoder that needs no download
SLO, WORKERS = 3.0, 8
SINGLE = {"batches": [1], "gain": [1.0]}  # how batching is given
EXACT_JUDGE = {"noise": 0.0}


@dataclass(frozen=True)
class Source:
    """Where a scored world's scores and predictions come from.

    `file` holds the scores; None: the world's own, which is public data. Predictions are those of
    the `predictor` in a folder that `argus train --table` wrote; without one they are learned now,
    from the prompts embedded by `encoder` (a name that `quality.sentences.load_encoder` takes). No
    prompt is predicted by what was trained on it. With `ranks` quality is on the scale of the
    scores' ranks, with the same mean of the variant that loses most.
    """

    file: Path | None = None
    predictor: Path | None = None
    encoder: str = WORDS
    ranks: bool = False


def world_of_table(
    source: Source, costs: Path, unrelated: float | None = None
) -> tuple[World, list[int]]:
    """The world of the table of scores and a file of costs, and its number of workers.

    Costs are YAML or JSON: `variants` maps each to its `seconds` a picture on a worker alone and
    the seconds `load_s` to load its model; variants with the same `model` share its workers.
    `exact`, `workers` and `slo` are optional. `unrelated` is the score of quality 0 (s₀). Raises
    BadRequest for anything else.
    """
    spec = _costs(costs)
    assert source.file is not None
    given = {"exact": spec.get("exact"), "unrelated": unrelated}
    sources = {"variants": f"sourced: {costs}", "scores": f"sourced: {source.file}"}
    world = read_world({"name": costs.stem, **spec, "scores": given}, source, source.file, sources)
    return world, [int(spec.get("workers", WORKERS))]


def _costs(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadRequest(f"The costs {file} cannot be read: {error}") from error
    variants = content.get("variants") if isinstance(content, dict) else None
    if not isinstance(variants, dict) or not variants:
        raise BadRequest(
            f"{file} has no `variants`: give each its `seconds` a picture and the seconds `load_s` "
            "to load its model (docs/your-models.md)."
        )
    for name, one in variants.items():
        if not isinstance(one, dict) or "seconds" not in one:
            raise BadRequest(f"{file}: the variant {name} needs `seconds` a picture.")
        _number(file, f"seconds of {name}", one["seconds"], 1e-9)
        _number(file, f"load_s of {name}", one.get("load_s", 0.0))
        _number(file, f"steps of {name}", one.get("steps", 1), 1)
    _number(file, "workers", content.get("workers", WORKERS), 1)
    _number(file, "slo", content.get("slo", SLO), 1)
    _check_batching(file, content.get("batching", SINGLE))
    judge = content.get("discriminator", EXACT_JUDGE)
    if not isinstance(judge, dict) or "noise" not in judge:
        raise BadRequest(f"{file}: write discriminator as {{noise: 0.3}}.")
    _number(file, "the discriminator's noise", judge["noise"])
    named = {str(name): one for name, one in variants.items()}  # YAML reads 50 as a number
    exact = content.get("exact")
    return {**content, "variants": named, "exact": None if exact is None else str(exact)}


def _check_batching(file: Path, batching: Any) -> None:
    given = batching if isinstance(batching, dict) else {}
    lists = [one for name in SINGLE if isinstance(one := given.get(name), list) and one]
    if len(lists) < len(SINGLE) or len({len(one) for one in lists}) > 1:
        raise BadRequest(
            f"{file}: write batching as {{batches: [1, 2, 4], gain: [1, 1.3, 1.5]}}, a gain for "
            "each batch."
        )
    for name, values in zip(SINGLE, lists, strict=True):
        for value in values:
            _number(file, f"{name} of batching", value, 1e-9)


def _number(file: Path, what: str, value: Any, least: float = 0.0) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or value < least:
        raise BadRequest(f"{file}: {what} is {value!r}; it must be a number of {least:g} or more.")


def read_world(spec: dict[str, Any], source: Source, file: Path, sources: dict[str, str]) -> World:
    """The world of a `spec` (as `sd35.yaml` without marks) and the scores of a file, with
    predictions. Raises BadRequest if scores and costs are not of the same variants."""
    scores = priced(spec, read_scores(file, spec["scores"].get("exact")), file)
    scale, unit = scale_of(spec, scores, source.ranks)
    if source.predictor is None:
        predicted = learned(scale, unit, source.encoder)
    elif source.ranks:
        raise BadRequest("A predictor was trained on scores: leave it out, or the ranks.")
    else:
        predicted = predicted_by(source.predictor, scores, unit)
    return world_of(spec, scale, unit, predicted, sources)


def priced(spec: dict[str, Any], scores: Scores, file: Path) -> Scores:
    """The scores of the variants that have costs."""
    asked, exact = spec["variants"], scores.variants[EXACT]
    lacking = [name for name in asked if name not in scores.variants]
    if lacking:
        raise BadRequest(f"{file} has no scores of {lacking[0]!r}.")
    if exact not in asked:
        raise BadRequest(
            f"The costs lack {exact!r}, which scores best: name another variant as `exact`."
        )
    return scores.only([exact, *(name for name in asked if name != exact)])


def scale_of(spec: dict[str, Any], scores: Scores, ranks: bool = False) -> tuple[Scores, float]:
    """The scores and the difference of them that is a quality of 1; with `ranks` the scores' ranks,
    and the unit by which the variant that loses most has the same mean quality."""
    given = spec["scores"]
    unit = given.get("unit") or scores.unit(given.get("unrelated"))
    if not ranks:
        return scores, unit
    ranked = scores.ranks()
    lost, by_rank = (
        float((1 - np.nanmean(one.quality(1.0), axis=(0, 2))).max()) for one in (scores, ranked)
    )
    return ranked, unit * by_rank / lost if lost > 0 and by_rank > 0 else 1.0


def world_of(
    spec: dict[str, Any], scores: Scores, unit: float, predicted: Numbers, sources: dict[str, str]
) -> World:
    """The world of scores on some scale and its unit, and predicted qualities (p, v).

    Prompts without all pictures are left out. The truth, which `oracle` knows, is the mean of a
    prompt's pictures.
    """
    quality = scores.quality(unit)
    complete = ~np.isnan(quality).any(axis=(1, 2))
    if not complete.any():
        raise BadRequest("No prompt has pictures of every seed by all variants.")
    drawn = quality[complete]
    return World(
        name=spec["name"],
        table=_table(spec, scores.variants, predicted.mean(axis=0)),
        truth=drawn.mean(axis=2),
        predicted=predicted[complete],
        similarity=np.full(len(drawn), np.nan),
        drawing=Drawing(0.0, 1, 1),
        store=Store(0.1, 1.0),
        judging_error=float(spec.get("discriminator", EXACT_JUDGE)["noise"]),
        slo=float(spec.get("slo", SLO)),
        sources=sources,
        pictures=Pictures(drawn, scores.values[complete]),
    )


def learned(scores: Scores, unit: float, encoder: str) -> Numbers:
    """Predicted qualities (p, v), each by a regression that was not trained on the prompt."""
    from argus.lab import training
    from argus.quality.sentences import load_encoder

    data = training.scored(scores, scores.quality(unit), load_encoder(encoder, scores.prompts))
    return training.train(data, encoder, epochs=0, kernel=True).mean


def predicted_by(folder: Path, scores: Scores, unit: float) -> Numbers:
    """Qualities (p, v) that a predictor predicts of the prompts, in the `unit` of the world: of
    those it was trained on, what it said when they were held out."""
    from argus.quality.predictor import Predictor, facts_of
    from argus.quality.sentences import embed_all, load_encoder

    facts = facts_of(folder)
    if "encoder" not in facts:
        raise ModelError(f"{folder} holds no predictor that `argus train --table` made.")
    predictor = Predictor.load(folder, facts["made_for"])
    lacking = [name for name in scores.variants if name not in predictor.variants]
    if lacking or predictor.variants[EXACT] != scores.variants[EXACT]:
        what = f"the variant {lacking[0]!r}" if lacking else "this exact variant"
        raise ModelError(f"The predictor in {folder} was not trained for {what}.")
    if not (folder / HELD_OUT).is_file():
        raise ModelError(f"{folder} has no {HELD_OUT}: make the predictor again.")
    held_out = pd.read_parquet(folder / HELD_OUT)
    keys = held_out["prompt"].map(words_of)
    wide = held_out.assign(prompt=keys).pivot_table(
        index="prompt", columns="variant", values="mean"
    )
    asked = wide.reindex(
        index=[words_of(prompt) for prompt in scores.prompts], columns=list(scores.variants)
    )
    known = asked.to_numpy(float, copy=True)
    new = np.flatnonzero(np.isnan(known).any(axis=1))
    if len(new):
        words = (folder / "words.json").is_file()
        encoder = load_encoder(str(folder) if words else facts["encoder"])
        vectors = embed_all(encoder, [scores.prompts[i] for i in new])
        mean, _ = predictor.predict_all(vectors)
        columns = [predictor.variants.index(name) for name in scores.variants]
        known[new] = mean[:, columns]
    result: Numbers = 1 + (known - 1) * (float(predictor.weights["scores"][1]) / unit)
    return result


def _table(spec: dict[str, Any], variants: Sequence[str], usual: Numbers) -> VariantTable:
    """The variant table: variants of the same `model` share its workers."""
    costs = [spec["variants"][name] for name in variants]
    models = [str(one.get("model", name)) for name, one in zip(variants, costs, strict=True)]
    names = list(dict.fromkeys(models))
    slowest = {m: max(c["seconds"] for c, of in zip(costs, models, strict=True) if of == m)
               for m in names}  # fmt: skip
    load_s = {m: max(c.get("load_s", 0.0) for c, of in zip(costs, models, strict=True) if of == m)
              for m in names}  # fmt: skip
    steps = {m: max(c.get("steps", 1) for c, of in zip(costs, models, strict=True) if of == m)
             for m in names}  # fmt: skip
    batching = spec.get("batching", SINGLE)
    batches, gain = np.array(batching["batches"]), np.array(batching["gain"])
    step_s = np.array([slowest[m] / steps[m] for m in names])[:, None] * batches / gain
    return VariantTable(
        variants=("exact", *variants[1:]),
        strategies=(
            "exact",
            *("steps" if model == models[EXACT] else "model" for model in models[1:]),
        ),
        models=tuple(names),
        types=tuple(spec.get("types", ["worker"])),
        model=np.array([names.index(model) for model in models]),
        steps=np.array(
            [steps[m] * one["seconds"] / slowest[m] for m, one in zip(models, costs, strict=True)]
        ),
        skip=np.zeros(len(variants), dtype=np.int64),
        least_similarity=np.zeros(len(variants)),
        mean_quality=usual,
        batches=batches,
        step_s=step_s[None],
        load_s=np.array([[load_s[m] for m in names]]),
    )
