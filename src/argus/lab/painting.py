"""Makes many pictures with one engine, in full batches and with few in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from argus.core.job import Job
from argus.engine.engine import Engine, Result

T = TypeVar("T")


@dataclass(frozen=True)
class Commission(Generic[T]):
    """A job for `paint`, the latents it starts from, the K to keep, and the caller's key `of`."""

    of: T
    job: Job
    start: Tensor | None = None
    keep: Collection[int] = ()


def paint(
    engine: Engine, commissions: Iterable[Commission[T]]
) -> Iterator[tuple[Commission[T], Result]]:
    """Run jobs on an engine without other jobs; results come as they are finished.

    Takes from `commissions` only what the engine has room for. Raises the error that ends a job.
    """
    waiting, tickets = iter(commissions), dict[int, Commission[T]]()
    exhausted = False
    while True:
        while not exhausted and len(tickets) < engine.max_batch:
            one = next(waiting, None)
            if one is None:
                exhausted = True
            else:
                tickets[engine.admit(one.job, one.start, one.keep)] = one
        if not tickets:
            return
        for ticket, outcome in engine.step():
            if isinstance(outcome, Exception):
                raise outcome
            yield tickets.pop(ticket), outcome
