"""Measures the quality of served pictures, detects drift of predictions, and retrains."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np

from argus.config import Settings
from argus.control.request import Request
from argus.control.variants import EXACT
from argus.core.errors import named
from argus.core.family import EXACT as EXACT_NAME
from argus.files import replace_folder, try_writing
from argus.lab.retraining import FEWEST_SAMPLES, NO_BETTER, SOURCE
from argus.quality.drift import Drift
from argus.quality.predictor import Predictor
from argus.server.health import StorageHealth
from argus.server.keys import BURST
from argus.server.metrics import Metrics
from argus.server.model import PREDICTOR, ServedFamily
from argus.server.predictions import Predictions
from argus.server.request import Picture
from argus.server.samples import Sample, Samples
from argus.server.scoring import ScoringThread
from argus.server.storage import catalogue_url
from argus.server.threads import Threads
from argus.workers.fleet import Fleet

log = logging.getLogger(__name__)

MOST_WAITING = 64
LOOK_S = 0.25
PAUSE_S = 300.0  # after a scorer that did not answer
PATIENCE_S = 60.0
TEST_EVERY = 20  # prompts
NEW_SAMPLES = FEWEST_SAMPLES  # since the last training, before the next one
SAMPLE_LIMIT_S = 30.0
REPLACE_LIMIT_S = 60.0
LEAST_ROOM_BYTES = 1_000_000
SAMPLES, NEW_PREDICTOR = "samples", "predictor"  # kinds of data, as in `StorageHealth`
COMMAND = (sys.executable, "-c", "from argus.cli.main import main; main()")


class Learning:
    """Samples a share of the served approximate pictures. While workers are idle, makes the exact
    picture of each, scores both and stores the sample. For use from one asyncio loop."""

    def __init__(
        self,
        settings: Settings,
        model: ServedFamily,
        fleet: Fleet,
        predictions: Predictions,
        scorer: ScoringThread,
        metrics: Metrics,
        health: StorageHealth,
    ) -> None:
        self._settings, self._model, self._fleet = settings, model, fleet
        self._predictions, self._scorer, self._metrics = predictions, scorer, metrics
        self._health, self._writing = health, Threads("learning-write", 1)
        self._folder = settings.data.absolute() / PREDICTOR
        health.add(NEW_PREDICTOR, self._try_room)
        self._waiting: deque[Picture] = deque(maxlen=MOST_WAITING)
        self._since_training = self._served = 0
        self._alarmed: set[str] = set()
        # of pictures whose variant was chosen: their number, and the sum of their qualities
        self.measurements, self.measured = 0, 0.0
        self._training: asyncio.Task[None] | None = None
        self._trainer: asyncio.subprocess.Process | None = None
        self._url = catalogue_url(settings)
        self._samples: Samples | None = None
        self._in_force = model.predictor_folder
        self.drift = _drift_of(predictions.predictor)

    @property
    def waiting(self) -> bool:
        """Whether pictures wait to be measured while workers are idle."""
        return bool(self._waiting)

    @property
    def drifted(self) -> list[str]:
        """The tests that have found a drift and not its end."""
        return sorted(self._alarmed)

    def saw(self, picture: Picture) -> None:
        """Sample a served picture, perhaps, and test its prompt for drift."""
        predictor, request = self._predictions.predictor, picture.request
        if predictor is None or request.key == BURST:  # invented prompts teach nothing
            return
        self.drift.saw_prompt(request.embedding.vector)
        self._served += 1
        if self._served % TEST_EVERY == 0:
            self._alarm("prompts", self.drift.prompts)
        exact = self._model.family.exact
        usual = (request.width, request.height) == (exact.width, exact.height)
        if (
            picture.variant != EXACT_NAME
            and usual
            and request.cached  # else its prompt must not be stored
            and request.pinned_steps is None
            and not request.own_guidance
            and not request.negative_prompt
            and self._scorer.able
            and "scores" in predictor.weights
            and random.random() < self._settings.truth_share
        ):
            self._waiting.append(picture)

    async def run(self) -> None:
        """Measure sampled pictures while workers are idle; does not return."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._waiting or not self._fleet.idle:
                continue
            try:
                await self.measure(self._waiting.popleft())
            except TimeoutError:
                log.warning("The scorer does not answer: nothing is measured for %g s", PAUSE_S)
                await asyncio.sleep(PAUSE_S)
            except Exception as error:  # its message may quote the prompt
                log.warning("A served picture could not be measured (%s)", type(error).__name__)

    async def measure(self, picture: Picture) -> Sample | None:
        """Make the exact picture of a served picture's prompt and seed, and compare both. None if
        no worker holds the exact model, or there is no predictor."""
        table, exact = self._model.table, self._model.family.exact
        prompt, seed = picture.request.prompt, picture.job.seed
        neighbour = picture.request.neighbour
        cluster = self._fleet.cluster()
        model = int(table.model[EXACT])
        if model not in cluster.models:
            return None
        worker, by_s = cluster.models.index(model), time.monotonic() + PATIENCE_S
        request = Request(
            deadline_s=by_s, expires_s=by_s, variant=EXACT, work_steps=float(table.steps[EXACT])
        )
        twin = await self._fleet.run(request, exact.job(prompt, seed), worker, model)
        score, s_exact = await self._scorer.scores(prompt, [picture.image, twin.image])
        predictor = self._predictions.predictor
        if predictor is None:
            return None
        sample = Sample(
            picture.request.namespace,
            prompt,
            picture.variant,
            seed,
            picture.request.similarity,
            None if neighbour is None else neighbour.vector.astype(np.float16).tobytes(),
            score,
            s_exact,
            predictor.quality_of(score, s_exact),
            picture.quality,
            picture.quality_bound,
            predictor.made_for,
            time.time(),
        )
        await self._store(sample)
        asked = picture.request
        self._saw(sample, asked.predictor == self._predictions.number, asked.pinned)
        return sample

    async def _store(self, sample: Sample) -> None:
        """Store a sample for the next training, if possible."""
        if not self._health.works(SAMPLES):
            return
        try:
            await self._writing.run(lambda: self._keep(sample), SAMPLE_LIMIT_S)
        except Exception as error:
            self._health.failed(SAMPLES, error)

    def _keep(self, sample: Sample) -> None:
        if self._samples is None:
            self._samples = Samples(self._url)
        self._samples.add(sample)

    def _saw(self, sample: Sample, current: bool, pinned: bool) -> None:
        """Test a new sample for drift; `current` says whether the predictor in force predicted it,
        `pinned` whether the request named the variant, so that it says nothing of decisions."""
        self._since_training += 1
        self._metrics.measured.labels(sample.variant).observe(sample.quality)
        if not pinned:
            self.measurements, self.measured = self.measurements + 1, self.measured + sample.quality
        if sample.predicted is not None:
            self._metrics.quality_error.observe(sample.quality - sample.predicted)
            if current:
                self.drift.saw_error(sample.quality - sample.predicted)
        drifted = self.drift.errors
        self._alarm("errors", drifted)
        enough = self._since_training >= NEW_SAMPLES and self._health.works(NEW_PREDICTOR)
        if drifted and self._settings.retrain and enough:
            self.retrain("its errors have drifted")

    def _alarm(self, test: str, drifted: bool) -> None:
        self._metrics.drift.labels(test).set(drifted)
        if drifted and test not in self._alarmed:
            log.warning("Drift: %s are no longer what the predictor was trained for", test)
        self._alarmed = (self._alarmed | {test}) if drifted else (self._alarmed - {test})

    def retrain(self, why: str) -> asyncio.Task[None]:
        """Train in a process of its own, unless a training is running."""
        if self._training is None or self._training.done():
            log.warning("Training a new predictor: %s", why)
            self._since_training = 0
            self._training = asyncio.create_task(self._retrain())
        return self._training

    async def _retrain(self) -> None:
        aside = self._folder.with_name(f"{PREDICTOR}.new")
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, "train", self._settings.family or self._model.family.name,
                "--predictor", str(self._in_force), "--out", str(aside),
                env={**os.environ, SOURCE: self._url},  # other users can read a command line
                stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
                preexec_fn=_politely if hasattr(os, "nice") else None,
            )  # fmt: skip
        except (OSError, ValueError) as error:  # such as no memory for another process
            self._metrics.retrained.labels("failed").inc()
            log.warning("Training cannot be started: %s", named(error))
            return
        self._trainer = process
        try:
            _, said = await process.communicate()
        finally:
            self.kill()
        if process.returncode == 0:
            await self._adopt(aside)
        elif process.returncode == NO_BETTER:
            self._metrics.retrained.labels("refused").inc()
            log.warning("The new predictor is not better; the old one stays in force")
        else:
            self._metrics.retrained.labels("failed").inc()
            log.warning("Training failed:\n%s", _harmless(said.decode(errors="replace")))
            await self._health.check(NEW_PREDICTOR)
        with suppress(Exception):  # files that a failed training left
            await self._writing.run(lambda: shutil.rmtree(aside), REPLACE_LIMIT_S)

    async def _adopt(self, aside: Path) -> None:
        """Use a trained predictor, and save it where the next start finds it."""

        def replaced() -> Predictor:
            found = Predictor.load(aside, self._model.made_for)
            replace_folder(self._folder, by=aside)
            return found

        try:
            new = await self._writing.run(replaced, REPLACE_LIMIT_S)
        except Exception as error:
            self._metrics.retrained.labels("failed").inc()
            log.warning("The new predictor cannot be used; the old one stays: %s", named(error))
            await self._health.check(NEW_PREDICTOR)
            return
        self._predictions.predictor = new
        self.drift = _drift_of(new)
        self._alarm("errors", False)
        self._in_force = self._folder
        self._metrics.retrained.labels("accepted").inc()
        log.warning("The new predictor is in force")
        if self._settings.predictor is not None:
            log.warning("The setting `predictor` names another one: the next start uses that")

    def _try_room(self) -> None:
        """Raises OSError unless there is room to write a predictor."""
        files = self._in_force.iterdir() if self._in_force is not None else ()
        size = sum(file.stat().st_size for file in files)
        probe = self._folder.with_name(f"{PREDICTOR}.probe")
        try_writing(probe, max(size, LEAST_ROOM_BYTES))

    def kill(self) -> None:
        """Kill the training process, if there is one. May be called from any thread."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None and trainer.returncode is None:
            with suppress(ProcessLookupError):
                trainer.kill()

    def close(self) -> None:
        self._scorer.close()
        if self._training is not None:
            self._training.cancel()
        if self._samples is not None:
            self._samples.close()


def _drift_of(predictor: Predictor | None) -> Drift:
    known = {} if predictor is None else predictor.weights
    return Drift(known.get("centre"), known.get("spread"))


def _harmless(said: str) -> str:
    """The lines of a training's output that name an error or a place in the code: none that may
    quote prompts."""
    kept = ("Error:", "  File ")
    return "\n".join([line for line in said.splitlines() if line.startswith(kept)][-10:])


def _politely() -> None:
    os.nice(10)
