"""A small table: the exact model with two skips, and a model half as dear."""

from __future__ import annotations

import numpy as np

from argus.control.policy import Cluster, PlanningInput
from argus.control.request import Request
from argus.control.variants import VariantTable

EXACT, SKIP, FAR, SMALL = range(4)


def small_table(types: int = 1) -> VariantTable:
    alone = np.array([[0.1, 0.04]]).repeat(types, axis=0) * np.arange(1, types + 1)[:, None]
    batches = np.array([1, 2, 4])
    return VariantTable(
        variants=("exact", "skip-5", "skip-10", "small"),
        strategies=("exact", "cache", "cache", "model"),
        models=("large", "little"),
        types=tuple(f"type-{d}" for d in range(types)),
        model=np.array([0, 0, 0, 1]),
        steps=np.array([20.0, 15.0, 10.0, 20.0]),
        skip=np.array([0, 5, 10, 0]),
        least_similarity=np.array([0.0, 0.6, 0.8, 0.0]),
        mean_quality=np.array([1.0, 0.97, 0.9, 0.8]),
        batches=batches,
        step_s=alone[:, :, None] * batches / np.array([1.0, 1.3, 1.6]),
        load_s=np.full((types, 2), 10.0),
    )


def asked(quality: list[float], near: float | None = 0.9, slack_s: float = 20.0) -> Request:
    return Request(quality, [True, near is not None, near is not None, True], slack_s, near)


def cluster(models: list[int], wait_s: list[float] | None = None) -> Cluster:
    count = len(models)
    return Cluster(0.0, [0] * count, models, wait_s or [0.0] * count, [1] * count)


def inputs(
    rate: float, quality: list[list[float]], models: list[int], now_s: float = 0.0
) -> PlanningInput:
    count = len(models)
    return PlanningInput(
        now_s=now_s,
        rate=rate,
        quality=np.array(quality).reshape(len(quality), 4),
        allowed=np.ones((len(quality), 4), dtype=bool),
        slo=np.zeros(len(quality), dtype=np.int64),
        kinds=np.zeros(count, dtype=np.int64),
        models=np.array(models),
        alive=np.ones(count, dtype=bool),
        wait_s=np.zeros(count),
    )
