"""What is known of the latent store: whether it answers, and whether asking makes sense now."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

MEMORY = 0.05  # of the share of usable latents, a fetch
HOPE_S = 600.0  # in which a store that nobody asks is believed to have mended, by two thirds
SHUT_AT = 5  # failures in a row
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


class Breaker:
    """A circuit breaker (Nygard, Release It!): after some failures in a row nobody asks any more,
    but for one try after a pause, which grows with every try that fails.

    `usable` is the share of fetches that brought latents in time, lately; it rises with time, so
    that those who plan by it ask again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures, self._pause_s = 0, FIRST_PAUSE_S
        self._next_try: float | None = None
        self._trying = False
        self._usable, self._hoped_at = 1.0, clock()

    @property
    def usable(self) -> float:
        now = self._clock()
        if not self.open:
            since = max(self._hoped_at, self._next_try or -math.inf)
            hope = math.exp((since - now) / HOPE_S)
            self._usable = 1 - hope * (1 - self._usable)
        self._hoped_at = now
        return self._usable

    @property
    def open(self) -> bool:
        """Whether nobody is to ask."""
        if self._next_try is None:
            return False
        return self._trying or self._clock() < self._next_try

    def begin(self) -> None:
        """Somebody asks."""
        self._trying = self._next_try is not None

    def abandon(self) -> None:
        """Who asked waits no longer; somebody else may try."""
        self._trying = False

    def success(self) -> None:
        if self._next_try is not None:
            log.warning("The latent store answers again")
        self._failures, self._pause_s, self._next_try = 0, FIRST_PAUSE_S, None
        self._trying = False
        self._usable = self.usable + MEMORY * (1 - self.usable)

    def failure(self) -> None:
        self._failures += 1
        self._usable = (1 - MEMORY) * self.usable
        if self._next_try is not None:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if self._failures >= SHUT_AT:
            if self._next_try is None:
                log.warning("The latent store does not answer; going on without it")
            self._next_try = self._clock() + self._pause_s
            self._usable = 0.0
        self._trying = False
