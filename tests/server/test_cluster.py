"""How a server finds its Ray cluster, and is let in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from argus.config import Settings
from argus.core.errors import BadRequest
from argus.server.cluster import open_cluster

CLUSTER = """
from ray.cluster_utils import Cluster
head = {"include_dashboard": False, "object_store_memory": 100 << 20, "num_cpus": 1}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(cluster.address, flush=True)
input()
cluster.shutdown()
"""
DRIVER = """
import sys
from argus.config import Settings
from argus.server.cluster import open_cluster
cluster = open_cluster(Settings(workers="ray", ray_address=sys.argv[1]))
print("slots", len(cluster.slots()))
"""


def test_a_missing_token_is_said_before_ray_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadRequest, match="`ray get-auth-token --generate` makes one"):
        open_cluster(Settings(workers="ray", ray_address="127.0.0.1:6379"))


@pytest.mark.cluster
def test_a_cluster_with_a_token_lets_a_server_in_that_has_it(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-this-test")
    given = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    given |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    nodes = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=given | {"RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    try:
        assert nodes.stdout is not None
        line = ""
        while ":" not in line or " " in line:
            line = nodes.stdout.readline()
            assert line, "the cluster ended"
        driver = [sys.executable, "-c", DRIVER, line.strip()]
        done = subprocess.run(driver, env=given, capture_output=True, text=True)
        assert "slots 1" in done.stdout, done.stderr
    finally:
        nodes.communicate("\n")
