"""The worker of docs/examples does what every kind of worker does."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from argus.workers.worker import Worker
from tests.workers.test_contract import (  # noqa: F401
    Kind,
    own_engine,
    runner,
    test_a_job_that_cannot_be_done_fails_alone,
    test_a_model_that_cannot_be_loaded_is_said_and_another_can_take_its_place,
    test_cancelling_frees_the_work,
    test_it_holds_another_model_once_its_jobs_are_done,
    test_it_makes_the_engine_s_picture_and_hands_up_latents,
    test_it_shows_unfinished_pictures_in_order,
    test_one_that_dies_is_replaced_and_no_job_is_lost,
    test_stopping_finishes_running_jobs_within_the_grace,
    worker,
)

FILE = Path(__file__).parents[2] / "docs" / "examples" / "new_worker.py"

pytestmark = pytest.mark.slow  # every process of it imports torch anew


def example() -> Any:
    spec = importlib.util.spec_from_file_location("new_worker", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["new_worker"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kind() -> Kind:
    module = example()

    def kill(one: Worker) -> None:
        assert isinstance(one, module.CommandWorker) and one.pid is not None
        os.kill(one.pid, signal.SIGKILL)

    return Kind(module.CommandWorker, kill)
