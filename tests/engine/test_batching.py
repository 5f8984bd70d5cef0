"""What shares a batch, joins or leaves it makes no difference to anyone's picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from argus.core.errors import Expired, NotEnoughMemory
from argus.core.job import Job
from argus.engine.decoder import Decoding
from argus.engine.engine import Engine, Result
from argus.engine.forward import Forward
from argus.engine.samplers import SAMPLERS

TOLERANCE = 1e-3
MIXED = [
    Job("a red fish", seed=1, steps=6, guidance=5.0),
    Job("a blue fish", seed=2, steps=4, guidance=1.0),
    Job("two trees", negative_prompt="snow", seed=3, steps=5, guidance=2.0),
    Job("two trees", seed=4, steps=6, guidance=5.0, skip=3),
    Job("a moon", seed=5, steps=8, guidance=1.0, skip=7),
]


@pytest.fixture(scope="module", params=["tiny_sd", "tiny_sdxl"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.load(str(request.getfixturevalue(request.param)))


def start_for(engine: Engine, job: Job) -> Tensor | None:
    if not job.skip:
        return None
    donor = Job("a donor", seed=99, steps=job.steps, guidance=job.guidance)
    return engine.run(donor, keep=[job.skip]).kept[job.skip]


def alone(engine: Engine, jobs: list[Job]) -> list[Tensor]:
    return [engine.run(job, start_for(engine, job)).final for job in jobs]


def drain(engine: Engine) -> dict[int, Result | Exception]:
    outcomes: dict[int, Result | Exception] = {}
    while engine.busy:
        outcomes.update(engine.step())
    return outcomes


def final(outcome: Result | Exception) -> Tensor:
    assert isinstance(outcome, Result), outcome
    return outcome.final


def test_jobs_of_all_kinds_share_a_batch(engine: Engine) -> None:
    expected = alone(engine, MIXED)
    starts = [start_for(engine, job) for job in MIXED]
    tickets = [engine.admit(job, start) for job, start in zip(MIXED, starts, strict=True)]
    outcomes = drain(engine)
    for ticket, latents in zip(tickets, expected, strict=True):
        assert (final(outcomes[ticket]) - latents).abs().max() < TOLERANCE


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_keeps_to_itself_in_a_batch(tiny_sd: Path, sampler: str) -> None:
    engine = Engine.load(str(tiny_sd), sampler=sampler)
    expected = alone(engine, MIXED)
    starts = [start_for(engine, job) for job in MIXED]
    tickets = [engine.admit(job, start) for job, start in zip(MIXED, starts, strict=True)]
    outcomes = drain(engine)
    for ticket, latents in zip(tickets, expected, strict=True):
        scale = max(1.0, float(latents.abs().max()))
        assert (final(outcomes[ticket]) - latents).abs().max() < TOLERANCE * scale


@settings(max_examples=15, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(MIXED)), min_size=1, max_size=7),
    max_batch=st.integers(1, 5),
    wide=st.sets(st.integers(0, 6)),
)
def test_any_interleaving_gives_everyone_their_own_picture(
    tiny_engine: Engine, arrivals: list[tuple[int, Job]], max_batch: int, wide: set[int]
) -> None:
    tiny_engine.max_batch = 32
    jobs = [
        Job(job.prompt, seed=job.seed + i, steps=job.steps, guidance=job.guidance, width=48)
        if i in wide
        else job
        for i, (_, job) in enumerate(arrivals)
    ]
    starts = [start_for(tiny_engine, job) for job in jobs]
    expected = [tiny_engine.run(job, s).final for job, s in zip(jobs, starts, strict=True)]
    tiny_engine.max_batch = max_batch
    tickets: dict[int, int] = {}
    outcomes: dict[int, Result | Exception] = {}
    for now in range(10):
        for i, (at, _) in enumerate(arrivals):
            if at == now:
                tickets[tiny_engine.admit(jobs[i], starts[i])] = i
        outcomes.update(tiny_engine.step())
    outcomes.update(drain(tiny_engine))
    assert len(outcomes) == len(jobs)
    for ticket, i in tickets.items():
        assert (final(outcomes[ticket]) - expected[i]).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def tiny_engine(tiny_sd: Path) -> Engine:
    return Engine.load(str(tiny_sd))


def test_jobs_join_at_any_step_and_leave_when_done(tiny_engine: Engine) -> None:
    tiny_engine.max_batch = 32
    long = tiny_engine.admit(Job("a tree", steps=6, guidance=2.0))
    assert tiny_engine.step() == []
    short = tiny_engine.admit(Job("a key", steps=2, guidance=2.0))
    assert tiny_engine.step() == []
    assert [ticket for ticket, _ in tiny_engine.step()] == [short]
    assert list(drain(tiny_engine)) == [long]
    assert not tiny_engine.busy


def test_the_earliest_deadline_begins_first(tiny_engine: Engine) -> None:
    tiny_engine.max_batch = 1
    now = time.monotonic()
    tickets = {
        wait: tiny_engine.admit(Job("a tree", steps=2), deadline_s=now + wait)
        for wait in (3000.0, 1000.0, 2000.0)
    }
    assert list(drain(tiny_engine)) == [tickets[wait] for wait in (1000.0, 2000.0, 3000.0)]


def test_who_has_not_begun_by_the_deadline_is_dropped(tiny_engine: Engine) -> None:
    tiny_engine.max_batch = 1
    now = time.monotonic()
    first = tiny_engine.admit(Job("a tree", steps=2), deadline_s=now + 1000)
    late = tiny_engine.admit(Job("a fish", steps=2), deadline_s=now - 1)
    patient = tiny_engine.admit(Job("a boat", steps=2))
    outcomes = drain(tiny_engine)
    assert isinstance(outcomes[late], Expired)
    assert isinstance(outcomes[first], Result)
    assert isinstance(outcomes[patient], Result)


def test_steps_go_on_while_pictures_are_decoded(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_engine.max_batch = 32
    decoded = False
    monkeypatch.setattr(Decoding, "ready", property(lambda self: decoded))
    short = tiny_engine.admit(Job("a key", steps=1))
    dropped = tiny_engine.admit(Job("a cup", steps=1))
    long = tiny_engine.admit(Job("a tree", steps=4))
    assert tiny_engine.step() == []
    assert set(tiny_engine.in_flight) == {short, dropped, long}
    tiny_engine.cancel(dropped)
    assert tiny_engine.step() == []
    decoded = True
    assert [ticket for ticket, _ in tiny_engine.step()] == [short]
    decoded = False
    assert list(drain(tiny_engine)) == [long]  # waited for, once there is nothing else to do


@torch.inference_mode()
def test_compiled_batches_are_padded_to_a_few_sizes(tiny_sd: Path) -> None:
    torch._dynamo.reset()
    unet = Engine.load(str(tiny_sd)).pipeline.unet
    counter = CompileCounter()
    forward = Forward(unet, compiled=True, backend=counter)
    compiled = []
    for rows in (3, 4, 5):
        x, times, states = torch.randn(rows, 4, 16, 16), torch.rand(rows), torch.randn(rows, 24, 32)
        out = forward(x, times, states)
        assert out.shape == x.shape
        assert (out - unet(x, times, states).sample).abs().max() < TOLERANCE
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[1] < compiled[2]


def test_a_cancelled_job_leaves_the_others_alone(tiny_engine: Engine) -> None:
    tiny_engine.max_batch = 2
    kept, dropped, waiting = (
        tiny_engine.admit(Job(f"prompt {i}", seed=i, steps=4, guidance=2.0)) for i in range(3)
    )
    tiny_engine.step()
    tiny_engine.cancel(dropped)
    tiny_engine.cancel(waiting)
    outcomes = drain(tiny_engine)
    assert list(outcomes) == [kept]
    tiny_engine.max_batch = 32
    expected = tiny_engine.run(Job("prompt 0", seed=0, steps=4, guidance=2.0)).final
    assert (final(outcomes[kept]) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_batch_that_does_not_fit_is_halved_and_nobody_fails(
    tiny_sd: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(str(tiny_sd))
    jobs = [Job(f"prompt {i}", seed=i, steps=3, guidance=1.0) for i in range(7)]
    expected = alone(engine, jobs)
    module = engine.pipeline.unet if part == "unet" else engine.pipeline.vae.decoder
    limit_memory(module, 2, monkeypatch)
    tickets = [engine.admit(job) for job in jobs]
    outcomes = drain(engine)
    for ticket, latents in zip(tickets, expected, strict=True):
        assert (final(outcomes[ticket]) - latents).abs().max() < TOLERANCE
    assert (engine.max_batch <= 3) == (part == "unet")


def test_a_job_that_does_not_fit_alone_fails_and_the_engine_goes_on(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(str(tiny_sd))
    limit_memory(engine.pipeline.unet, 1, monkeypatch)
    guided = engine.admit(Job("two rows", steps=3, guidance=4.0))
    plain = engine.admit(Job("one row", steps=3, guidance=1.0))
    outcomes = drain(engine)
    assert isinstance(outcomes[guided], NotEnoughMemory)
    assert isinstance(outcomes[plain], Result)


def test_a_job_that_cannot_be_done_fails_alone(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(str(tiny_sd))
    encode = engine.pipeline.encode_prompt

    def fussy(prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        if "a poison" in prompts:
            raise RuntimeError("unheard of")
        return encode(prompts, *args, **kwargs)

    monkeypatch.setattr(engine.pipeline, "encode_prompt", fussy)
    tickets = [
        engine.admit(Job(prompt, steps=3)) for prompt in ("a fish", "a poison", "a boat", "a cup")
    ]
    outcomes = drain(engine)
    assert str(outcomes.pop(tickets[1])) == "unheard of"
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
    assert len(outcomes) == 3
    assert engine.max_batch == 32


def limit_memory(module: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module run out of memory above so many rows."""
    forward = module.forward

    def limited(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) > rows:
            raise torch.OutOfMemoryError("no room")
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(module, "forward", limited)
