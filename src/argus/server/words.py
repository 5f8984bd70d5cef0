"""Words of prompts that the family does not know, where it can tell."""

from __future__ import annotations

import logging

from argus.core.errors import named
from argus.core.family import Family
from argus.lab.prompts import ideas_of
from argus.lab.workload import Reader

log = logging.getLogger(__name__)

MOST = 32  # that an answer names


class Words:
    """Reads prompts by the source of the family's own ones, if that is a `Reader`."""

    def __init__(self, family: Family) -> None:
        self._reader: Reader | None = None
        if family.ideas is not None:
            try:
                ideas = ideas_of(family)
            except Exception as error:  # of a class of somebody's own
                log.warning("Words of prompts cannot be read: %s", named(error))
            else:
                self._reader = ideas if isinstance(ideas, Reader) else None

    def unknown(self, prompt: str) -> list[str] | None:
        """The words that the family does not know; None if it cannot tell."""
        if self._reader is None:
            return None
        try:
            return self._reader.unknown_words(prompt)[:MOST]
        except Exception as error:  # its message may quote the prompt
            log.warning("A prompt's words cannot be read (%s)", type(error).__name__)
            return None
