from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from argus.config import Settings
from tests.server.running import Running, running


@pytest.fixture(scope="session")
def server(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server without keys; tests take prompts of their own, since they share its cache."""
    data = tmp_path_factory.mktemp("data")
    settings = Settings(family=str(tiny_family), data=data, queue_limit=8, workers=1)
    with running(settings) as server:
        yield server
