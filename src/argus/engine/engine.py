"""The engine: one model, whose jobs in flight advance together, step by step."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from argus.core.errors import BadRequest, ModelError, NotEnoughMemory
from argus.core.job import Job
from argus.core.profile import MAX_BATCH
from argus.engine.admission import Queue, Waiting
from argus.engine.canvas import Canvas
from argus.engine.conditioning import TextEncoder, rows_of
from argus.engine.decoder import Decoder, Decoding
from argus.engine.forward import BUCKETS, Forward
from argus.engine.loading import AnyPipeline, load_pipeline
from argus.engine.memory import in_halves, loading_errors, memory_errors
from argus.engine.samplers import DEFAULT, new_scheduler
from argus.engine.schedules import new_schedule
from argus.engine.sharing import NOTHING, Meter, Share
from argus.engine.slots import Denoiser, OnPreview, OnStep, Slot
from argus.engine.transfer import Pace, to_device, to_host

log = logging.getLogger(__name__)

SCHEDULES = 256
TRIAL_STEPS = 4


@dataclass(frozen=True)
class Result:
    """A job's picture.

    `final` are the last latents (1, c, h, w). `kept` maps K to the latents after K steps, from
    which a job with `skip` K resumes. `timings_ms` has the job's times in encode, denoise and
    decode, each shared with the rest of its batch. `share` is its share of the engine's time and
    energy.
    """

    image: Image.Image
    job: Job
    final: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    share: Share = NOTHING


@dataclass(eq=False)
class _InFlight:
    """A slot, its ticket and size, its times in seconds, and its share of what the engine uses."""

    ticket: int
    slot: Slot
    size: tuple[int, int]
    begun_s: float
    encode_s: float
    share: Share = NOTHING
    cancelled: bool = False


@dataclass(frozen=True, eq=False)
class _Decoding:
    """Jobs whose latents are done, and their pictures that are being decoded."""

    group: Sequence[_InFlight]
    pictures: Decoding
    begun_s: float


Outcomes: TypeAlias = "list[tuple[int, Result | Exception]]"
T = TypeVar("T", Waiting, _InFlight)


class Engine:
    """One loaded model, driven step by step by a worker process, the lab or the studio.

    Jobs join the batch at the boundary of any step, earliest deadline first, and leave when they
    are done; those in flight share one forward pass a step, whatever their step counts, skips and
    guidance. A result depends on its job and the given latents, not on what else is in flight
    (except for the last bits, in which a larger batch rounds differently).

    `compiled` has torch compile the UNet for a few batch sizes, each at its first use or in
    `warm_up`.
    """

    def __init__(
        self,
        pipeline: AnyPipeline,
        sampler: str = DEFAULT,
        max_batch: int = MAX_BATCH,
        compiled: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.max_batch = max_batch
        pipeline.scheduler = new_scheduler(sampler, pipeline.scheduler)
        try:
            new_schedule(pipeline.scheduler, TRIAL_STEPS)
        except BadRequest as error:
            raise ModelError(f"The sampler {sampler!r} cannot be used: {error}") from error
        self._schedule = lru_cache(SCHEDULES)(lambda steps: new_schedule(pipeline.scheduler, steps))
        self._forward = Forward(pipeline.unet, compiled)
        self._texts, self._denoiser = TextEncoder(pipeline), Denoiser(self._forward)
        self.decoder = Decoder(pipeline)
        self._canvas = Canvas(pipeline)
        self._pace = Pace(self._forward.device)
        self._meter = Meter(self._forward.device)
        self._tickets = itertools.count(1)
        self._waiting = Queue()
        self._in_flight: list[_InFlight] = []
        self._decoding: list[_Decoding] = []

    @classmethod
    def load(
        cls,
        source: str,
        device: str = "cpu",
        dtype: str = "float32",
        sampler: str = DEFAULT,
        max_batch: int = MAX_BATCH,
        compiled: bool = False,
    ) -> Engine:
        """Load a model; arguments and errors as for `load_pipeline` and `new_scheduler`."""
        pipeline = load_pipeline(source, device, dtype)
        with loading_errors(device, source):
            return cls(pipeline, sampler, max_batch, compiled)

    @property
    def default_size(self) -> tuple[int, int]:
        """The width and height in pixels that the model was trained for."""
        return self._canvas.default_size

    @property
    def in_flight(self) -> list[int]:
        """The tickets of the jobs that are denoised or decoded now."""
        decoding = [one.ticket for batch in self._decoding for one in batch.group]
        return [*(one.ticket for one in self._in_flight), *decoding]

    @property
    def upcoming(self) -> list[int]:
        """The tickets of the queued jobs that the next `fill` puts into flight."""
        room = max(0, self.max_batch - len(self._in_flight))
        return self._waiting.first(room)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._in_flight or self._decoding)

    def run(
        self,
        job: Job,
        start: Tensor | None = None,
        keep: Collection[int] = (),
        on_step: OnStep | None = None,
    ) -> Result:
        """Make one job's picture; arguments and errors as for `admit` and `step`.

        An exception from `on_step` ends the job. Raises RuntimeError if the engine has other jobs,
        whose results would be lost.
        """
        if self.busy:
            raise RuntimeError(
                "Engine.run is for an engine without other jobs; use admit and step."
            )
        ticket = self.admit(job, start, keep, on_step)
        try:
            while True:
                for done, outcome in self.step():
                    if done == ticket:
                        if isinstance(outcome, Exception):
                            raise outcome
                        return outcome
        finally:
            self.cancel(ticket)

    def admit(
        self,
        job: Job,
        start: Tensor | None = None,
        keep: Collection[int] = (),
        on_step: OnStep | None = None,
        deadline_s: float = float("inf"),
        previews: int = 0,
        on_preview: OnPreview | None = None,
    ) -> int:
        """Queue a job; returns the ticket under which `step` gives its result.

        `start` are the latents (1, c, h, w) after `job.skip` steps of a run with the same steps
        and sampler; a job that skips needs them. `keep` lists the K whose latents are returned,
        each in [job.skip, job.steps]. `on_step(done, steps_run)` is called after every step, and
        `on_preview(i, picture)` with `previews` unfinished pictures, spread evenly over the steps.
        Jobs with an earlier `deadline_s` begin first; those that have not begun by then are dropped
        (seconds of `time.monotonic`). Raises BadRequest for a job that does not fit this model.
        """
        self._canvas.check(job, start, keep)
        self._schedule(job.steps)
        if not self.busy:
            self._meter.start()
        ticket = next(self._tickets)
        waiting = Waiting(
            ticket,
            job,
            start,
            frozenset(keep),
            on_step,
            _spread(job, previews),
            on_preview,
            self._canvas.size_of(job),
        )
        self._waiting.add(waiting, deadline_s)
        return ticket

    def resume(self) -> None:
        """Leave out of the jobs' shares what passed since the last step: another engine had the
        device."""
        self._meter.start()

    def cancel(self, ticket: int) -> None:
        """Drop a job, queued or in flight. Does nothing for an unknown ticket."""
        self._in_flight = [one for one in self._in_flight if one.ticket != ticket]
        self._waiting.drop(ticket)
        for batch in self._decoding:
            for one in batch.group:
                one.cancelled |= one.ticket == ticket

    @torch.inference_mode()
    def step(self) -> Outcomes:
        """Fill the batch from the queue and advance the jobs in flight by one step.

        Returns the tickets and results of finished jobs, or the exception that ended a job: what
        its work raised when tried alone, NotEnoughMemory if it does not fit, Expired if it did not
        begin by its deadline. When memory runs out while denoising, `max_batch` is halved. Raises
        only errors after which CUDA does not work in this process.
        """
        outcomes = self.fill()
        if self._in_flight:
            outcomes += self._move()
        return outcomes + self._collect(wait=not self._in_flight)

    def _move(self) -> Outcomes:
        """One step of the jobs in flight of one size; begin to decode those that are finished."""
        size = self._in_flight[0].size
        group = [one for one in self._in_flight if one.size == size][: self.max_batch]
        outcomes = self._halved(group, self._advance, lasting=True)
        self._pace.keep()
        self._meter.charge(group)
        self._preview([one for one in group if one.slot.done in one.slot.previews])
        finished = [one for one in self._in_flight if one.slot.finished]
        outcomes += self._halved(finished, self._decode)
        for one in group:
            if one.slot.on_step is not None:
                one.slot.on_step(one.slot.done - one.slot.job.skip, one.slot.job.steps_run)
        return outcomes

    @torch.inference_mode()
    def fill(self) -> Outcomes:
        """Put queued jobs into flight while there is room; returns those that could not begin."""
        outcomes: Outcomes = [*self._waiting.expire()]
        admitted = self._waiting.take(max(0, self.max_batch - len(self._in_flight)))
        for size in dict.fromkeys(one.size for one in admitted):
            outcomes += self._halved([one for one in admitted if one.size == size], self._begin)
        return outcomes

    def _halved(
        self, group: Sequence[T], work: Callable[[Sequence[T]], None], lasting: bool = False
    ) -> Outcomes:
        """Do the work for a group, in halves where it fails; a `lasting` lack of memory lowers
        `max_batch`. Returns the jobs for which it fails alone."""

        def shortage(half: int) -> None:
            log.warning("Out of memory with more than %d jobs at once", half)
            if lasting:
                self.max_batch = min(self.max_batch, half)

        failed = in_halves(group, work, self._forward.device, shortage)
        for one, _ in failed:
            self.cancel(one.ticket)
        return [(one.ticket, error) for one, error in failed]

    def _begin(self, group: Sequence[Waiting]) -> None:
        begun, size = time.perf_counter(), group[0].size
        conditionings = self._texts.prepare([one.job for one in group], *size)
        now = time.perf_counter()
        admitted = []
        for one, conditioning in zip(group, conditionings, strict=True):
            job, schedule = one.job, self._schedule(one.job.steps)
            generator = torch.Generator().manual_seed(job.seed)
            if one.start is None:
                latents = self._canvas.noise(size, generator) * schedule.start
            else:
                latents = to_device(one.start, self._forward.device, self._forward.dtype)
            slot = Slot(
                job, schedule, conditioning, generator, latents, one.keep, one.on_step,
                one.previews, one.on_preview, job.skip,
            )  # fmt: skip
            if job.skip in one.keep:
                slot.kept[job.skip] = to_host(latents)
            admitted.append(_InFlight(one.ticket, slot, size, now, now - begun))
        self._meter.charge(admitted)
        self._in_flight += admitted

    def _advance(self, group: Sequence[_InFlight]) -> None:
        self._denoiser.advance([one.slot for one in group])

    def _preview(self, due: Sequence[_InFlight]) -> None:
        """Decode the slots' estimates of their finished latents for `on_preview`."""
        estimates = [(one.slot, one.slot.x0) for one in due if one.slot.x0 is not None]
        if not estimates:
            return
        try:
            with memory_errors(self._forward.device):
                images = self.decoder.decode([x0 for _, x0 in estimates])
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            log.warning("No previews: %s", error)  # the jobs go on without
            return
        for (slot, _), image in zip(estimates, images, strict=True):
            if slot.on_preview is not None:
                slot.on_preview(slot.previews.index(slot.done), image)
        self._meter.charge(due)

    def _decode(self, group: Sequence[_InFlight]) -> None:
        denoised = time.perf_counter()
        pictures = self.decoder.start([one.slot.latents for one in group])
        self._meter.charge(group)
        self._decoding.append(_Decoding(group, pictures, denoised))
        self._in_flight = [one for one in self._in_flight if one not in group]

    def _collect(self, wait: bool) -> Outcomes:
        """The results whose pictures are decoded; with `wait`, all that are being decoded."""
        ready = [batch for batch in self._decoding if wait or batch.pictures.ready]
        self._decoding = [batch for batch in self._decoding if batch not in ready]
        outcomes: Outcomes = []
        for batch in ready:
            images = batch.pictures.images()
            decode_ms = 1000 * (time.perf_counter() - batch.begun_s)
            self._meter.charge(batch.group)
            for one, image in zip(batch.group, images, strict=True):
                if one.cancelled:
                    continue
                timings = {
                    "encode": 1000 * one.encode_s,
                    "denoise": 1000 * (batch.begun_s - one.begun_s),
                    "decode": decode_ms,
                }
                slot = one.slot
                result = Result(
                    image, slot.job, slot.latents.clone(), slot.kept, timings, one.share
                )
                outcomes.append((one.ticket, result))
        return outcomes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile for pictures of the default size, so that no job waits for it."""
        if not self._forward.compiled:
            return
        job = Job("", guidance=1.0)
        texts = self._texts.prepare([job], *self.default_size)
        noise = self._canvas.noise(self.default_size, torch.Generator())
        for rows in [size for size in BUCKETS if size <= 2 * self.max_batch]:
            log.info("Compiling for %d rows", rows)
            laid = rows_of([job] * rows, texts * rows)
            times = torch.zeros(rows, device=noise.device)
            batch = noise.repeat(rows, 1, 1, 1)
            try:
                with memory_errors(noise.device):
                    self._forward(batch, times, laid.states, laid.added, laid.guidance_embedding)
            except NotEnoughMemory:
                log.warning("No room for %d rows", rows)
                return

    def now(self) -> float:
        """Seconds of `time.perf_counter`, once the device has finished its work."""
        if self._forward.device.type == "cuda":
            torch.cuda.synchronize(self._forward.device)
        return time.perf_counter()


def _spread(job: Job, previews: int) -> tuple[int, ...]:
    """The numbers of steps after which a job's previews are due; none after the last step."""
    due = (job.skip + round(job.steps_run * i / (previews + 1)) for i in range(1, previews + 1))
    return tuple(dict.fromkeys(k for k in due if job.skip < k < job.steps))
