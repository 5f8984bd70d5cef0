"""What the server's log and files say of prompts: nothing that they need not."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy.exc
from PIL import Image

from argus.cache.catalogue import Catalogue
from argus.config import Settings
from argus.control.policy import Decision
from argus.core.errors import named
from argus.core.job import Job
from argus.quality.encoder import Embedding
from argus.server import learning
from argus.server.logs import WithoutMessages, log_unhandled
from argus.server.request import ImageRequest, Picture
from argus.server.samples import Sample, Samples
from argus.server.service import Service
from argus.workers.process import _public
from tests.conftest import WIDTH
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
    monkeypatch.setenv("ARGUS_LOG_LEVEL", "debug")  # with a line for each answer
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
        ask(200, prompt=f"an ignored {MARKER}", **{MARKER: 1})
        ask(400, prompt=f"a {MARKER}", argus={MARKER: 1})
        ask(400, prompt=[MARKER])
        assert httpx.post(path, content=f'{{"prompt": "{MARKER}').status_code == 400
        ask(413, prompt=MARKER * 200_000)
        assert httpx.get(path, params={"prompt": MARKER}).status_code == 405
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                path,
                json={"prompt": MARKER, "num_inference_steps": 900, "argus": {"exact": True}},
                timeout=0.2,
            )

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
    assert "GET /v1/images/generations HTTP" in text  # without its query
    assert MARKER not in text


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
    assert MARKER in str(_public(failing_on(f"a {MARKER}")))  # for who asked
    assert "in failing_on" in caplog.text
    assert MARKER not in caplog.text


def fail_with(prompt: str) -> None:
    raise failing_on(prompt)


def test_an_error_that_nobody_awaited_is_logged_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def forget() -> None:
        asyncio.get_running_loop().set_exception_handler(log_unhandled)

        async def fail() -> None:
            raise failing_on(f"a {MARKER}")

        await asyncio.wait([asyncio.create_task(fail())])
        gc.collect()
        asyncio.get_running_loop().call_soon(fail_with, f"a {MARKER}")
        await asyncio.sleep(0)

    asyncio.run(forget())
    assert "never retrieved" in caplog.text
    assert "Exception in callback fail_with\n" in caplog.text
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


# --- samples


def made_by(variant: str, **fields: Any) -> Picture:
    request = ImageRequest(
        prompt=f"a {MARKER}",
        width=32,
        height=32,
        size=(32, 32),
        guidance=3.0,
        namespace="everyone",
        **fields,
    )
    request.embedding = Embedding(np.zeros(WIDTH, np.float32), False)
    return Picture(
        Image.new("RGB", (32, 32)), b"", request, Decision(1, 0, "a test"), Job(request.prompt),
        variant, "tiny", {}, on_time=True,
    )  # fmt: skip


def sample(number: int, namespace: str = "everyone") -> Sample:
    return Sample(
        namespace,
        f"prompt {number}",
        "quick",
        number,
        None,
        None,
        0.1,
        0.2,
        0.9,
        0.8,
        0.7,
        "family",
        0,
    )


@pytest.fixture
def unstarted(measured_family: Path, tmp_path: Path) -> Iterator[Service]:
    settings = Settings(family=str(measured_family), data=tmp_path, workers=1, truth_share=1.0)
    service = Service(settings)
    yield service
    service.learning.close()
    service.cache.close()


def test_a_prompt_that_is_not_to_be_kept_is_no_sample(unstarted: Service) -> None:
    of = unstarted.learning
    of.saw(made_by("quick", cached=False))
    assert not of._waiting
    of.saw(made_by("quick"))
    assert len(of._waiting) == 1


def test_samples_are_removed_with_their_namespace_and_the_oldest_for_new_ones(
    database: str,
) -> None:
    samples = Samples(database)
    for number in range(6):
        samples.add(sample(number, "alice" if number % 2 else "bob"), kept=4)
    assert samples.read("family")["prompt"].tolist() == [f"prompt {n}" for n in (2, 3, 4, 5)]
    assert samples.read("family", limit=1)["namespace"].tolist() == ["alice"]
    assert samples.remove("alice", "prompt 5") == 1
    assert samples.remove("alice") == 1
    assert samples.read("family")["prompt"].tolist() == ["prompt 2", "prompt 4"]
    assert samples.remove() == 2
    assert samples.count() == 0


def test_samples_that_name_nobody_are_removed(tmp_path: Path) -> None:
    """As earlier versions kept them."""
    with sqlite3.connect(tmp_path / "catalogue.db") as catalogue:
        catalogue.execute("CREATE TABLE samples (id INTEGER PRIMARY KEY, prompt TEXT)")
        catalogue.execute("INSERT INTO samples (prompt) VALUES ('a secret')")
    samples = Samples(f"sqlite:///{tmp_path}/catalogue.db")
    assert samples.count() == 0
    samples.add(sample(1))
    assert samples.count() == 1


# --- the process that trains

TRAINING = """
import json, os, sys
with open(os.environ["TOLD"], "w") as file:
    json.dump({"arguments": sys.argv, "source": os.environ["ARGUS_FROM_CATALOGUE"]}, file)
print('  File "somewhere.py", line 3, in embed', file=sys.stderr)
print("ValueError: xylograph", file=sys.stderr)
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.mark.parametrize(("status", "counted"), [(6, "refused"), (3, "failed"), (1, "failed")])
def test_a_training_is_told_the_catalogue_in_its_environment(
    unstarted: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, status: int, counted: str,
) -> None:  # fmt: skip
    script, told = tmp_path / "training.py", tmp_path / "told.json"
    script.write_text(TRAINING)
    monkeypatch.setattr(learning, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setenv("TOLD", str(told))
    monkeypatch.setenv("STATUS", str(status))
    of = unstarted.learning
    of._url = "postgresql://argus:hunter2@db/argus"

    async def train() -> None:
        await of.retrain("a test asks for it")

    asyncio.run(train())
    found = json.loads(told.read_text())
    assert found["source"] == "postgresql://argus:hunter2@db/argus"
    assert "hunter2" not in " ".join(found["arguments"])
    results = unstarted.metrics.registry
    assert results.get_sample_value("argus_retrainings_total", {"result": counted}) == 1
    assert MARKER not in caplog.text
    assert ("in embed" in caplog.text) == (counted == "failed")


def test_a_training_that_cannot_start_is_a_failed_one(
    unstarted: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "COMMAND", (str(tmp_path / "nowhere"),))

    async def train() -> None:
        await unstarted.learning.retrain("a test asks for it")

    asyncio.run(train())
    results = unstarted.metrics.registry
    assert results.get_sample_value("argus_retrainings_total", {"result": "failed"}) == 1


def test_a_training_ends_with_a_server_that_is_killed(
    unstarted: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, begun = tmp_path / "training.py", tmp_path / "begun"
    script.write_text(
        f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)"
    )
    monkeypatch.setattr(learning, "COMMAND", (sys.executable, str(script)))

    async def train() -> None:
        training = unstarted.learning.retrain("a test asks for it")
        while not begun.exists():
            await asyncio.sleep(0.01)
        unstarted.kill()
        await training

    asyncio.run(asyncio.wait_for(train(), 60))
