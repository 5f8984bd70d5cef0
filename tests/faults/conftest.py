from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from argus.config import Settings
from tests.server.running import Running, running

Serve = Callable[..., Running]


@pytest.fixture
def serve(measured_family: Path, tmp_path: Path) -> Iterator[Serve]:
    """Starts a server of two workers whose promise is generous, so that only faults break it."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Running:
            given: dict[str, Any] = {
                "family": str(measured_family),
                "data": tmp_path,
                "slo": {"default": {"latency": "30s"}},
                "workers": 2,
                "truth_share": 0.0,
            }
            return stack.enter_context(running(Settings(**(given | settings))))

        yield start
