from __future__ import annotations

import pytest

from argus.core import machine
from argus.workers.process import ROOM


@pytest.fixture
def room() -> None:
    """Enough free memory for workers to load models ahead."""
    free, total = machine.memory()
    if free < 1.1 * ROOM * total:
        pytest.skip("Too little memory is free to load models ahead.")
