"""Measures what served pictures were worth, notices when predictions drift, and trains anew."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from argus.config import Settings
from argus.control.menu import EXACT
from argus.core.errors import ModelError
from argus.core.family import EXACT as EXACT_NAME
from argus.lab.retraining import FEWEST_SAMPLES, NO_BETTER, SOURCE
from argus.quality.drift import Drift
from argus.quality.predictor import Predictor
from argus.server.foresight import Foresight
from argus.server.metrics import Metrics
from argus.server.model import PREDICTOR, ServedFamily
from argus.server.order import Order, Served
from argus.server.samples import Sample, Samples
from argus.server.storage import catalogue_url
from argus.workers.fleet import Fleet, Work

if TYPE_CHECKING:
    from argus.quality.encoder import Embedding
    from argus.quality.scorer import Scorer

log = logging.getLogger(__name__)

MOST_WAITING = 64
LOOK_S = 0.25
PATIENCE_S = 60.0
TEST_EVERY = 20  # prompts
NEW_SAMPLES = FEWEST_SAMPLES  # since the last training, before there is another
COMMAND = (sys.executable, "-c", "from argus.cli.main import main; main()")


@dataclass(frozen=True)
class _Waiting:
    order: Order
    served: Served


class Judge:
    """What pictures score, by the family's scorer, which is loaded when it is first needed."""

    def __init__(self, model: ServedFamily) -> None:
        self._spec = model.family.scorer
        self._scorer: Scorer | None = None
        self._thread = ThreadPoolExecutor(1, "judge")

    @property
    def able(self) -> bool:
        return self._spec is not None

    async def scores(self, prompt: str, images: list[Image.Image]) -> list[float]:
        """Raises ModelError if the scorer cannot be loaded."""
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._score, prompt, images)
        return await work

    def _score(self, prompt: str, images: list[Image.Image]) -> list[float]:
        if self._scorer is None:
            from argus.quality.scorers import load_scorer  # may take seconds to import

            if self._spec is None:
                raise ModelError("The family names no scorer.")
            self._scorer = load_scorer(self._spec)
        found: list[float] = self._scorer.score([prompt] * len(images), images).tolist()
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Learning:
    """Takes a share of the approximate pictures that were served; while workers idle, has each
    made again exactly, scores both and keeps the sample. For use from one asyncio loop."""

    def __init__(
        self,
        settings: Settings,
        model: ServedFamily,
        fleet: Fleet,
        foresight: Foresight,
        judge: Judge,
        metrics: Metrics,
    ) -> None:
        self._settings, self._model, self._fleet = settings, model, fleet
        self._foresight, self._judge, self._metrics = foresight, judge, metrics
        self._waiting: deque[_Waiting] = deque(maxlen=MOST_WAITING)
        self._since_training = self._served = 0
        self._alarmed: set[str] = set()
        self._training: asyncio.Task[None] | None = None
        self._url = catalogue_url(settings)
        self._samples: Samples | None = None
        self._in_force = model.predictor_folder
        self.drift = _drift_of(foresight.predictor)

    def served(self, order: Order, embedding: Embedding, made: Served) -> None:
        """A picture was made."""
        predictor = self._foresight.predictor
        if predictor is None:
            return
        self.drift.saw_prompt(embedding.vector)
        self._served += 1
        if self._served % TEST_EVERY == 0:
            self._alarm("prompts", self.drift.prompts)
        exact = self._model.family.exact
        usual = (order.width, order.height) == (exact.width, exact.height)
        if (
            made.variant != EXACT_NAME
            and usual
            and order.cached  # else its prompt is not to be kept
            and order.steps is None
            and not order.own_guidance
            and not order.negative_prompt
            and self._judge.able
            and "scores" in predictor.weights
            and random.random() < self._settings.truth_share
        ):
            self._waiting.append(_Waiting(order, made))

    async def run(self) -> None:
        """Measure while workers idle, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._waiting or not self._fleet.idle:
                continue
            try:
                await self.measure(self._waiting.popleft())
            except Exception as error:  # its message may quote the prompt
                log.warning("A served picture could not be measured (%s)", type(error).__name__)

    async def measure(self, one: _Waiting) -> Sample | None:
        """Make a served picture's exact twin and compare them; None if nobody can make it now."""
        menu, exact = self._model.menu, self._model.family.exact
        cluster = self._fleet.cluster()
        model = int(menu.model[EXACT])
        if model not in cluster.models:
            return None
        worker = cluster.models.index(model)
        job = replace(exact.job(one.order.prompt, one.served.seed))
        late_s = time.monotonic() + PATIENCE_S
        twin = await self._fleet.run(
            Work(job, float(menu.steps[EXACT]), late_s, late_s), worker, model
        )
        score, s_exact = await self._judge.scores(one.order.prompt, [one.served.image, twin.image])
        predictor = self._foresight.predictor
        if predictor is None:
            return None
        sample = Sample(
            one.order.namespace,
            one.order.prompt,
            one.served.variant,
            one.served.seed,
            one.served.similarity,
            score,
            s_exact,
            predictor.quality_of(score, s_exact),
            one.served.quality,
            one.served.low,
            predictor.made_for,
            time.time(),
        )
        await asyncio.to_thread(self._keep, sample)
        self._saw(sample, one.served.foretold_by == self._foresight.number)
        return sample

    def _keep(self, sample: Sample) -> None:
        if self._samples is None:
            self._samples = Samples(self._url)
        self._samples.add(sample)

    def _saw(self, sample: Sample, current: bool) -> None:
        """A sample, and whether the predictor in force foretold it."""
        self._since_training += 1
        self._metrics.measured.labels(sample.variant).observe(sample.quality)
        if sample.predicted is not None:
            self._metrics.quality_error.observe(sample.quality - sample.predicted)
            if current:
                self.drift.saw_error(sample.quality - sample.predicted)
        drifted = self.drift.errors
        self._alarm("errors", drifted)
        if drifted and self._settings.retrain and self._since_training >= NEW_SAMPLES:
            self.retrain("what it foretells is off")

    def _alarm(self, test: str, drifted: bool) -> None:
        self._metrics.drift.labels(test).set(drifted)
        if drifted and test not in self._alarmed:
            log.warning("Drift: %s are no longer what the predictor was trained for", test)
        self._alarmed = (self._alarmed | {test}) if drifted else (self._alarmed - {test})

    def retrain(self, why: str) -> asyncio.Task[None]:
        """Train in a process of its own, unless that is under way."""
        if self._training is None or self._training.done():
            log.warning("Training the predictor anew: %s", why)
            self._since_training = 0
            self._training = asyncio.create_task(self._retrain())
        return self._training

    async def _retrain(self) -> None:
        folder = self._settings.data.absolute() / PREDICTOR
        aside = folder.with_name(f"{PREDICTOR}.new")
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "train", self._settings.family or self._model.family.name,
            "--predictor", str(self._in_force), "--out", str(aside),
            env={**os.environ, SOURCE: self._url},  # a command line is anybody's to read
            stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, preexec_fn=_politely,
        )  # fmt: skip
        try:
            _, said = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
        if process.returncode == NO_BETTER:
            self._metrics.retrained.labels("refused").inc()
            log.warning("The new predictor is no better; the old one stays")
        elif process.returncode != 0:
            self._metrics.retrained.labels("failed").inc()
            log.warning("Training failed:\n%s", _harmless(said.decode(errors="replace")))
        else:
            await asyncio.to_thread(_replace, aside, folder)
            made_for = self._model.made_for
            self._foresight.predictor = Predictor.load(folder, made_for)
            self.drift = _drift_of(self._foresight.predictor)
            self._alarm("errors", False)
            self._in_force = folder
            self._metrics.retrained.labels("accepted").inc()
            log.warning("The new predictor is in force")
            if self._settings.predictor is not None:
                log.warning("The setting `predictor` names another; the next start takes that")

    def close(self) -> None:
        self._judge.close()
        if self._training is not None:
            self._training.cancel()
        if self._samples is not None:
            self._samples.close()


def _drift_of(predictor: Predictor | None) -> Drift:
    known = {} if predictor is None else predictor.weights
    return Drift(known.get("centre"), known.get("spread"))


def _replace(aside: Path, folder: Path) -> None:
    """Put a trained predictor where the next start finds it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def _harmless(said: str) -> str:
    """Of what a training said: a sentence for who runs it, or where it failed, and no messages that
    may quote prompts."""
    kept = ("Error:", "  File ")
    return "\n".join([line for line in said.splitlines() if line.startswith(kept)][-10:])


def _politely() -> None:
    os.nice(10)
