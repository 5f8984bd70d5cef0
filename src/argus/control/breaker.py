"""What is known of the latent store: whether it answers, and whether asking makes sense now."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

MEMORY = 0.05  # of the share of usable latents, a fetch
TRUSTED = 0.99  # a share below which the store is asked for its own sake
PROBE_S = 1.0  # between such questions
FETCH_SHARE = 0.5  # of what is left of a deadline, for latents to come
LEAST_S = 0.01  # a fetch with less time is not begun: its failure would say nothing
SHUT_AT = 5  # failures in a row
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


class Breaker:
    """A circuit breaker (Nygard, Release It!): after some failures in a row nobody asks any more,
    but for one try after a pause, which grows with every try that fails.

    `usable` is the share of fetches that brought latents in time, lately. Those who plan by it keep
    requests away from a store that fails, and then nobody would learn that it has mended: it is
    `doubted` until it was found good for a while, and asked now and then though nobody needs it.
    `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures, self._pause_s = 0, FIRST_PAUSE_S
        self._next_try: float | None = None
        self._trying = False
        self.usable = 1.0

    @property
    def open(self) -> bool:
        """Whether nobody is to ask."""
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
        """A fetch begins. Returns whether it is the trial of an open breaker; `abandon` and
        `failure` take that answer, since fetches begun before it opened may still end."""
        trial = self._next_try is not None
        self._trying = trial
        return trial

    def abandon(self, trial: bool) -> None:
        """A fetch was cancelled; if it was the trial, the next fetch is."""
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
