"""Webhooks of background jobs, at a real receiver that checks their signatures."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import standardwebhooks

from argus.config import Settings
from argus.core.errors import BadRequest
from argus.server import job_runner, webhooks
from argus.server.errors import ApiError
from argus.server.job_runner import JobRunner
from argus.server.job_store import Delivery
from argus.server.webhooks import Webhooks, check_url, listed_host, read_secrets
from tests.server.running import Running, running, wait_until
from tests.server.test_jobs import accepted, ended, error, read, sent


def secret(of: str) -> str:
    """A secret that is the same in every process, since it is in names of tests."""
    return "whsec_" + base64.b64encode(hashlib.sha256(of.encode()).digest()).decode()


SECRETS = [secret("old"), secret("new")]


@dataclass
class Receiver:
    """What a receiver was sent. It answers with the `statuses` one after the other, then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hangs: threading.Event | None = None

    def events(self) -> list[dict[str, Any]]:
        """The payloads, of calls with good signatures only."""
        return [
            standardwebhooks.Webhook(SECRETS[0]).verify(body, headers)
            for headers, body in self.calls
        ]


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.calls.append(({k.lower(): v for k, v in self.headers.items()}, body))
            if receiver.hangs is not None:
                receiver.hangs.wait(60)
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
            self.send_header("location", f"{receiver.url}/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.hangs is not None:
            receiver.hangs.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def receivers() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def receiver(receivers: Receiver) -> Receiver:
    """A receiver that was sent nothing yet."""
    receivers.calls, receivers.statuses = [], []
    return receivers


@pytest.fixture(scope="module")
def settings(
    receivers: Receiver, tiny_family: Path, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    tmp_path = tmp_path_factory.mktemp("webhooks")
    (tmp_path / "secrets.txt").write_text("\n".join(SECRETS))
    return Settings(
        family=str(tiny_family), data=tmp_path / "data", workers=1,
        webhook_hosts=["hooks.example.com", receivers.url],
        webhook_secret_file=tmp_path / "secrets.txt",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Running]:
    with running(settings) as server:
        yield server


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_runner, "POLL_S", 0.05)
    monkeypatch.setattr(webhooks, "AGAIN_S", (0.1,) * 3)


def hooked(server: Running, receiver: Receiver, **fields: Any) -> str:
    return accepted(server.http, **{**fields, "argus": {"webhook": f"{receiver.url}/hook"}})


def settled(server: Running, job: str) -> dict[str, Any]:
    """A job's webhook, once no further call is to come."""
    wait_until(lambda: read(server.http, job)["webhook"]["status"] != "pending")
    return dict(read(server.http, job)["webhook"])


def test_a_webhook_says_that_a_job_has_ended(server: Running, receiver: Receiver) -> None:
    job = hooked(server, receiver, prompt="a xylograph")
    webhook = settled(server, job)
    assert webhook == {"url": f"{receiver.url}/hook", "status": "delivered", "calls": 1}
    (event,) = receiver.events()
    assert event["type"] == "argus.job.completed"
    assert event["data"] == {"id": job, "status": "completed"}
    assert event["created_at"] == read(server.http, job)["finished_at"]
    ((headers, body),) = receiver.calls
    assert headers["webhook-id"] == event["id"]
    assert headers["content-type"] == "application/json"
    assert b"xylograph" not in body
    for one in SECRETS:  # the old and the new one, while receivers change over
        client = openai.OpenAI(api_key="any", webhook_secret=one)
        client.webhooks.verify_signature(body, headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(secret("wrong")).verify(body, headers)


def test_a_cancelled_job_s_webhook_is_called_too(
    server: Running, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobRunner, "_may_begin", False)
    job = hooked(server, receiver)
    server.http.post(f"/v1/argus/jobs/{job}/cancel")
    settled(server, job)
    assert [event["type"] for event in receiver.events()] == ["argus.job.cancelled"]


def test_a_webhook_is_called_again_until_it_is_accepted(
    server: Running, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302]
    assert settled(server, hooked(server, receiver))["calls"] == 3
    events = receiver.events()
    assert events[0] == events[1] == events[2]  # receivers tell by its id that they know it


@pytest.mark.parametrize(("statuses", "calls"), [([410], 1), ([500] * 9, 4)])
def test_a_webhook_that_is_gone_or_fails_too_often_is_given_up(
    server: Running, receiver: Receiver, statuses: list[int], calls: int
) -> None:
    receiver.statuses = statuses
    webhook = settled(server, hooked(server, receiver))
    assert (webhook["status"], webhook["calls"]) == ("given_up", calls)
    assert server.metric("argus_webhooks_total", result="given_up") > 0


def test_a_webhook_that_is_not_allowed_is_refused_at_once(server: Running) -> None:
    answer = sent(server.http, argus={"webhook": "https://169.254.169.254/"})
    assert error(answer) == (400, "invalid_value")
    assert "the hosts are hooks.example.com" in answer.json()["error"]["message"]


def test_a_receiver_that_hangs_holds_up_no_other(
    settings: Settings, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "LIMIT_S", 2.0)
    with receiving() as hanging:
        hanging.hangs = threading.Event()
        hosts = [*settings.webhook_hosts, hanging.url]
        both = settings.model_copy(update={"data": tmp_path, "webhook_hosts": hosts})
        with running(both) as server:
            stuck = hooked(server, hanging)
            wait_until(lambda: len(hanging.calls) == 1)
            assert settled(server, hooked(server, receiver))["status"] == "delivered"
            assert read(server.http, stuck)["webhook"]["status"] == "pending"
            wait_until(lambda: len(hanging.calls) == 2)


def test_calls_go_on_after_a_restart_to_hosts_that_are_listed_still(
    settings: Settings, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.statuses = [500]
    own = settings.model_copy(update={"data": tmp_path})
    with monkeypatch.context() as patch, running(own) as server:
        patch.setattr(webhooks, "AGAIN_S", (2.0,))
        first = hooked(server, receiver)
        wait_until(lambda: server.metric("argus_webhooks_total", result="repeated") == 1)
    with running(own) as server:
        assert settled(server, first)["calls"] == 2
        monkeypatch.setattr(JobRunner, "_may_begin", False)
        second = hooked(server, receiver)
    monkeypatch.undo()
    calls = len(receiver.calls)
    less = own.model_copy(update={"webhook_hosts": ["hooks.example.com"]})
    with running(less) as server:
        assert ended(server.http, second)["status"] == "completed"
        assert settled(server, second)["status"] == "given_up"
    assert len(receiver.calls) == calls


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "https://hooks.example.com:8443/",
        "https://hooks.example.com.evil.org/",
        "https://ann:pw@hooks.example.com/",
        "https://hooks.example.com@evil.org/",
        "https://127.0.0.1:9/",
        "ftp://hooks.example.com/",
        "//hooks.example.com/",
        "hooks.example.com",
        "https://",
        "https://hooks.example.com/" + "x" * 2048,
        "https://hooks.example.com/\n",
        "https://hooks.example.com/\ud800",
        "https://\ud800.example.com/",
        "",
    ],
)
def test_webhooks_go_only_where_the_operator_allows(url: str) -> None:
    hosts = ["hooks.example.com", "http://127.0.0.1:9"]
    with pytest.raises(ApiError):
        check_url(url, hosts)
    with pytest.raises(ApiError, match="sends no webhooks"):
        check_url("https://hooks.example.com/", [])


@pytest.mark.parametrize(
    "url",
    ["https://hooks.example.com/a?b=c", "https://HOOKS.example.com:443/", "http://127.0.0.1:9/"],
)
def test_webhooks_go_to_the_hosts_that_are_listed(url: str) -> None:
    check_url(url, ["hooks.example.com", "http://127.0.0.1:9"])


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("HOOKS.example.com:443", "https://hooks.example.com/"),
        ("https://hooks.example.com", "https://hooks.example.com/"),
        ("http://Hooks.example.com:80/", "http://hooks.example.com/"),
        ("bücher.example", "https://xn--bcher-kva.example/"),
        ("[::1]:9000", "https://[::1]:9000/"),
    ],
)
def test_hosts_may_be_listed_in_any_writing(host: str, url: str) -> None:
    check_url(url, [listed_host(host)])


@pytest.mark.parametrize(
    "host",
    ["", "*.example.com", "https://hooks.example.com/hook", "ann@hooks.example.com",
     "ftp://hooks.example.com", "hooks.example.com:x", "a b", "\ud800"],
)  # fmt: skip
def test_what_is_no_host_is_refused_at_start(host: str, tmp_path: Path) -> None:
    file = tmp_path / "secrets.txt"
    file.write_text(SECRETS[0])
    with pytest.raises(BadRequest, match="is no host"):
        Webhooks([host], file)


def test_a_receiver_that_drips_its_answer_keeps_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "LIMIT_S", 0.5)
    file = tmp_path / "secrets.txt"
    file.write_text(SECRETS[0])
    ended = threading.Event()

    class Dripping(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                while not ended.wait(0.1):
                    self.wfile.write(b"H")
            except OSError:
                pass  # the caller left

        def log_message(self, *_: Any) -> None:
            pass

    async def call(url: str) -> int:
        calling = Webhooks([url], file)
        again = await calling.call(Delivery("job_a", "completed", 1.0, f"{url}/hook", 1))
        assert again[0] is None
        assert calling._threads.hung == 1
        async with asyncio.timeout(60):
            while calling._threads.hung:
                await asyncio.sleep(0.02)
        return calling._threads.hung

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert asyncio.run(call(f"http://127.0.0.1:{server.server_port}")) == 0
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no secret"),
        ("hunter2", "Secret 1 of .* is not whsec_"),
        (f"{SECRETS[0]}\nwhsec_!!", "Secret 2 of"),
        ("whsec_c2hvcnQ=", "24 to 64 bytes"),
    ],
)
def test_wrong_secrets_are_refused_and_not_quoted(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "secrets.txt"
    file.write_text(text)
    with pytest.raises(BadRequest, match=message) as caught:
        read_secrets(file)
    assert not text or text.split()[-1] not in str(caught.value)
    with pytest.raises(BadRequest, match="cannot be read"):
        read_secrets(tmp_path / "none")
    with pytest.raises(BadRequest, match="must be signed"):
        Webhooks(["hooks.example.com"], None)
