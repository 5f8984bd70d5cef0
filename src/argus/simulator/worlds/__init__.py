"""Worlds as data, read from the files beside this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from argus.control.variants import EXACT, DeviceType, Numbers, VariantTable, variant_table
from argus.core.errors import BadRequest
from argus.core.profile import Profile
from argus.families.catalog import find_family
from argus.quality import table
from argus.simulator.scored import Source, read_world
from argus.simulator.world import Drawing, Store, World

FOLDER = Path(__file__).parent
MARKS = ("sourced", "fitted", "assumed")


def world_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_world(name: str, source: Source | None = None) -> World:
    """A world by name or from a YAML file; a scored one with the scores and predictions of a
    `source`.

    Raises BadRequest for a missing or incomplete world, and for a parameter without its mark.
    """
    file, (plain, sources) = _file(name), spec_of(name)
    kind = plain.get("kind", "modelled")
    try:
        if kind == "scored":
            return _scored(plain, sources, source or Source())
        if source is not None:
            raise BadRequest(f"The world {name} is not made of scores; sd35 is.")
        return _KINDS[kind](plain, sources)
    except (KeyError, TypeError, IndexError) as error:
        raise BadRequest(f"The world {file} is incomplete: {error!r}.") from error


def spec_of(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A world's parameters, and the mark of each. Raises as `load_world`."""
    content = yaml.safe_load(_file(name).read_text())
    sources: dict[str, str] = {}
    return _plain(content, "", sources), sources


def workers_of(name: str) -> list[int]:
    """The default number of workers of each type in a world."""
    return [int(count) for count in yaml.safe_load(_file(name).read_text())["workers"]]


def _file(name: str) -> Path:
    file = FOLDER / f"{name}.yaml" if name in world_names() else Path(name)
    if not file.is_file():
        raise BadRequest(f"There is no world {name!r}: use {', '.join(world_names())}, or a file.")
    return file


def _plain(content: Any, path: str, sources: dict[str, str]) -> Any:
    """The values without their marks; the marks go into `sources`."""
    if not isinstance(content, dict):
        return content
    if "is" in content:
        if content["is"] not in MARKS or not content.get("from"):
            raise BadRequest(
                f"{path} must say whether it `is` one of {', '.join(MARKS)}, and `from` what."
            )
        sources[path] = f"{content['is']}: {content['from']}"
        if "value" in content:
            return content["value"]
        return {key: value for key, value in content.items() if key not in ("is", "from")}
    return {
        key: _plain(value, f"{path}.{key}".lstrip("."), sources) for key, value in content.items()
    }


def _modelled(spec: dict[str, Any], sources: dict[str, str]) -> World:
    """A world from step times and mean qualities, with losses that differ by prompt.

    A prompt's loss at a variant is the variant's mean loss times the prompt's lognormal factor, one
    for all skips and one for each model, scaled so that the means are those given.
    """
    models = list(spec["models"])
    steps = spec["steps"]
    skips, smaller, refine = spec["skips"], spec["smaller"], spec.get("refine")
    variants = [("exact", "exact", models[0], 0, 0.0, 1.0)]
    variants += [
        (f"skip-{k}", "cache", models[0], k, least, mean)
        for k, least, mean in zip(
            skips["k"], skips["least_similarity"], skips["quality"], strict=True
        )
    ]
    variants += [
        (model, "model", model, 0, 0.0, mean)
        for model, mean in zip(smaller["models"], smaller["quality"], strict=True)
    ]
    if refine:
        k, least = refine["k"], refine["least_similarity"]
        variants.append(("refine", "refine", refine["model"], k, least, refine["quality"]))
    names, strategies, of, skip, least, mean = zip(*variants, strict=True)
    table = VariantTable(
        variants=names,
        strategies=strategies,
        model=np.array([models.index(m) for m in of]),
        steps=np.array([float(steps - k) for k in skip]),
        skip=np.array(skip),
        least_similarity=np.array(least),
        mean_quality=np.array(mean),
        **_devices(spec),
    )
    prompts = spec["prompts"]
    rng = np.random.default_rng(0)
    quantiles = np.array(prompts["similarity"])
    similarity = np.interp(
        rng.random(prompts["count"]), np.linspace(0, 1, len(quantiles)), quantiles
    )
    losses = _losses(table, similarity, prompts, rng)
    truth = 1.0 - losses * (1.0 - table.mean_quality)[None, :]
    return _world(spec, table, truth, similarity, sources)


def _devices(spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant table with the times of each model on each type of device."""
    models, batching = spec["models"], spec["batching"]
    batches, gain = np.array(batching["batches"]), np.array(batching["gain"])

    def by_type(name: str) -> Numbers:
        return np.array([model[name] for model in models.values()]).T

    return {
        "models": tuple(models),
        "types": tuple(spec["types"]),
        "batches": batches,
        "step_s": by_type("step_s")[:, :, None] * batches / gain,
        "load_s": by_type("load_s"),
    }


def _losses(
    table: VariantTable, similarity: Numbers, prompts: dict[str, Any], rng: np.random.Generator
) -> Numbers:
    """Factors (p, v) of a variant's mean loss, with a mean of 1."""
    count, spread = len(similarity), prompts["spread"]
    standard = (similarity - similarity.mean()) / similarity.std()
    near = np.exp(-prompts["similarity_effect"] * standard / 3)
    by_source: dict[str, Numbers] = {}
    columns = []
    for v, strategy in enumerate(table.strategies):
        skips = strategy in ("cache", "refine")
        source = strategy if skips else table.models[table.model[v]]
        if source not in by_source:
            own = np.exp(spread * rng.normal(size=count)) * (near if skips else 1.0)
            by_source[source] = own / own.mean()
        columns.append(by_source[source])
    return np.stack(columns, axis=1)


def _world(
    spec: dict[str, Any],
    table: VariantTable,
    truth: Numbers,
    similarity: Numbers,
    sources: dict[str, str],
) -> World:
    truth = truth.copy()
    truth[:, EXACT] = 1.0
    world = World(
        name=spec["name"],
        table=table,
        truth=truth,
        predicted=truth,
        similarity=similarity,
        drawing=Drawing(**spec["cache"]),
        store=Store(**spec["store"]),
        judging_error=spec["discriminator"]["noise"],
        slo=float(spec["slo"]),
        sources=sources,
        capacity_qpm=spec.get("capacity_qpm"),
    )
    return world.with_noise(spec["predictor"]["noise"], seed=1)


def _rated(spec: dict[str, Any], sources: dict[str, str]) -> World:
    """A world from human ratings: two raters give the predictions, the third the truth.

    q = 1 + (r - r_exact) / (mean of r_exact - r of unrelated pictures), whose mean over prompts is
    that of DESIGN's quality, and which does not divide by the rating of one prompt.
    """
    ratings, models = spec["ratings"], list(spec["models"])
    given = pd.read_csv(reference(ratings["file"]))

    def quality(raters: tuple[int, ...]) -> Numbers:
        means = np.stack(
            [given[[f"{ratings['columns'][m]}_{r}" for r in raters]].mean(axis=1) for m in models],
            axis=1,
        )
        exact = means[:, :1]
        result: Numbers = 1 + (means - exact) / (exact.mean() - ratings["unrelated"])
        return result

    heard, unheard = quality((1, 2)), quality((3,))
    count = len(models)
    table = VariantTable(
        variants=("exact", *models[1:]),
        strategies=("exact", *["model"] * (count - 1)),
        model=np.arange(count),
        steps=np.array([float(spec["models"][m]["steps"]) for m in models]),
        skip=np.zeros(count, dtype=np.int64),
        least_similarity=np.zeros(count),
        mean_quality=heard.mean(axis=0),
        **_devices(spec),
    )
    return World(
        name=spec["name"],
        table=table,
        truth=unheard,
        predicted=heard,
        similarity=np.full(len(given), np.nan),
        drawing=Drawing(**spec["cache"]),
        store=Store(**spec["store"]),
        judging_error=spec["discriminator"]["noise"],
        slo=float(spec["slo"]),
        sources=sources,
        judged_apart=True,
    )


def _measured(spec: dict[str, Any], sources: dict[str, str]) -> World:
    """A world from what `argus profile`, `argus calibrate` and `argus train` measured of a family.

    Predictions are by networks not trained on the prompt. The truth is the mean over the measured
    seeds, noise included, which `oracle` then knows as well.
    """
    family = find_family(spec["family"])
    folder = Path(family.folder)
    profile = Profile.read(folder / "profile.json")
    names = list(family.variants)
    rows = table.judged(table.read(folder / "quality.parquet"))
    prompts, quality, _ = table.by_prompt(rows, names)
    similarity = table.similarities(rows)
    held_out = pd.read_parquet(folder / spec["predictor"])
    predicted = held_out.pivot_table(index="prompt", columns="variant", values="mean")
    truth = quality.mean(axis=2)
    variants = replace(
        variant_table(family, [DeviceType.of(profile)]), mean_quality=np.nanmean(truth, axis=0)
    )
    kinds = len(spec["types"])
    return World(
        name=spec["name"],
        table=replace(
            variants,
            types=tuple(spec["types"]),
            step_s=np.repeat(variants.step_s, kinds, axis=0),
            load_s=np.repeat(variants.load_s, kinds, axis=0),
        ),
        truth=truth,
        predicted=predicted.reindex(index=prompts, columns=names).to_numpy(float),
        similarity=similarity.astype(float),
        drawing=Drawing(**spec["cache"]),
        store=Store(**spec["store"]),
        judging_error=spec["discriminator"]["noise"],
        slo=float(spec["slo"]),
        sources=sources,
    )


def _scored(spec: dict[str, Any], sources: dict[str, str], source: Source) -> World:
    """A world from a table of scores: the user's, or public data."""
    given = spec["scores"]
    file = source.file
    if file is None:
        try:
            file = reference(given["file"])
        except BadRequest as error:
            raise BadRequest(f"{error} Or give the file as --scores. {given['get']}") from None
    return read_world(spec, source, file, sources)


def reference(name: str) -> Path:
    """A file of public data that is not part of the project."""
    folders = [Path(os.environ.get("ARGUS_REFERENCE", ".")), Path("../shared/data")]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise BadRequest(f"This world needs {name}: set ARGUS_REFERENCE to the folder it is in.")


_KINDS: dict[str, Callable[[dict[str, Any], dict[str, str]], World]] = {
    "modelled": _modelled,
    "rated": _rated,
    "measured": _measured,
}
