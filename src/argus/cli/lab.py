"""`argus profile`, `calibrate` and `train`: the cost and the quality of variants."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from argus.cli.consoles import err, out
from argus.config import Upstream, read_settings, without_passwords
from argus.core.errors import BadRequest
from argus.core.family import EXACT, Family
from argus.families.catalog import find_family
from argus.files import written_aside

FamilyName = Annotated[str, typer.Argument(help="A family's name, or the path of its YAML file.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")]
Gateway = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML file of settings: measure through its upstreams, or workers."
    ),
]
SCORED_EPOCHS = 60  # of networks that give only the bounds
Precision = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]


def profile(
    family: FamilyName,
    output: Annotated[Path, typer.Option("--out", "-o", help="The JSON to write.")] = Path(
        "profile.json"
    ),
    batches: Annotated[str, typer.Option(help="Batch sizes to measure.")] = "1,2,4,8,16,32",
    repeats: Annotated[int, typer.Option(help="Repeats; the median is kept.", min=1)] = 9,
    rounds: Annotated[
        int, typer.Option(help="Rounds over all models; each figure's least is kept.", min=1)
    ] = 2,
    workers: Annotated[
        int, typer.Option(help="Processes that share the CPU, as a server's workers do.", min=1)
    ] = 1,
    device: Device = None,
    dtype: Precision = None,
    config: Gateway = None,
    worker_type: Annotated[
        str | None,
        typer.Option(help="Measure on a node of the Ray cluster that has workers of this type."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster: auto or HOST:PORT.")
    ] = None,
) -> None:
    """Measure seconds per step, encoding, decoding and loading of a family's models here, or on a
    node of a Ray cluster; or, of those that upstreams hold, by the number of requests in flight."""
    chosen = find_family(family)
    sizes = _sizes(batches)
    _check_folder(output)
    servers = {} if worker_type else _servers(chosen, config)
    from argus.engine.sources import settled
    from argus.lab import profiling

    with err.status("") as status:
        if worker_type is not None:
            from argus.server.cluster import open_cluster

            settings, _ = read_settings({"workers": "ray", "ray_address": ray_address}, config)
            status.update(f"Measuring on a worker of the type {worker_type} …")
            cluster = open_cluster(settings)
            assert cluster is not None  # workers are on Ray
            measured = profiling.profile_on(
                cluster, worker_type, chosen, dtype, sizes, repeats, rounds
            )
            cluster.close()
        elif servers:
            from argus.lab.gateway import profile_upstreams

            measured = profile_upstreams(
                chosen, servers, sizes, repeats,
                lambda name: status.update(f"Measuring {name} at {servers[name][0].url} …"),
            )  # fmt: skip
        else:
            device, dtype = settled(device, dtype)
            measured = profiling.profile(
                chosen, device, dtype, sizes, repeats, workers,
                lambda name: status.update(f"Measuring {name} on {device} …"), rounds,
            )  # fmt: skip
    with written_aside(output) as aside:
        aside.write_text(json.dumps(measured.to_json(), indent=1) + "\n")
    table = Table("model", *(f"ms/step at {b}" for b in sizes), "encode", "decode", "load", "peak")
    for name, model in measured.models.items():
        table.add_row(
            name,
            *(f"{1000 * model.step_s[b]:.1f}" if b in model.step_s else "-" for b in sizes),
            f"{1000 * model.encode_s:.1f} ms",
            f"{1000 * model.batch_decode_s(1):.1f} ms",
            f"{model.load_s['disk']:.2f} s" if model.peak_bytes else "-",
            f"{model.peak_bytes / 1e9:.2f} GB" if model.peak_bytes else "-",
        )
    out.print(table, highlight=False)
    err.print(f"Wrote {output}", highlight=False)


def calibrate(
    family: FamilyName,
    prompts: Annotated[
        str, typer.Option(help="File of prompts, one a line, or a number of the family's own.")
    ],
    output: Annotated[Path, typer.Option("--out", "-o", help="The table to write.")] = Path(
        "quality.parquet"
    ),
    seeds: Annotated[
        int, typer.Option(help="Pictures of each prompt and variant (but --single).", min=1)
    ] = 2,
    single: Annotated[
        int,
        typer.Option(
            help="The last so many of the prompts get one picture of each variant only: enough to "
            "learn from, while what decisions are worth is judged on the others.",
            min=0,
        ),
    ] = 0,
    donors: Annotated[
        str | None,
        typer.Option(help="Cached prompts, given as --prompts. Default: half as many, own."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Which of the scorer's scores quality is made of, if it has several (as `right` "
            "and `parts`); the table keeps all, and `argus train` goes by the family's. Default: "
            "as the family says."
        ),
    ] = None,
    device: Device = None,
    dtype: Precision = None,
    config: Gateway = None,
) -> None:
    """Measure the quality of every variant's pictures, for many prompts.

    Run again with the same options, it resumes where it was stopped.
    """
    chosen = find_family(family)
    if score is not None and chosen.scorer is not None:
        chosen = replace(chosen, scorer=replace(chosen.scorer, score=score))
    _check_folder(output)
    servers = _servers(chosen, config)
    from argus.engine.sources import settled
    from argus.lab.calibration import Calibration
    from argus.lab.calibration import calibrate as measure
    from argus.lab.prompts import split_prompts

    device, dtype = settled(device, dtype)
    asked, others = split_prompts(chosen, prompts, donors)
    columns = (
        TextColumn("Denoising"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("", total=None)
        table = measure(
            Calibration(chosen, tuple(asked), tuple(others), seeds, device, dtype, servers, single),
            output,
            lambda done, of: bar.update(task, completed=done, total=of),
        )
    s0, best = table["s0"].iloc[0], table[table["variant"] == EXACT]["score"].mean()
    shown = Table("variant", "quality", "raw ratio", "score", "ms a picture", "rows")
    shown.caption = f"of mean scores; unrelated pictures score {s0:.3f}"
    for name in chosen.variants:
        rows = table[table["variant"] == name]
        scored = rows["score"].mean()
        shown.add_row(
            name,
            f"{(scored - s0) / (best - s0):.3f}",
            f"{scored / best:.3f}",
            f"{scored:.3f}",
            f"{1000 * rows['seconds'].mean():.0f}",
            f"{len(rows):,}",
        )
    out.print(shown, highlight=False)
    err.print(f"Wrote {output}", highlight=False)


def train(
    family: Annotated[
        str | None,
        typer.Argument(help="A family's name or YAML file; none for a table of scores."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            help="What `argus calibrate` wrote. Default: the family's own. Without a family: "
            "scores of your own models, parquet or CSV, with columns prompt, seed and one for each "
            "variant."
        ),
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(
            help="With a table of scores: words, or the folder or hub id of a sentence encoder."
        ),
    ] = "words",
    exact: Annotated[
        str | None,
        typer.Option(help="With a table of scores: the best variant. Default: of the best mean."),
    ] = None,
    unrelated: Annotated[
        float | None,
        typer.Option(
            help="With a table of scores: the mean score of pictures of other prompts, quality 0. "
            "Default: what 1 % of the best variant's pictures score less than."
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="What `argus profile` wrote. Default: the family's own.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--out", "-o", help="The folder to write the predictor in.")
    ] = Path("predictor"),
    seed: Annotated[int, typer.Option(help="Seed of weights and folds.")] = 0,
    from_catalogue: Annotated[
        str | None,
        typer.Option(
            envvar="ARGUS_FROM_CATALOGUE",
            help="A server's data folder, or its catalogue's URL: retrain with the samples that it "
            "measured. Give a URL with a password in the environment.",
        ),
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option(help="With --from-catalogue: the old predictor. Default: the family's."),
    ] = None,
) -> None:
    """Train the predictor of every variant's quality, and report its errors on held-out prompts.

    With --table alone it is trained on scores of any models, for `argus simulate --table`.
    With --from-catalogue it is written only if it is better on samples that it was not trained on;
    the exit status is 6 if it is not.
    """
    if family is None:
        if table is None:
            raise BadRequest("Name a family, or give a table of scores with --table.")
        _train_on_scores(table, encoder, exact, unrelated, output, seed)
        return
    chosen = find_family(family)
    if from_catalogue is not None:
        _train_anew(chosen, from_catalogue, table, predictor, output, seed)
        return
    import numpy as np

    from argus.core.profile import Profile
    from argus.engine.sources import encoder_folder, family_fingerprint
    from argus.lab import held_out, training
    from argus.quality.encoder import PromptEncoder
    from argus.quality.table import read

    rows = read(table or Path(chosen.folder) / "quality.parquet")
    costs = held_out.costs_of(chosen, Profile.read(profile or Path(chosen.folder) / "profile.json"))
    reader = PromptEncoder.load(encoder_folder(chosen.encoder_source))
    with err.status("Embedding prompts …") as status:
        data = training.examples(rows, chosen, reader)
        trained = training.train(
            data, family_fingerprint(chosen), seed,
            on_epoch=lambda done, of: status.update(f"Training: epoch {done} of {of} …"),
        )  # fmt: skip
        status.update("Evaluating held-out prompts …")
        errors = held_out.errors(data, trained)
        regrets = held_out.regret(data, trained.mean, np.array(list(costs.values())))
    shown = Table("variant", "of exact's cost", "mean quality", "error", "rank", "above bound")
    for v, (name, one) in enumerate(errors.items(), start=1):
        shown.add_row(
            name, f"{costs[name] / costs[EXACT]:.2f}", f"{np.nanmean(data.quality[:, v]):.3f}",
            f"{one.error:.3f}", f"{one.rank:.2f}", f"{one.covered:.1%}",
        )  # fmt: skip
    shown.caption = f"{len(data.prompts):,} prompts, each held out of the network that predicts it"
    out.print(shown, highlight=False)
    decided = Table("load", "blind", "predicted", "truth of other seeds", "recovered")
    for at in regrets:
        decided.add_row(
            f"{at.load:g}x", f"{at.blind:.3f}", f"{at.predicted:.3f}", f"{at.truth:.3f}",
            "-" if np.isnan(at.recovered) else f"{at.recovered:.0%}",
        )  # fmt: skip
    decided.caption = "mean quality of the best mix, measured on pictures that did not choose it"
    if regrets:
        out.print(decided, highlight=False)
    else:
        err.print("What decisions are worth needs two seeds: calibrate with --seeds 2.")
    trained.predictor.weights["scores"] = training.scores_of(training.by_own_score(rows, chosen))
    output.mkdir(parents=True, exist_ok=True)
    held_out.write(data, trained, output / "held_out.parquet")
    trained.predictor.save(
        output,
        {
            "family": chosen.name,
            "prompts": len(data.prompts),
            "errors": {name: asdict(one) for name, one in errors.items()},
            "regret": [asdict(at) for at in regrets],
        },
    )
    err.print(f"Wrote {output}", highlight=False)


def _train_on_scores(
    table: Path, source: str, exact: str | None, unrelated: float | None, output: Path, seed: int
) -> None:
    import hashlib

    import numpy as np

    from argus.lab import held_out, training
    from argus.quality.scores import read_scores
    from argus.quality.sentences import WordEncoder, load_encoder

    scores = read_scores(table, exact)
    encoder = load_encoder(source, scores.prompts)
    unit = scores.unit(unrelated)
    quality = scores.quality(unit)
    made_for = hashlib.sha256(json.dumps([scores.variants, source]).encode()).hexdigest()[:16]
    with err.status("Embedding prompts …") as status:
        data = training.scored(scores, quality, encoder)
        trained = training.train(
            data, made_for, seed, SCORED_EPOCHS,
            on_epoch=lambda done, of: status.update(f"Training: epoch {done} of {of} …"),
            kernel=True,
        )  # fmt: skip
        errors = held_out.errors(data, trained)
    shown = Table("variant", "mean quality", "error", "rank", "above bound", "correlation")
    for v, (name, one) in enumerate(errors.items(), start=1):
        truth = np.nanmean(quality[:, v], axis=1)
        told_apart = np.ptp(trained.mean[:, v]) > 0 and np.ptp(truth) > 0
        found = np.corrcoef(trained.mean[:, v], truth)[0, 1] if told_apart else 0.0
        shown.add_row(
            name, f"{np.nanmean(truth):.3f}", f"{one.error:.3f}", f"{one.rank:.2f}",
            f"{one.covered:.1%}", f"{found:.2f}",
        )  # fmt: skip
    shown.caption = (
        f"{len(data.prompts):,} prompts, each predicted by a network that never saw it; the best "
        f"variant, of quality 1, is {scores.variants[0]}"
    )
    out.print(shown, highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    held_out.write(data, trained, output / "held_out.parquet")
    if isinstance(encoder, WordEncoder):
        encoder.save(output)
    trained.predictor.weights["scores"] = np.array([scores.zero(unrelated), unit], np.float32)
    trained.predictor.save(
        output,
        {
            "encoder": source,
            "prompts": len(data.prompts),
            "errors": {name: asdict(one) for name, one in errors.items()},
        },
    )
    err.print(f"Wrote {output}", highlight=False)


def _train_anew(
    chosen: Family, source: str, table: Path | None, folder: Path | None, output: Path, seed: int
) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    from argus.engine.sources import encoder_folder, family_fingerprint
    from argus.lab import retraining, training
    from argus.quality.encoder import PromptEncoder
    from argus.quality.predictor import Predictor
    from argus.quality.table import read
    from argus.server.samples import Samples

    made_for = family_fingerprint(chosen)
    old = Predictor.load(folder or Path(chosen.folder) / "predictor", made_for)
    url = source if "://" in source else f"sqlite:///{Path(source).absolute() / 'catalogue.db'}"
    try:
        samples = Samples(url).read(made_for)
    except SQLAlchemyError as error:
        where = without_passwords(source)
        raise BadRequest(f"The samples of {where} cannot be read: {error}") from error
    encoder = PromptEncoder.load(encoder_folder(chosen.encoder_source))
    known = table or Path(chosen.folder) / "quality.parquet"
    with err.status("Embedding prompts …") as status:
        rows = training.examples(read(known), chosen, encoder) if known.is_file() else None
        found = retraining.retrain(
            samples, chosen, encoder, old, rows, seed,
            on_epoch=lambda done, of: status.update(f"Training: epoch {done} of {of} …"),
        )  # fmt: skip
    out.print(
        f"{len(samples)} samples; mean error on {found.judged_on} that it was not trained on: "
        f"{found.new_error:.3f}, before {found.old_error:.3f}",
        highlight=False,
    )
    if not found.better:
        err.print("The new predictor is not better: nothing is written.")
        raise typer.Exit(retraining.NO_BETTER)
    facts = {"family": chosen.name, "samples": len(samples), "error": found.new_error}
    found.predictor.save(output, facts)
    err.print(f"Wrote {output}", highlight=False)


def _servers(family: Family, config: Path | None) -> dict[str, list[Upstream]]:
    """The upstreams of a configuration file, by the model that they hold."""
    if config is None:
        return {}
    settings, _ = read_settings({}, config)
    from argus.server.upstreams import groups_of

    servers: dict[str, list[Upstream]] = {}
    for group in groups_of(settings, family):
        servers.setdefault(group.model, []).extend(group.upstreams)
    if not servers:
        raise BadRequest(f"{config} has no upstreams; leave --config out to measure here.")
    return servers


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise BadRequest(f"batches is {text!r}; give positive numbers separated by commas.")
    return tuple(sorted({int(part) for part in parts}))


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"There is no folder {path.absolute().parent} to write {path.name} in.")
