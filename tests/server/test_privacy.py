"""What the server's log and files say of prompts: nothing that they need not."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sqlite3
from pathlib import Path

import httpx
import pytest
import sqlalchemy.exc

from argus.cache.catalogue import Catalogue
from argus.core.errors import named
from argus.server.logs import WithoutMessages, log_unhandled
from argus.workers.process import _told
from tests.server.running import served, wait_until

MARKER = "xylograph"  # in every prompt below
SCORER = '''
class Loud:
    """Cannot judge anything, and quotes what it was asked."""

    @classmethod
    def load(cls, source, device="cpu"):
        return cls()

    def score(self, prompts, images):
        raise ValueError(f"cannot judge {prompts}")
'''


@pytest.fixture
def loud_family(measured_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`measured_family` with a scorer that fails, for a server that is a process of its own."""
    (tmp_path / "loud.py").write_text(SCORER)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")
    for file in measured_family.parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    family = tmp_path / "tiny.yaml"
    family.unlink()
    kept = [line for line in measured_family.read_text().splitlines() if "scorer:" not in line]
    kept.insert(-1, '        scorer: {kind: "loud:Loud", source: none}')
    family.write_text("\n".join(kept))
    return family


def test_prompts_are_not_in_the_log(
    loud_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_TRUTH_SHARE", "1")
    monkeypatch.setenv("ARGUS_SLO", '{"default": {"latency": "60s"}}')
    data, log = tmp_path / "data", list[str]()
    flags = ("--policy", "cascade", "--workers", "2", "--drain-s", "0")
    with served(loud_family, data, *flags, log=log) as (process, url):
        path = f"{url}/v1/images/generations"

        def ask(expected: int, **body: object) -> httpx.Response:
            answer = httpx.post(path, json=body, timeout=120)
            assert answer.status_code == expected, answer.text
            return answer

        ask(200, prompt=f"a {MARKER}")  # judged
        ask(200, prompt=f"{MARKER} " * 300, negative_prompt=f"no {MARKER} " * 300)
        ask(200, prompt=f"{MARKER} \u200b\U0001f41f %s %(name)s {{x}} \x1b[31m \r\n[bold]")
        streamed = ask(200, prompt=f"a streamed {MARKER}", stream=True, partial_images=2)
        assert "completed" in streamed.text
        ask(400, prompt=f"a {MARKER}", size="7x7")
        ask(400, prompt=f"a {MARKER}", **{MARKER: 1})
        ask(400, prompt=[MARKER])
        assert httpx.post(path, content=f'{{"prompt": "{MARKER}').status_code == 400
        ask(413, prompt=MARKER * 200_000)
        assert httpx.get(path, params={"prompt": MARKER}).status_code == 405
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(path, json={"prompt": MARKER, "num_inference_steps": 900}, timeout=0.2)

        def measured() -> bool:
            ask(200, prompt=f"a measured {MARKER}", argus={"variant": "other"})
            return any("could not be measured" in line for line in log)

        wait_until(measured)

        # A catalogue that fails on a prompt's row.
        wait_until(lambda: "argus_cache_entries 0" not in httpx.get(f"{url}/metrics").text)
        with sqlite3.connect(data / "catalogue.db") as catalogue:
            catalogue.execute("DROP TABLE entries")
        ask(200, prompt=f"an uncatalogued {MARKER}", argus={"variant": "exact"})
        wait_until(lambda: any("cannot be stored" in line for line in log))
        process.terminate()
        assert process.wait(60) == 0
    text = "".join(log)
    assert "POST /v1/images/generations" in text
    assert "cannot be judged" in text
    assert MARKER not in text
    for poll in ("/ready", "/metrics"):
        assert poll not in text


def failing_on(prompt: str) -> Exception:
    """An error whose message, and whose cause's, quote a prompt."""
    try:
        try:
            raise ValueError(prompt)
        except ValueError as error:
            raise KeyError(prompt) from error
    except KeyError as error:
        failed = error
    return failed


def test_a_traceback_in_the_log_says_where_and_not_what(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = logging.LogRecord("a", logging.ERROR, "", 0, "Failed", (), None)
    error = failing_on(f"a {MARKER}")
    record.exc_info = (type(error), error, error.__traceback__)
    text = WithoutMessages().format(record)
    assert text.splitlines()[-1] == "KeyError"
    assert "ValueError" in text
    assert text.count("in failing_on") == 2
    assert MARKER not in text


def test_a_worker_tells_the_server_what_failed_and_the_log_where(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert MARKER in str(_told(failing_on(f"a {MARKER}")))  # for who asked
    assert "in failing_on" in caplog.text
    assert MARKER not in caplog.text


def test_an_error_that_nobody_awaited_is_logged_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def forget() -> None:
        asyncio.get_running_loop().set_exception_handler(log_unhandled)

        async def fail() -> None:
            raise failing_on(f"a {MARKER}")

        await asyncio.wait([asyncio.create_task(fail())])
        gc.collect()

    asyncio.run(forget())
    assert "never retrieved" in caplog.text
    assert "in failing_on" in caplog.text
    assert MARKER not in caplog.text


def test_errors_are_named_by_what_quotes_nothing(tmp_path: Path) -> None:
    with pytest.raises(sqlalchemy.exc.OperationalError) as failed:
        Catalogue("sqlite:////nowhere/catalogue.db")
    assert named(failed.value) == "sqlalchemy.exc.OperationalError: unable to open database file"
    with pytest.raises(FileNotFoundError) as lacking:
        (tmp_path / "latents").stat()
    assert "No such file" in named(lacking.value)
    assert named(failing_on(MARKER)) == "KeyError in failing_on"
