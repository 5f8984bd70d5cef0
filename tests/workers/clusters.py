"""Real Ray clusters of several nodes on this machine, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def ray_nodes(**head: Any) -> Iterator[Any]:
    """A cluster of one node with the given resources; `add_node` and `remove_node` change it."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    cluster = utils.Cluster(
        initialize_head=True,
        head_node_args={"include_dashboard": False, "object_store_memory": 100 << 20, **head},
    )
    try:
        yield cluster
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
