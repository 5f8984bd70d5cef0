"""The latent store's circuit breaker: whether it answers, and whether to ask it now."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

MEMORY = 0.05  # weight of one fetch in the share of usable latents
TRUSTED = 0.99  # share of usable latents below which the store is probed
PROBE_S = 1.0  # between probes
FETCH_SHARE = 0.5  # of the time to a deadline, for a fetch
LEAST_S = 0.01  # a fetch with less time is not begun: its failure would say nothing
SHUT_AT = 5  # failures in a row that open the breaker
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


class Breaker:
    """A circuit breaker (Nygard, Release It!): after `SHUT_AT` failures in a row no fetch begins,
    except for one trial after a pause, which doubles with every trial that fails.

    `usable` is the recent share of fetches that brought latents in time. Policies that plan by it
    keep requests away from a failing store, so that no request would show its recovery. The store
    is therefore `doubted` until fetches succeed for a while, and probed meanwhile. `clock` gives
    seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures, self._pause_s = 0, FIRST_PAUSE_S
        self._next_try: float | None = None
        self._trying = False
        self.usable = 1.0

    @property
    def open(self) -> bool:
        """Whether no fetch may begin now."""
        if self._next_try is None:
            return False
        return self._trying or self._clock() < self._next_try

    @property
    def failing(self) -> bool:
        """Whether the store was given up and has not been found to answer since."""
        return self._next_try is not None

    @property
    def doubted(self) -> bool:
        return self.usable < TRUSTED

    def begin(self) -> bool:
        """Begin a fetch. Returns whether it is the trial of an open breaker; `abandon` and
        `failure` take that flag, since fetches begun before the breaker opened may still end."""
        trial = self._next_try is not None
        self._trying = trial
        return trial

    def abandon(self, trial: bool) -> None:
        """A fetch was cancelled. If it was the trial, the next fetch is the trial."""
        if trial:
            self._trying = False

    def success(self) -> None:
        if self._next_try is not None:
            log.warning("The latent store answers again")
        self._failures, self._pause_s, self._next_try = 0, FIRST_PAUSE_S, None
        self._trying = False
        self.usable += MEMORY * (1 - self.usable)

    def failure(self, trial: bool) -> None:
        """A fetch failed. While the breaker is open only the trial counts."""
        if self._next_try is not None and not trial:
            return
        self._failures += 1
        self.usable *= 1 - MEMORY
        if self._next_try is not None:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if self._failures >= SHUT_AT:
            if self._next_try is None:
                log.warning("The latent store does not answer; going on without it")
            self._next_try = self._clock() + self._pause_s
            self.usable = 0.0
        self._trying = False
