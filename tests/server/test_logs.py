"""What a line of the log looks like, and which request it belongs to."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from argus.server.logs import REQUEST_ID, Json, WithoutMessages
from argus.workers.worker import WorkerError
from tests.server.running import Running

TEXT = WithoutMessages("%(levelname)s %(name)s: %(message)s")


@pytest.fixture
def of_job_7() -> Iterator[None]:
    token = REQUEST_ID.set("job-7")
    yield
    REQUEST_ID.reset(token)


def record(error: Exception | None = None) -> logging.LogRecord:
    info = None
    if error is not None:
        try:
            raise error
        except Exception:
            info = sys.exc_info()
    return logging.LogRecord("argus.a", logging.WARNING, "", 0, "%d \u2026", (3,), info)


def test_a_line_is_text(of_job_7: None) -> None:
    assert TEXT.format(record()) == "WARNING argus.a: 3 … [job-7]"


def test_what_belongs_to_no_request_names_none() -> None:
    assert TEXT.format(record()) == "WARNING argus.a: 3 …"
    assert "request_id" not in json.loads(Json().format(record()))


def test_a_line_is_an_object_with_where_an_error_was_and_not_what_it_says(of_job_7: None) -> None:
    line = Json().format(record(ValueError("a secret prompt")))
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("warning", "argus.a", "3 …")
    assert found["request_id"] == "job-7"
    assert found["time"].endswith("+00:00")
    assert found["exception"].endswith("ValueError")
    assert "secret" not in line


def test_what_happens_to_a_request_is_logged_with_its_id(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise WorkerError("it failed on 'a secret fish'")

    monkeypatch.setattr(server.service.workers[0], "run", fail)
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(TEXT)
    log = logging.getLogger("argus")
    log.addHandler(handler)
    try:
        body, headers = {"prompt": "a secret fish"}, {"X-Request-Id": "job-8"}
        answer = server.http.post("/v1/images/generations", json=body, headers=headers)
    finally:
        log.removeHandler(handler)
    assert (answer.status_code, answer.headers["x-request-id"]) == (503, "job-8")
    (line,) = (one for one in lines.getvalue().splitlines() if "A request failed" in one)
    assert line.endswith("[job-8]")
    assert "secret" not in lines.getvalue()
