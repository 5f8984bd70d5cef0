"""Decides variant and worker of a request: the pinned variant, the exact one outside a rollout's
share, or the policy's choice."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from argus.control.policies import new_policy
from argus.control.policy import NOTHING, Cluster, Decision, Policy, Slo, first_free
from argus.control.variants import EXACT, VariantTable
from argus.core.errors import BadRequest, Expired, ModelError
from argus.core.family import EXACT as EXACT_NAME
from argus.core.family import skip_name
from argus.server.model import ServedFamily
from argus.server.planning import Planning
from argus.server.predictions import Predictions
from argus.server.request import ImageRequest
from argus.server.retrieval import Retrieval
from argus.server.schema import Candidate
from argus.server.scoring import ScoringThread
from argus.server.slo import Classes
from argus.workers.fleet import Fleet, Yielded
from argus.workers.worker import WorkerError

log = logging.getLogger(__name__)

UNGOVERNED_S = 300.0  # `timeout_s` of requests that the policy does not decide, unless it is set
FUTURE = ("oracle",)  # policies that know the future
LATE = "it would be late"
MEASURELESS = ("nirvana", "clipper-ha")  # policies that use no costs


class Router:
    """Decides for prepared requests. The server makes it once workers are ready; `classes` are the
    SLO classes in force."""

    def __init__(
        self,
        model: ServedFamily,
        planning: Planning,
        classes: Classes,
        fleet: Fleet,
        retrieval: Retrieval,
        predictions: Predictions,
        scorer: ScoringThread | None = None,
    ) -> None:
        self._family, self._table = model.family, model.table
        self.planning, self.classes = planning, classes
        self._controller = planning.controller
        self._fleet, self._retrieval = fleet, retrieval
        self._predictions, self._scorer = predictions, scorer
        self._numbers = {name: v for v, name in enumerate(model.table.variants)}
        self._models = model.table.model.tolist()
        self._skips = model.table.skip.tolist()
        self._mean = model.table.mean_quality.tolist()
        same = model.table.model == model.table.model[EXACT]
        self._exact_model: list[bool] = same.tolist()
        variants = [model.variants[name] for name in model.table.variants]
        self._steps_run = [variant.steps - variant.skip for variant in variants]
        self._guided = [variant.guidance > 1 for variant in variants]
        self._alone_s = model.table.alone_s.tolist()
        self._by_cost = np.argsort(model.table.alone_s.min(axis=-1), kind="stable").tolist()

    def arrived(self, request: ImageRequest) -> None:
        """Count a request as demand for the planner. One that is not governed counts as exact
        demand; one that is pinned or in the background is not counted."""
        if request.pinned or request.background:
            return
        self._update(request, self._stored(request))
        if not request.governed:
            request.allowed = [v == EXACT for v in range(len(request.allowed))]
        self._controller.arrived(request)

    async def decide(self, request: ImageRequest) -> Decision:
        """The decision for a request; its worker is None if the request is to be shed.

        Raises Yielded for a background request for which no worker has room now, Expired for a
        request that was routed again for lack of time and fits no variant, and WorkerError when no
        worker can hold the model of a pinned variant.
        """
        decision = await self._decided(request)
        if request.explain:
            request.candidates = self._candidates(request, decision)
        return decision

    async def _decided(self, request: ImageRequest) -> Decision:
        stored = self._stored(request)
        if request.pinned:
            self._update(request, stored)
            variant, reason = self._pinned(request, stored)
            return await self._held(variant, reason, request)
        self._update(request, () if self._retrieval.shut else stored)
        if request.replacement is not None:
            return await self._held(request.replacement, "the first picture was doubted", request)
        decision = await self._routed(request)
        if not request.governed:
            made = await self._held(EXACT_NAME, self._would_be(decision, request), request)
            return replace(made, instead_of=decision)
        if request.latents_unusable and decision.worker is not None:
            reason = f"{decision.reason}; the neighbour's latents are unusable"
            return replace(decision, reason=reason)
        return decision

    async def _routed(self, request: ImageRequest) -> Decision:
        cluster = self.planning.cluster()
        if request.yields:
            models = enumerate(cluster.models)
            cluster.models = [m if self._fleet.spare(w) else NOTHING for w, m in models]
        for workers in cluster.rather_without(request.failed_at):
            decision = self._of_policy(request, workers)
            if self._can_be(decision, request):
                break
        if decision.worker is not None and not request.allowed[decision.variant]:
            decision = await self._allowed(request, decision)
        if decision.worker is None and self.planning.settling and not request.background:
            best, reason = self._best(request), "workers load what the policy wants, which is new"
            decision = replace(best, reason=reason)
        if request.governed and decision.worker is None and self._fleet.idle and self._fleet.ready:
            decision = self._best_effort(request, f"{decision.reason}, and no other request waits")
        if request.background and decision.worker is None:
            if not self._fleet.idle:
                raise Yielded
            if request.allowed[EXACT]:
                reason = f"{decision.reason}, and a worker has time to load the exact model"
                decision = await self._held(EXACT_NAME, reason, request)
        hopeless = decision.worker is None or decision.variant == request.too_late_for
        if request.too_late_for >= 0 and hopeless:
            raise Expired("The deadline left no time to make the picture.")
        return decision

    def _of_policy(self, request: ImageRequest, cluster: Cluster) -> Decision:
        if request.cheapest:
            return self._cheapest(request, cluster)
        return self._controller.route(request, cluster)

    def _can_be(self, decision: Decision, request: ImageRequest) -> bool:
        """Whether a decision has a worker make what the request allows and is not too late for."""
        v = decision.variant
        return decision.worker is not None and request.allowed[v] and v != request.too_late_for

    def _cheapest(self, request: ImageRequest, cluster: Cluster) -> Decision:
        """The policy's decision among the cheapest of the allowed variants that can be in time;
        among all of them if it finds that one too slow."""
        request.slack_s = (request.deadline_s - cluster.now_s) / cluster.slowness
        allowed = request.allowed
        able = (
            v for v in self._by_cost
            if allowed[v] and v != request.too_late_for and self._in_time(request, v, cluster)
        )  # fmt: skip
        chosen = next(able, None)
        if chosen is not None:
            request.allowed = [v == chosen for v in range(len(allowed))]
            decision = self._controller.route(request, cluster)
            if decision.worker is not None:
                return decision
            request.allowed = allowed
        return self._controller.route(request, cluster)

    def _in_time(self, request: ImageRequest, v: int, cluster: Cluster) -> bool:
        """Whether a worker that holds the variant's model can make it before the deadline, alone
        in its batch."""
        share = request.size_factor * (request.exact_share if v == EXACT else 1.0)
        model, alone_s = self._models[v], self._alone_s[v]
        return any(
            held == model and wait + share * alone_s[kind] <= request.slack_s
            for kind, held, wait in zip(cluster.kinds, cluster.models, cluster.wait_s, strict=True)
        )

    def _best_effort(self, request: ImageRequest, reason: str) -> Decision:
        """The best picture that a worker can make now, even if late, when no other request is
        queued."""
        best = self._best(request)
        return replace(best, reason=reason, best_effort=best.worker is not None)

    async def _allowed(self, request: ImageRequest, decision: Decision) -> Decision:
        """The best variant that the request allows, for policies that know no such limits. Where no
        worker can make any, one loads the exact model."""
        reason = f"the request does not allow {self._table.variants[decision.variant]}"
        best = self._best(request)
        if best.worker is None and request.too_late_for != EXACT and self._loadable(request):
            try:
                return await self._held(EXACT_NAME, reason, request)
            except WorkerError:
                return replace(best, reason=f"{reason}, and no worker holds the exact model")
        return replace(best, reason=reason)

    def _loadable(self, request: ImageRequest) -> bool:
        """Whether a worker can load the exact model and make the picture in time."""
        load_s = float(self._table.load_s[:, self._models[EXACT]].min())
        share = request.size_factor * request.exact_share
        return bool(load_s + share * min(self._alone_s[EXACT]) <= request.slack_s)

    def _best(self, request: ImageRequest) -> Decision:
        """The best picture that a worker can make in time with the model it holds, one that the
        request failed at only where no other can; if none can be in time, the best of all."""
        clusters = self._fleet.cluster().rather_without(request.failed_at)
        for in_time, cluster in itertools.product((True, False), clusters):
            able = [
                v for v, allowed in enumerate(request.allowed)
                if allowed and v != request.too_late_for and self._models[v] in cluster.models
                and (not in_time or self._in_time(request, v, cluster))
            ]  # fmt: skip
            if able:
                best = max(able, key=lambda v: request.quality[v])
                return Decision(best, first_free(cluster, self._models[best]), "")
        return Decision(EXACT, None, "")

    async def _held(self, variant: str, reason: str, request: ImageRequest) -> Decision:
        """A decision without the policy, for the worker with the variant's model that is free
        first; a worker loads the model if none has it: for a background request only while no
        other request is queued or runs. Raises Yielded else."""
        v = self._numbers[variant]
        model = int(self._table.model[v])
        if model not in self._fleet.wanted:
            if request.background and not self._fleet.idle:
                raise Yielded
            self._fleet.require(model)
        slack_s = request.limit_s - time.monotonic()
        limit_s = max(0.0, min(slack_s, UNGOVERNED_S))
        worker = await self._fleet.holding(
            model, limit_s, request.failed_at, insist=not request.background
        )
        return Decision(v, worker, reason)

    def _pinned(self, request: ImageRequest, stored: Sequence[int]) -> tuple[str, str]:
        if request.own_steps:
            return EXACT_NAME, "the request pins the number of steps"
        variant = request.pinned_variant or EXACT_NAME
        skip = self._family.variants[variant].skip
        usable = self._family.usable_skip(skip, tuple(stored)) if skip else skip
        if usable != skip:
            return skip_name(usable), f"no latents for the pinned {variant} are cached"
        return variant, "the request pins this variant"

    def _candidates(self, request: ImageRequest, decision: Decision) -> list[Candidate]:
        """What was known of every variant at a decision, in the table's order."""
        usable = request.pinned or not self._retrieval.shut
        self._update(request, self._stored(request) if usable else ())
        made = decision if decision.instead_of is None else decision.instead_of
        options = {one[1]: one for one in sorted(made.options)}  # each variant's best worker
        shortest_s = min(slo.deadline_s for slo in self.classes.slos(self._fleet.scale))
        costs_s = self._table.cost_s(shortest_s).min(axis=1).tolist()
        mean = low = [math.nan] * len(costs_s)
        if request.prediction is not None:
            mean = request.beside_exact(request.prediction.mean).tolist()
            low = request.beside_exact(request.prediction.low).tolist()
        cluster, found = self._fleet.cluster(), []
        for v, name in enumerate(self._table.variants):
            cost_s = request.size_factor * (request.exact_share if v == EXACT else 1) * costs_s[v]
            worth = paid = risk = excluded = None
            if v in options:
                worth, _, _, price, _, cost_s = options[v]
                paid = price * cost_s
                risk = request.quality[v] - paid - worth
            elif v != decision.variant:
                excluded = self._excluded(request, v, low[v], cluster)
                if excluded is None and options:  # the others were weighed, and this one was not
                    floor = request.slo_class.floor
                    known = "predicted" if self.informed else "usual"
                    unfit = f"its {known} quality is below the SLO class's floor, {floor:g}"
                    excluded = unfit if request.quality[v] < floor else LATE
            found.append(
                Candidate(
                    variant=name,
                    predicted_quality=_known(mean[v]),
                    quality_bound=_known(low[v]),
                    cost_ms=round(1000 * cost_s * self._fleet.scale, 2),
                    paid=_known(paid),
                    risk=_known(risk),
                    worth=_known(worth),
                    excluded=excluded,
                )
            )
        return found

    def _excluded(self, request: ImageRequest, v: int, low: float, cluster: Cluster) -> str | None:
        """Why a variant could not serve a request, a pin aside; None if it could."""
        least = max(request.least_quality, request.slo_class.floor)
        if not request.allowed[v]:
            if self._skips[v] and request.neighbour is None:
                return "no neighbour in the cache" if request.looked_up else "the cache is not used"
            if self._skips[v] and (request.latents_unusable or self._retrieval.shut):
                return "the neighbour's latents cannot be had"
            if self._skips[v] and self._skips[v] not in self._stored(request):
                return "the neighbour has no latents for it"
            if least > 0 and not low >= least:
                return f"its bound is below the least quality, {least:g}"
            return "the request's fields rule it out"
        if self._models[v] not in cluster.models:
            return "no worker holds its model now"
        if not request.pinned and not self._in_time(request, v, cluster):
            return LATE
        return "a cheaper one is good enough" if request.cheapest else None

    async def replacement(
        self, request: ImageRequest, decision: Decision, image: Image.Image
    ) -> str | None:
        """The variant that replaces a picture which the policy rejects; None if it accepts the
        picture, the picture cannot be scored, no time is left for that, or the policy reviews no
        pictures.

        Raises WorkerError where the family has no scorer or no predictor.
        """
        if not self._controller.policy.reviews or not request.governed or request.pinned:
            return None
        predictor = self._predictions.predictor
        if self._scorer is None or predictor is None:
            raise WorkerError("This policy judges pictures: it needs a scorer and a predictor.")
        left_s = request.deadline_s - time.monotonic()
        if left_s <= 0:
            return None
        try:
            (score,) = await self._scorer.scores(request.prompt, [image], left_s)
            judged = predictor.quality_of(score)
        except TimeoutError:
            log.warning("The scorer did not answer in time: a picture is sent without a judgement")
            return None
        except Exception as error:  # its message may quote the prompt
            if not isinstance(error, BadRequest):
                log.warning("Pictures cannot be judged (%s)", type(error).__name__)
            return None
        found = self._controller.policy.review(request, decision.variant, judged)
        return None if found is None else self._table.variants[found]

    @property
    def informed(self) -> bool:
        """Whether the policy looks at predictions."""
        return self._controller.policy.informed

    def prices(self) -> Mapping[int, float]:
        """The price of a worker-second now, by number of the model, where the policy has some."""
        return self._controller.policy.prices(self.planning.cluster())

    def retry_after_s(self, request: ImageRequest) -> int:
        """Estimated seconds until the queues are short enough for such a request."""
        wait_s = shortest_wait_s(self._fleet.cluster()) or 0.0
        cheapest_s = request.size_factor * float(self._table.alone_s.min())
        slack_s = request.slack_s if math.isfinite(request.slack_s) else 0.0
        return max(1, math.ceil((wait_s + cheapest_s - slack_s) * self._fleet.scale))

    def saved_s(self, request: ImageRequest, variant: int) -> float:
        """Worker-seconds that a variant saves against the request's exact picture, each alone in
        its batch."""
        if variant == EXACT:
            return 0.0
        alone = self._table.alone_s
        saved_s = request.exact_share * float(alone[EXACT].min()) - float(alone[variant].min())
        return request.size_factor * saved_s * self._fleet.scale

    def _stored(self, request: ImageRequest) -> Sequence[int]:
        """The steps K for which the neighbour's latents can be fetched."""
        if request.neighbour is None or request.latents_unusable:
            return ()
        return request.neighbour.skips

    def _update(self, request: ImageRequest, stored: Sequence[int]) -> None:
        """Set what the policy needs: the variants that can serve the request, given the `stored`
        latents, and their predicted quality."""
        prediction, neighbour = request.prediction, request.neighbour
        allowed = [not k or k in stored for k in self._skips]
        least = max(request.least_quality, request.slo_class.floor)
        if prediction is not None and least > 0:
            low = request.beside_exact(prediction.low).tolist()
            allowed = [a and bound >= least for a, bound in zip(allowed, low, strict=True)]
        elif least > 0:
            allowed = [v == EXACT for v in range(len(allowed))]
        if request.own_guidance:
            allowed = [a and own for a, own in zip(allowed, self._exact_model, strict=True)]
        elif request.negative_prompt:  # without guidance it has no effect
            allowed = [a and guided for a, guided in zip(allowed, self._guided, strict=True)]
        if request.most_steps is not None:
            most, steps = request.most_steps, self._steps_run
            allowed = [a and (v == EXACT or steps[v] <= most) for v, a in enumerate(allowed)]
        request.allowed = allowed
        request.similarity = None if neighbour is None else neighbour.similarity
        if prediction is None or not self._controller.policy.informed:
            quality = self._mean
        else:
            mean = request.beside_exact(prediction.mean)
            quality = np.where(np.isnan(mean), 0.0, mean).tolist()
        request.quality = quality

    def _would_be(self, decision: Decision, request: ImageRequest) -> str:
        """The decision that the policy would have made, for requests that it does not govern."""
        if decision.worker is None:
            return f"shadow: Argus would have shed this request: {decision.reason}"
        reason = f"shadow: Argus would have made {self._table.variants[decision.variant]}"
        if request.prediction is None:
            return reason
        quality = request.beside_exact(request.prediction.mean)[decision.variant]
        return f"{reason}, of predicted quality {quality:.2f}"


def _known(value: float | None) -> float | None:
    """A rounded number; None for NaN."""
    return None if value is None or math.isnan(value) else round(value, 4)


def shortest_wait_s(cluster: Cluster) -> float | None:
    """Least seconds (of the variant table) until a serving worker can start one more request; None
    if no worker serves."""
    waits = [wait for wait, held in zip(cluster.wait_s, cluster.models, strict=True) if held >= 0]
    return min(waits, default=None)


def live_policy(name: str, table: VariantTable, slos: Sequence[Slo]) -> Policy:
    """The policy of a name. Raises BadRequest for an unknown one, and one that needs future
    arrivals."""
    if name in FUTURE:
        raise BadRequest(
            f"The policy {name!r} needs to know future arrivals: simulate it (`argus simulate`)."
        )
    return new_policy(name, table, slos)


def check_policy(name: str, model: ServedFamily) -> None:
    """Raises BadRequest and ModelError for a policy that cannot be used."""
    policy, family = live_policy(name, model.table, [Slo(math.inf)]), model.family
    if policy.reviews and family.scorer is None:
        raise ModelError(f"The policy {name} judges pictures, and {family.name} names no scorer.")
    if (policy.informed or policy.reviews) and model.predictor is None:
        raise ModelError(
            f"The policy {name} needs predictions, and {family.name} has no predictor: "
            "`argus calibrate` and `argus train` make one."
        )
    if name not in MEASURELESS and not model.profiled:
        raise ModelError(
            f"The policy {name} needs costs, and {family.name} has no profile on this device: "
            "`argus profile` makes one."
        )
