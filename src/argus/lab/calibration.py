"""`argus calibrate`: makes and scores every variant's pictures of every prompt, under some seeds.

Work is split into parts: all variants of one model for a few prompts. A part is written whole when
it is done, so that a killed run loses at most one part and repeats none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from torch import Tensor

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.catalogue import Catalogue
from argus.cache.latents import LatentStore
from argus.cache.scope import Scope
from argus.config import Upstream
from argus.core.errors import BadRequest, ModelError
from argus.core.family import EXACT, Family, ScorerSpec, Variant
from argus.engine.engine import Engine, Result
from argus.engine.sources import fingerprint, model_folder, weights_of
from argus.lab.gateway import Gateway
from argus.lab.painting import Commission, paint
from argus.quality import table
from argus.quality.encoder import PromptEncoder
from argus.quality.scorer import Scorer, Scores, all_scores
from argus.quality.scorers import load_scorer
from argus.workers.worker import Finished

CHUNK = 16
FARTHEST = 256
DONOR_SEED = 1_000_000
NO_LIMIT = 2**62

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What is measured: `prompts` under `seeds` seeds each, the last `single` of them under one;
    `donors` are the prompts whose latents the cache holds. `upstreams` are the servers that make
    the pictures of the models they hold."""

    family: Family
    prompts: tuple[str, ...]
    donors: tuple[str, ...]
    seeds: int
    device: str
    dtype: str
    upstreams: Mapping[str, Sequence[Upstream]] = field(default_factory=dict)
    single: int = 0

    @cached_property
    def several(self) -> frozenset[str]:
        """The prompts with all seeds."""
        return frozenset(self.prompts[: len(self.prompts) - self.single])

    def seeds_of(self, prompt: str) -> range:
        """The seeds of a prompt's pictures."""
        return range(self.seeds if prompt in self.several else 1)

    @cached_property
    def parts(self) -> list[tuple[str, int]]:
        """Every part as a model and the index of its first prompt; the exact model's come first."""
        models = dict.fromkeys(variant.model for variant in self.family.variants.values())
        begins = range(0, len(self.prompts), CHUNK)
        return [(model, begin) for model in models for begin in begins]

    @cached_property
    def identity(self) -> str:
        """A hash that differs for other prompts, variants, weights or seeds."""
        family = self.family
        scorer = family.scorer
        facts: dict[str, Any] = {
            "chunk": CHUNK,
            "variants": {name: variant.facts for name, variant in family.variants.items()},
            "weights": {m: weights_of(s) for m, s in family.models.items()},
            "scorer": None if scorer is None else [asdict(scorer), _fingerprint(scorer)],
            "prompts": self.prompts,
            "donors": self.donors,
            "seeds": self.seeds,
            "dtype": self.dtype,
        }
        if self.single:
            facts["single"] = self.single
        if self.upstreams:
            facts["upstreams"] = {
                model: sorted({str(one.served_model) for one in servers})
                for model, servers in self.upstreams.items()
            }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def calibrate(
    asked: Calibration, out: Path, on_progress: OnProgress = lambda done, of: None
) -> pd.DataFrame:
    """Measure, and write the table to `out`; an earlier run that was stopped is continued.

    Until it is done, parts and the cache of donors are in `out`.parts. `on_progress` is called with
    the denoising steps that are done and their total. Raises BadRequest if `out`.parts holds
    another measurement, and what loading models and scorers raises.
    """
    if asked.family.scorer is None:
        raise BadRequest(f"The family {asked.family.name} names no scorer; add one to its file.")
    if asked.seeds < 1:
        raise BadRequest("Calibration needs at least one seed.")
    if len(asked.prompts) < 2:
        raise BadRequest("Calibration needs at least two prompts: s₀ is of unrelated ones.")
    if asked.single and (asked.seeds == 1 or len(asked.prompts) - asked.single < 2):
        raise BadRequest(
            f"With --single {asked.single} of {len(asked.prompts)} prompts and --seeds "
            f"{asked.seeds} nothing is left to judge decisions by: at least two prompts must get "
            "two seeds or more."
        )
    work = out.with_name(f"{out.name}.parts")
    _claim(work, asked.identity)
    progress = _Progress(asked, on_progress)
    scorer = load_scorer(asked.family.scorer, asked.device)
    files = []
    bench: _Bench | None = None
    for model, begin in asked.parts:
        file = work / f"{model}-{begin:06d}.parquet"
        files.append(file)
        prompts = asked.prompts[begin : begin + CHUNK]
        if file.exists():
            progress.skip(model, prompts)
            continue
        if bench is None or bench.model != model:
            if bench is not None:
                bench.close()
                bench = None  # frees its memory for the next model
            bench = _Bench(asked, model, scorer, work, progress)
        table.write(bench.part(prompts), file)
    if bench is not None:
        bench.close()
    progress.finish()
    result = table.finish(pd.concat([pd.read_parquet(file) for file in files], ignore_index=True))
    table.write(result, out)
    shutil.rmtree(work)
    return result


def _fingerprint(spec: ScorerSpec) -> str:
    """A hash of the scorer's weights or, for a class, of the files in its package's folder; for a
    class in a module outside packages, of the Python files beside it, since that folder may hold
    much else.

    Raises ModelError if the class is missing.
    """
    if ":" not in spec.kind:
        folder = Path(spec.source or ".").expanduser()
        return fingerprint(folder) if folder.is_dir() else str(spec.source)
    try:
        found = importlib.util.find_spec(spec.kind.split(":")[0])
    except ImportError:
        found = None
    if found is None or found.origin is None:
        raise ModelError(f"The scorer {spec.kind} cannot be imported.")
    digest = hashlib.sha256()
    for path in sorted(Path(found.origin).parent.glob("*.*" if found.parent else "*.py")):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _claim(work: Path, identity: str) -> None:
    """Make the folder of parts, or check that it belongs to this measurement."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work / "identity"
    if not mark.exists():
        aside = work / "identity.new"
        aside.write_text(identity)
        os.replace(aside, mark)
    if mark.read_text() != identity:
        raise BadRequest(
            f"{work} holds parts of another measurement (other prompts, variants, weights or "
            "seeds). Remove it, or name another --out."
        )


class _Progress:
    """Counts denoising steps, which take nearly all the time."""

    def __init__(self, asked: Calibration, tell: OnProgress) -> None:
        self._asked, self._tell = asked, tell
        self._of_model: dict[str, int] = {}
        for variant in asked.family.variants.values():
            steps = variant.steps - variant.skip
            self._of_model[variant.model] = self._of_model.get(variant.model, 0) + steps
        self._total = self._pictures(asked.prompts) * sum(self._of_model.values())
        self._total += len(asked.donors) * asked.seeds * asked.family.exact.steps
        self._done = 0

    def fewer(self, steps: int) -> None:
        """So many of the steps need not be done."""
        self._total -= steps

    def skip(self, model: str, prompts: Sequence[str]) -> None:
        self.add(self._pictures(prompts) * self._of_model[model])

    def _pictures(self, prompts: Sequence[str]) -> int:
        """How many pictures each variant makes of the prompts."""
        return sum(len(self._asked.seeds_of(prompt)) for prompt in prompts)

    def add(self, steps: int) -> None:
        self._done += steps
        self._tell(self._done, self._total)

    def finish(self) -> None:
        self._tell(self._total, self._total)


class _Bench:
    """One loaded model that measures its variants."""

    def __init__(
        self, asked: Calibration, model: str, scorer: Scorer, work: Path, progress: _Progress
    ) -> None:
        self.model = model
        self._asked, self._scorer, self._progress = asked, scorer, progress
        family = asked.family
        self._source = family.models[model]
        held = asked.upstreams.get(model)
        self._gateway = None if held is None else Gateway(held)
        self._variants = {n: v for n, v in family.variants.items() if v.model == model}
        self._engines: dict[str, Engine] = {}
        self._donors = None
        if any(variant.skip for variant in self._variants.values()):
            self._donors = _Donors(asked, work, self._engine(family.exact.sampler), progress)

    def close(self) -> None:
        if self._donors is not None:
            self._donors.close()
        if self._gateway is not None:
            self._gateway.close()

    def _engine(self, sampler: str) -> Engine:
        if sampler not in self._engines:
            self._engines[sampler] = Engine.load(
                str(model_folder(self._source)), self._asked.device, self._asked.dtype, sampler
            )
        return self._engines[sampler]

    def part(self, prompts: Sequence[str]) -> pd.DataFrame:
        """Measure every variant of this model for some prompts: rows as in `table.MEASURED`."""
        rows: list[dict[str, object]] = []
        neighbours = {
            prompt: self._donors.neighbour(prompt) if self._donors else None for prompt in prompts
        }
        for name, variant in self._variants.items():
            commissions = list(self._commissions(variant, neighbours))
            painted = self._painted(variant, commissions)
            begun = time.perf_counter()
            pictures: dict[tuple[str, int], Image.Image] = {}
            for one, result in painted:
                pictures[one.of] = result.image
                self._progress.add(one.job.steps_run)
            seconds = (time.perf_counter() - begun) / max(1, len(pictures))
            rows += self._rows(name, variant, pictures, neighbours, seconds)
        return pd.DataFrame(rows, columns=None if rows else list(table.MEASURED))

    def _painted(
        self, variant: Variant, commissions: Sequence[Commission[tuple[str, int]]]
    ) -> Iterator[tuple[Commission[tuple[str, int]], Result | Finished]]:
        if self._gateway is not None:
            return self._gateway.paint(commissions)
        return paint(self._engine(variant.sampler), commissions)

    def _commissions(
        self, variant: Variant, neighbours: dict[str, Neighbour | None]
    ) -> Iterator[Commission[tuple[str, int]]]:
        asked = [(prompt, seed) for prompt in neighbours for seed in self._asked.seeds_of(prompt)]
        for prompt, seed in asked:
            start: Tensor | None = None
            if variant.skip:
                neighbour = neighbours[prompt]
                if neighbour is None or self._donors is None:
                    continue
                start = self._donors.latents(neighbour.prompt, seed, variant.skip)
            yield Commission((prompt, seed), variant.job(prompt, seed), start)

    def _rows(
        self,
        name: str,
        variant: Variant,
        pictures: dict[tuple[str, int], Image.Image],
        neighbours: dict[str, Neighbour | None],
        seconds: float,
    ) -> list[dict[str, object]]:
        keys, images = list(pictures), list(pictures.values())
        prompts = [prompt for prompt, _ in keys]
        scores = all_scores(self._scorer, prompts, images)
        chosen = next(iter(scores))
        unrelated = {}
        if name == EXACT:
            others = _others(prompts, self._asked.prompts)
            unrelated = all_scores(self._scorer, others, images)
        rows: list[dict[str, object]] = []
        for i, (prompt, seed) in enumerate(keys):
            neighbour = neighbours[prompt] if variant.skip else None
            rows.append(
                {
                    "prompt": prompt,
                    "variant": name,
                    "seed": seed,
                    "similarity": None if neighbour is None else neighbour.similarity,
                    "neighbour": None if neighbour is None else neighbour.prompt,
                    "score": float(scores[chosen][i]),
                    "unrelated": float(unrelated[chosen][i]) if unrelated else None,
                    "seconds": seconds,
                }
                | _by_name(scores, unrelated, i)
            )
        return rows


def _others(prompts: Sequence[str], all_prompts: Sequence[str]) -> list[str]:
    """For every prompt one that is far from it in the list of all prompts."""
    at = {prompt: i for i, prompt in enumerate(all_prompts)}
    far = max(1, len(all_prompts) // 2)
    return [all_prompts[(at[prompt] + far) % len(all_prompts)] for prompt in prompts]


def _by_name(scores: dict[str, Scores], unrelated: dict[str, Scores], i: int) -> dict[str, object]:
    """Picture i's scores of a scorer that has several."""
    if len(scores) == 1:
        return {}
    own: dict[str, object] = {name: float(values[i]) for name, values in scores.items()}
    return own | {
        f"unrelated {name}": float(unrelated[name][i]) if unrelated else None for name in scores
    }


class _Donors:
    """A cache of other prompts' latents, filled once for every seed that needs them: a sampler
    without noise of its own gives the same picture whenever it resumes from the same latents."""

    def __init__(self, asked: Calibration, work: Path, engine: Engine, progress: _Progress) -> None:
        folder = work / "donors"
        folder.mkdir(exist_ok=True)
        catalogue = Catalogue(f"sqlite:///{folder.absolute() / 'catalogue.db'}")
        store = LatentStore(str(folder.absolute() / "latents"), catalogue.id)
        self._cache = ApproximateCache(catalogue, store, NO_LIMIT)
        exact = asked.family.exact
        source = model_folder(asked.family.models[exact.model])
        self._encoder = PromptEncoder.load(source)
        self._scopes = [
            Scope(
                f"seed {seed}", fingerprint(source), exact.sampler, exact.width, exact.height,
                exact.steps, exact.guidance, "",
            )
            for seed in range(asked.seeds)
        ]  # fmt: skip
        self._fill(asked, engine, progress)

    def close(self) -> None:
        self._cache.close()

    def _fill(self, asked: Calibration, engine: Engine, progress: _Progress) -> None:
        """Run those donors that the cache does not hold yet: under the first seed all of them,
        under the others those that are neighbours of prompts with several."""
        self._run(asked, engine, progress, 0, asked.donors)
        if asked.seeds == 1:
            return
        near = {self._neighbour_of(prompt) for prompt in asked.several}
        others = [donor for donor in asked.donors if donor in near]
        needless = len(asked.donors) - len(others)
        progress.fewer(needless * (asked.seeds - 1) * asked.family.exact.steps)
        for seed in range(1, asked.seeds):
            self._run(asked, engine, progress, seed, others)

    def _neighbour_of(self, prompt: str) -> str | None:
        found = self.neighbour(prompt)
        return None if found is None else found.prompt

    def _run(
        self,
        asked: Calibration,
        engine: Engine,
        progress: _Progress,
        seed: int,
        donors: Sequence[str],
    ) -> None:
        exact, scope = asked.family.exact, self._scopes[seed]
        number = {donor: i for i, donor in enumerate(asked.donors)}
        lacking = []
        for prompt in donors:
            if self._cache.stored(scope, prompt) is None:
                job = exact.job(prompt, DONOR_SEED * (1 + seed) + number[prompt])
                lacking.append(Commission(prompt, job, keep=tuple(asked.family.skips)))
            else:
                progress.add(exact.steps)
        for one, result in paint(engine, lacking):
            self._cache.keep(scope, one.of, self._encoder.embed(one.of).vector, result.kept)
            progress.add(exact.steps)

    def neighbour(self, prompt: str) -> Neighbour | None:
        """One of the nearest cached prompts. Its rank is drawn log-uniformly, as if the cache held
        more or less, so that all similarities are measured."""
        found = self._cache.find(self._scopes[0], self._encoder.embed(prompt).vector, FARTHEST)
        if not found:
            return None
        draw = random.Random(f"neighbour {prompt}").random()
        rank = int(math.exp(draw * math.log(len(found) + 1)))
        return found[rank - 1]

    def latents(self, donor: str, seed: int, k: int) -> Tensor:
        """The latents of a donor's run under a seed, after K steps."""
        entry = self._cache.stored(self._scopes[seed], donor)
        latents = None
        if entry is not None:
            latents = self._cache.fetch(Neighbour(entry.id, donor, 1.0, entry.skips), k)
        if latents is None:
            raise BadRequest(
                f"The donors' latents of {donor!r} at K={k} are gone or broken: remove the folder "
                "of parts and calibrate again."
            )
        return latents
