"""The UNet's inputs besides the latents: encoded prompts, and SDXL's sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from argus.core.job import Job
from argus.engine.loading import AnyPipeline
from argus.engine.transfer import to_device

REMEMBERED = 512
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """An encoded text: `states` (1, tokens, width) and, for SDXL, `pooled` (1, width)."""

    states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of one job; `negative` is None for an unguided job.

    `time_ids` (1, 6) are SDXL's sizes. `guidance_embedding` (1, width) is for models distilled for
    a range of guidance scales.
    """

    positive: Text
    negative: Text | None
    time_ids: Tensor | None
    guidance_embedding: Tensor | None


@dataclass(frozen=True)
class Rows:
    """The conditioning of a batch: every job's positive row, then the guided jobs' negative ones.

    `guided` (g,) are the indices of the guided jobs in the batch, `guidance` (g, 1, 1, 1) their
    scales.
    """

    states: Tensor
    added: dict[str, Tensor] | None
    guidance_embedding: Tensor | None
    guided: Tensor
    guidance: Tensor


class TextEncoder:
    """Encodes texts as the stock pipeline does, several at once, and caches the latest."""

    def __init__(self, pipeline: AnyPipeline, remembered: int = REMEMBERED) -> None:
        self._pipeline, self._limit = pipeline, remembered
        self._device, self._dtype = pipeline.unet.device, pipeline.unet.dtype
        self._known: OrderedDict[str, Text] = OrderedDict()

    def prepare(self, jobs: Sequence[Job], width: int, height: int) -> list[Conditioning]:
        """The conditioning of each job; all are of one size, in pixels."""
        negatives = [job.negative_prompt for job in jobs if self._guided(job)]
        if self._zeroes_empty:
            negatives = [text for text in negatives if text]
        texts = self._encode([*(job.prompt for job in jobs), *negatives])
        return [
            Conditioning(
                texts[job.prompt],
                self._negative(job, texts),
                self._time_ids(width, height),
                self._guidance_embedding(job),
            )
            for job in jobs
        ]

    def _guided(self, job: Job) -> bool:
        """Whether a job has a negative row. Models that embed their guidance scale have none."""
        return job.guided and self._pipeline.unet.config.time_cond_proj_dim is None

    @property
    def _zeroes_empty(self) -> bool:
        return bool(self._pipeline.config.get("force_zeros_for_empty_prompt"))

    def _negative(self, job: Job, texts: dict[str, Text]) -> Text | None:
        if not self._guided(job):
            return None
        if job.negative_prompt or not self._zeroes_empty:
            return texts[job.negative_prompt]
        positive = texts[job.prompt]
        pooled = None if positive.pooled is None else torch.zeros_like(positive.pooled)
        return Text(torch.zeros_like(positive.states), pooled)

    def _encode(self, texts: Sequence[str]) -> dict[str, Text]:
        result = {text: self._known[text] for text in texts if text in self._known}
        new = [text for text in dict.fromkeys(texts) if text not in result]
        if new:
            result.update(zip(new, self._run(new), strict=True))
        for text in texts:
            self._known[text] = result[text]
            self._known.move_to_end(text)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
        return result

    def _run(self, texts: Sequence[str]) -> list[Text]:
        pipeline = self._pipeline
        if isinstance(pipeline, StableDiffusionXLPipeline):
            states, _, pooled, _ = pipeline.encode_prompt(
                list(texts), device=self._device, do_classifier_free_guidance=False
            )
            return [Text(states[i : i + 1], pooled[i : i + 1]) for i in range(len(texts))]
        states, _ = pipeline.encode_prompt(
            list(texts), self._device, 1, do_classifier_free_guidance=False
        )
        return [Text(states[i : i + 1], None) for i in range(len(texts))]

    def _time_ids(self, width: int, height: int) -> Tensor | None:
        pipeline = self._pipeline
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            return None
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=self._dtype)
        return sizes.to(self._device)

    def _guidance_embedding(self, job: Job) -> Tensor | None:
        pipeline = self._pipeline
        width = pipeline.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.tensor([job.guidance - 1])
        embedding: Tensor = pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)
        return embedding.to(self._device, self._dtype)


def rows_of(jobs: Sequence[Job], parts: Sequence[Conditioning]) -> Rows:
    """The conditioning of a batch of jobs, for one forward pass."""
    guided = [i for i, part in enumerate(parts) if part.negative is not None]
    texts = [part.positive for part in parts]
    texts += [part.negative for part in parts if part.negative is not None]
    states = torch.cat([text.states for text in texts])
    places = [*range(len(parts)), *guided]
    added = None
    if parts[0].time_ids is not None:
        added = {
            "text_embeds": torch.cat([text.pooled for text in texts if text.pooled is not None]),
            "time_ids": torch.cat([_there(parts[i].time_ids) for i in places]),
        }
    embedding = None
    if parts[0].guidance_embedding is not None:
        embedding = torch.cat([_there(parts[i].guidance_embedding) for i in places])
    device = states.device
    guidance = torch.tensor([jobs[i].guidance for i in guided], dtype=torch.float32)
    return Rows(
        states,
        added,
        embedding,
        to_device(torch.tensor(guided, dtype=torch.long), device),
        to_device(guidance.view(-1, 1, 1, 1), device),
    )


def _there(value: T | None) -> T:
    assert value is not None  # all jobs of a batch run on one model
    return value
