"""Which variant serves a request: asks the policy in its own terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

from argus.control.menu import menu_of
from argus.control.policies import SERVED, new_policy
from argus.control.policy import Candidate, Cluster, Promise
from argus.core.errors import BadRequest
from argus.core.family import Family


@dataclass(frozen=True)
class Choice:
    """The name of the variant that serves a prompt, and why, for who reads the answer."""

    variant: str
    reason: str


class Router:
    """Raises BadRequest for a policy that cannot be served."""

    def __init__(self, family: Family, policy: str) -> None:
        if policy not in SERVED:
            raise BadRequest(f"There is no policy {policy!r} to serve by: use {', '.join(SERVED)}.")
        self._menu = menu_of(family)
        self._policy = new_policy(policy, self._menu, [Promise(math.inf)])
        self._worker = Cluster(0.0, [0], [int(self._menu.model[0])], [0.0], [0])
        self._quality = self._menu.mean_quality.tolist()

    def choose(self, similarity: float | None, stored: tuple[int, ...]) -> Choice:
        """For a prompt whose neighbour is so similar and has latents of the K in `stored`."""
        allowed = [not k or k in stored for k in self._menu.skip.tolist()]
        candidate = Candidate(self._quality, allowed, math.inf, similarity)
        decision = self._policy.route(candidate, self._worker)
        return Choice(self._menu.variants[decision.variant], decision.reason)
