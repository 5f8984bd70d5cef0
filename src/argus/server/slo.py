"""SLO classes: the latency of an answer, and the least quality of its picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from argus.config import SloClass
from argus.control.policy import Slo
from argus.server.errors import invalid

DEFAULT = "default"
MARGIN = 0.2  # of a deadline, for what is not predicted: sending the answer, a busy machine


@dataclass(frozen=True)
class ServedSlo(Slo):
    """An SLO class in force, with its name and its index among the policy's SLOs."""

    name: str = DEFAULT
    index: int = 0


class Classes:
    """The classes of the settings, where the exact variant's picture takes `exact_s` alone.

    One is always named `default`. Without a setting for it, and without a profile (`measured`), it
    has no deadline.
    """

    def __init__(self, given: Mapping[str, SloClass], exact_s: float, measured: bool) -> None:
        named = {DEFAULT: SloClass(), **given}
        self._all = {
            name: ServedSlo(one.latency_s(exact_s), one.quality, name, index)
            for index, (name, one) in enumerate(named.items())
        }
        if not measured and DEFAULT not in given:
            self._all[DEFAULT] = ServedSlo(math.inf)
        self.exact_s = exact_s

    def __getitem__(self, name: str) -> ServedSlo:
        return self._all[name]

    def __iter__(self) -> Iterator[ServedSlo]:
        return iter(self._all.values())

    @property
    def all(self) -> list[ServedSlo]:
        return list(self._all.values())

    @property
    def shortest_s(self) -> float:
        return min(one.deadline_s for one in self._all.values())

    def slos(self, scale: float) -> list[Slo]:
        """For each class, the seconds for queueing and running, divided by `scale`, the fleet's
        slowness."""
        return [Slo((1 - MARGIN) * one.deadline_s / scale, one.floor) for one in self._all.values()]

    def __str__(self) -> str:
        return ", ".join(
            f"{one.name} {one.deadline_s:.2f} s"
            + (f" and quality {one.floor:g}" if one.floor else "")
            for one in self._all.values()
        )


def class_of(given: Mapping[str, SloClass], asked: str | None, tenant: str) -> str:
    """The SLO class that a request names, else its key's, else the default. Raises ApiError."""
    if asked is not None:
        if asked not in (*given, DEFAULT):
            names = ", ".join(dict.fromkeys((DEFAULT, *given)))
            raise invalid(f"There is no SLO class {asked!r}; the classes are {names}.", "argus.slo")
        return asked
    return next((name for name, one in given.items() if tenant in one.keys), DEFAULT)
