"""How close does step batching come to what the model itself can do, and what do others lose?

    python benchmarks/engine.py [--requests 384] [--size 64 --size 128] [--json]

One mixed workload (half the requests at the exact step count, resumed after 0 to 50 % of it in the
shares that the published thresholds give on real prompts; a quarter at half, a quarter at a quarter
of the steps; all guided) is made in five ways in one run, with the same weights and threads: by
Argus's engine, by the stock pipeline one at a time, by the stock pipeline in batches that run as
long as their longest member, by the stock pipeline in batches of equal requests, and by the bare
UNet in a tight loop. Stock pipelines cannot resume: they are given as many steps as are left.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from argus.core.job import Job
from argus.engine.conditioning import TextEncoder, rows_of
from argus.engine.engine import Engine
from argus.families.catalog import default_family
from argus.lab.painting import Commission, paint
from argus.lab.prompts import find_prompts

SKIPPED = ((0.0, 22), (0.1, 43), (0.2, 21), (0.3, 5), (0.4, 3), (0.5, 6))
BATCHES = (4, 8, 16, 32)
TRIALS = 20
LOAD = 0.7
GUIDANCE = 2.5  # as most models are used; the bundled one needs none any more


@dataclass(frozen=True)
class Ask:
    """A request of the workload. `key` is what the grouped baseline may batch."""

    job: Job

    @property
    def key(self) -> tuple[int, int]:
        return self.job.steps, self.job.skip


def main(
    requests: Annotated[int, typer.Option(help="Requests of the workload.")] = 384,
    size: Annotated[list[int] | None, typer.Option(help="Picture sides. Default: own.")] = None,
    latency_s: Annotated[float, typer.Option(help="Seconds of Poisson arrivals.")] = 40.0,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    family = default_family()
    exact = family.exact
    engine = Engine.load(family.models[exact.model], sampler=exact.sampler)
    prompts = find_prompts(family, str(requests))
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "sizes": {}}
    console = Console()
    for side in size or [exact.width]:
        asks = workload(prompts, exact.steps, GUIDANCE, side)
        result = measure(engine, asks, latency_s, console)
        results["sizes"][str(side)] = result
        table = Table("key", "value", title=f"{side}×{side} pictures")
        for name, value in result.items():
            table.add_row(name, f"{value:.3g}")
        console.print(table)
    if as_json:
        print(json.dumps(results | next(iter(results["sizes"].values()))))


def workload(prompts: Sequence[str], steps: int, guidance: float, side: int) -> list[Ask]:
    rng = random.Random(0)
    asks = []
    for i, prompt in enumerate(prompts):
        count, skip = steps, 0
        if i % 4 < 2:
            share = rng.choices([s for s, _ in SKIPPED], [w for _, w in SKIPPED])[0]
            skip = round(share * steps)
        else:
            count = round(steps / (2 if i % 4 == 2 else 4))
        job = Job(
            prompt, seed=i, steps=count, guidance=guidance, skip=skip, width=side, height=side
        )  # fmt: skip
        asks.append(Ask(job))
    rng.shuffle(asks)
    return asks


def measure(
    engine: Engine,
    asks: Sequence[Ask],
    latency_s: float,
    console: Console,
    batches: Sequence[int] = BATCHES,
) -> dict[str, float]:
    """The figures of one workload of pictures of one size."""
    bare = bare_rates(engine, asks[0].job, batches)
    best = max(bare, key=lambda b: bare[b])
    engine.max_batch = best
    ours = Ours(engine)
    stock = Stock(engine, best)
    steps = sum(ask.job.steps_run for ask in asks)
    seconds = {
        "engine": timed(lambda: ours.serve(asks), console, "the engine"),
        "sequential": timed(lambda: stock.sequential(asks), console, "one at a time"),
        "padded": timed(lambda: stock.padded(asks), console, "padded batches"),
        "grouped": timed(lambda: stock.grouped(asks), console, "grouped batches"),
    }
    rate = LOAD * len(asks) / seconds["grouped"]
    fresh = [Ask(replace(a.job, prompt=f"{a.job.prompt}, again")) for a in asks]  # not encoded yet
    arrivals = poisson(fresh, rate, latency_s)
    console.print(f"Poisson arrivals, {rate:.1f} a second for {latency_s:.0f} s, twice …")
    p95 = {name: np.quantile(way.arriving(arrivals), 0.95) for name, way in
           (("engine", ours), ("grouped", stock))}  # fmt: skip
    return {
        "best_batch": best,
        "of_limit": steps / seconds["engine"] / bare[best],
        "vs_sequential": seconds["sequential"] / seconds["engine"],
        "bare_batching_gain": bare[best] / bare[1],
        "vs_padded": seconds["padded"] / seconds["engine"],
        "vs_grouped": seconds["grouped"] / seconds["engine"],
        "p95_latency_ratio": float(p95["engine"] / p95["grouped"]),
        "overhead": overhead(engine, asks[0].job),
        "resume_saving": resume_saving(engine, asks[0].job),
        "images_per_s": len(asks) / seconds["engine"],
    }


def timed(work: Callable[[], None], console: Console, title: str) -> float:
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    console.print(f"{title}: {seconds:.1f} s")
    return seconds


@torch.inference_mode()
def bare_rates(engine: Engine, job: Job, batches: Sequence[int]) -> dict[int, float]:
    """Sample-steps a second of nothing but guided forward passes, by batch."""
    unet, width, height = engine.pipeline.unet, job.width or 0, job.height or 0
    texts = TextEncoder(engine.pipeline)
    rates = {}
    for batch in (1, *batches):
        x = torch.randn(2 * batch, *latent_shape(engine, job)[1:]).to(unet.device, unet.dtype)
        times = torch.full((2 * batch,), 500.0, device=unet.device)
        jobs = [replace(job, seed=i) for i in range(batch)]
        rows = rows_of(jobs, texts.prepare(jobs, width, height))
        seconds = []
        for _ in range(TRIALS // 2 + 2):
            begun = engine.now()
            unet(x, times, encoder_hidden_states=rows.states, added_cond_kwargs=rows.added)
            seconds.append(engine.now() - begun)
        rates[batch] = batch / statistics.median(seconds[2:])
    return rates


def latent_shape(engine: Engine, job: Job) -> tuple[int, int, int, int]:
    scale = engine.pipeline.vae_scale_factor
    channels = engine.pipeline.unet.config.in_channels
    return 1, channels, (job.height or 0) // scale, (job.width or 0) // scale


def start_of(engine: Engine, job: Job) -> torch.Tensor | None:
    if not job.skip:
        return None
    generator = torch.Generator().manual_seed(job.seed)
    return torch.randn(latent_shape(engine, job), generator=generator)


class Ours:
    """Argus's engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def serve(self, asks: Sequence[Ask]) -> None:
        engine = self._engine
        for _ in paint(engine, (Commission(a, a.job, start_of(engine, a.job)) for a in asks)):
            pass

    def arriving(self, arrivals: Sequence[tuple[float, Ask]]) -> list[float]:
        """Seconds from arrival to picture of each request."""
        waiting, latencies = list(arrivals), []
        tickets: dict[int, float] = {}
        begun = time.perf_counter()
        while waiting or tickets:
            now = time.perf_counter() - begun
            while waiting and waiting[0][0] <= now:
                at, ask = waiting.pop(0)
                ticket = self._engine.admit(ask.job, start_of(self._engine, ask.job))
                tickets[ticket] = at
            if not tickets:
                time.sleep(max(0.0, waiting[0][0] - now))
                continue
            for ticket, _ in self._engine.step():
                latencies.append(time.perf_counter() - begun - tickets.pop(ticket))
        return latencies


class Stock:
    """diffusers' own pipeline, batched in three ways."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self._pipeline, self._batch = engine.pipeline, batch

    def _run(self, asks: Sequence[Ask], steps: int) -> None:
        self._pipeline(
            [ask.job.prompt for ask in asks],
            num_inference_steps=steps,
            guidance_scale=asks[0].job.guidance,
            width=asks[0].job.width,
            height=asks[0].job.height,
            generator=[torch.Generator().manual_seed(ask.job.seed) for ask in asks],
        )

    def sequential(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            self._run([ask], ask.job.steps_run)

    def padded(self, asks: Sequence[Ask]) -> None:
        for begin in range(0, len(asks), self._batch):
            batch = asks[begin : begin + self._batch]
            self._run(batch, max(ask.job.steps_run for ask in batch))

    def grouped(self, asks: Sequence[Ask]) -> None:
        groups = defaultdict(list)
        for ask in asks:
            groups[ask.key].append(ask)
        for group in groups.values():
            for begin in range(0, len(group), self._batch):
                self._run(group[begin : begin + self._batch], group[0].job.steps_run)

    def arriving(self, arrivals: Sequence[tuple[float, Ask]]) -> list[float]:
        """As `Ours.arriving`; whenever it is idle it takes the oldest request and all that are
        equal to it."""
        coming, latencies = list(arrivals), []
        waiting: list[tuple[float, Ask]] = []
        begun = time.perf_counter()
        while coming or waiting:
            now = time.perf_counter() - begun
            while coming and coming[0][0] <= now:
                waiting.append(coming.pop(0))
            if not waiting:
                time.sleep(max(0.0, coming[0][0] - now))
                continue
            key = waiting[0][1].key
            batch = [one for one in waiting if one[1].key == key][: self._batch]
            waiting = [one for one in waiting if one not in batch]
            self._run([ask for _, ask in batch], batch[0][1].job.steps_run)
            now = time.perf_counter() - begun
            latencies += [now - at for at, _ in batch]
        return latencies


def poisson(asks: Sequence[Ask], rate: float, seconds: float) -> list[tuple[float, Ask]]:
    rng, now = random.Random(1), 0.0
    arrivals: list[tuple[float, Ask]] = []
    while (now := now + rng.expovariate(rate)) < seconds:
        arrivals.append((now, asks[len(arrivals) % len(asks)]))
    return arrivals


def overhead(engine: Engine, job: Job) -> float:
    """Share of the engine's time outside the forward passes of its models, at batch 8."""
    inside = 0.0
    pipeline = engine.pipeline

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            begun = engine.now()
            try:
                return work(*args, **kwargs)
            finally:
                inside += engine.now() - begun

        return run

    modules = (pipeline.unet, pipeline.vae.decoder, pipeline.text_encoder)
    plain = [module.forward for module in modules]
    limit, engine.max_batch = engine.max_batch, 8
    try:
        for module in modules:
            module.forward = watched(module.forward)
        jobs = [
            replace(job, prompt=f"{job.prompt} {i}", seed=i, steps=20, skip=0) for i in range(8)
        ]
        begun = engine.now()
        for _ in paint(engine, [Commission(i, one) for i, one in enumerate(jobs)]):
            pass
        return 1 - inside / (engine.now() - begun)
    finally:
        engine.max_batch = limit
        for module, forward in zip(modules, plain, strict=True):
            module.forward = forward


def resume_saving(engine: Engine, job: Job) -> float:
    """Denoising time of a picture resumed at half its steps ÷ of a whole one."""
    whole = Job(job.prompt, steps=20, guidance=job.guidance, width=job.width, height=job.height)
    half = Job(
        job.prompt, steps=20, guidance=job.guidance, skip=10, width=job.width, height=job.height
    )  # fmt: skip
    spent: dict[int, list[float]] = {0: [], 10: []}
    for _ in range(TRIALS // 2):
        for one in (whole, half):
            result = engine.run(one, start_of(engine, one))
            spent[one.skip].append(result.timings_ms["denoise"])
    return statistics.median(spent[10]) / statistics.median(spent[0])


if __name__ == "__main__":
    typer.run(main)
