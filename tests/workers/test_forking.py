from __future__ import annotations

import subprocess
import sys

import pytest

from argus.workers import forking

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")


@LINUX
def test_workers_are_forked_for_the_cpu_only() -> None:
    assert forking.context("cpu").get_start_method() == "forkserver"
    assert forking.context("cuda:0").get_start_method() == "spawn"


@LINUX
def test_preparing_imports_nothing_heavy_here() -> None:
    """Else there was nothing to gain: both processes would import one after the other."""
    program = """
import sys
from multiprocessing import forkserver
import argus.cli.main
from argus.workers import forking
forking.prepare("cuda")
assert forkserver._forkserver._forkserver_pid is None
forking.prepare("cpu")
assert forkserver._forkserver._forkserver_pid is not None
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
