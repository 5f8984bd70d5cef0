"""The settings that must be equal for one run's latents to serve another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property


@dataclass(frozen=True)
class Scope:
    """The settings of a run, and its namespace. Entries match only within one scope.

    `namespace` keeps tenants apart; `width` and `height` are pixels.
    """

    namespace: str
    model: str
    sampler: str
    width: int
    height: int
    steps: int
    guidance: float
    negative_prompt: str

    @cached_property
    def key(self) -> str:
        """A short name, equal for equal scopes in every process."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
