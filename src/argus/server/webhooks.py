"""Webhooks of background jobs: which URLs are allowed, how calls are signed and sent.

Signatures and headers are those of Standard Webhooks 1.0.0 (https://www.standardwebhooks.com), the
payload is an event of OpenAI's webhooks.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import logging
import random
import re
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from argus.core.errors import BadRequest
from argus.server.errors import ApiError, invalid
from argus.server.job_store import DELIVERED, GIVEN_UP, Delivery
from argus.server.threads import Threads

log = logging.getLogger(__name__)

PREFIX = "whsec_"
SECRET_BYTES = (24, 64)  # the least and the most, by the specification
MAX_URL = 2048
LIMIT_S = 20.0  # for the receiver's answer; the specification has 15 to 30 s
AGAIN_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)  # the specification's example, for a day
CALLS = 8  # at a time
JITTER = 0.2  # of a pause at most, added
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+", re.ASCII)


def read_secrets(file: Path) -> list[bytes]:
    """The signing secrets of a file, one a line. Raises BadRequest for a file of another form."""
    try:
        lines = file.read_text().split()
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"The webhooks' secrets in {file} cannot be read: {error}") from error
    secrets: list[bytes] = []
    for number, line in enumerate(lines, 1):
        secret = b""
        if line.startswith(PREFIX):
            with suppress(binascii.Error, ValueError):
                secret = base64.b64decode(line.removeprefix(PREFIX), validate=True)
        if not SECRET_BYTES[0] <= len(secret) <= SECRET_BYTES[1]:
            raise BadRequest(
                f"Secret {number} of {file} is not {PREFIX} and {SECRET_BYTES[0]} to "
                f"{SECRET_BYTES[1]} bytes in base64: `echo {PREFIX}$(openssl rand -base64 32)` "
                "makes one."
            )
        secrets.append(secret)
    if not secrets:
        raise BadRequest(
            f"{file} has no secret: `echo {PREFIX}$(openssl rand -base64 32)` makes one."
        )
    return secrets


def listed_host(host: str) -> str:
    """An item of webhook_hosts in the form that `check_url` compares. Raises BadRequest."""
    parsed = _parsed(host if "://" in host else f"https://{host}")
    if parsed is None or parsed.raw_path != b"/" or parsed.fragment:
        raise BadRequest(
            f"{host!r} in webhook_hosts is no host: write it as hooks.example.com, with the port "
            "unless that is 443, or as http://HOST for calls without TLS."
        )
    return _place(parsed)


def check_url(url: str, hosts: Collection[str]) -> None:
    """Raises ApiError unless webhooks may be sent to a URL: over https to one of `hosts`, or to one
    that is listed as http://HOST. The hosts are in the form of `listed_host`."""
    param = "argus.webhook"
    if not hosts:
        raise invalid(
            "This server sends no webhooks: leave webhook out, or have the operator set "
            "webhook_hosts.",
            param,
        )
    parsed = _parsed(url)
    if parsed is None:
        raise invalid("webhook must be a URL such as https://example.com/hook.", param)
    if _place(parsed) not in hosts:
        raise invalid(
            f"Webhooks cannot be sent to {parsed.scheme}://{parsed.netloc.decode('ascii')}; the "
            f"hosts are {', '.join(hosts)}.",
            param,
        )


def _parsed(url: str) -> httpx.URL | None:
    """A URL that can be called; None for another text."""
    if len(url) > MAX_URL:
        return None
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        return None
    named = parsed.raw_host and _HOST.fullmatch(parsed.raw_host.decode("ascii"))
    usable = parsed.scheme in ("https", "http") and named and not parsed.userinfo
    return parsed if usable else None


def _place(parsed: httpx.URL) -> str:
    """HOST or HOST:PORT of a URL, http://HOST of one without TLS; a scheme's own port is left
    out."""
    place = parsed.netloc.decode("ascii")
    return place if parsed.scheme == "https" else f"http://{place}"


def signature(secrets: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`: a signature by each secret."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, signed, hashlib.sha256) for secret in secrets]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def event(delivery: Delivery) -> tuple[str, bytes]:
    """The id and the payload of a webhook; the same for each call of it."""
    name = "evt_" + delivery.id.removeprefix("job_")
    at = datetime.fromtimestamp(delivery.finished_at, UTC).isoformat().replace("+00:00", "Z")
    content = {
        "id": name,
        "object": "event",
        "type": f"argus.job.{delivery.status}",
        "created_at": int(delivery.finished_at),
        "timestamp": at,
        "data": {"id": delivery.id, "status": delivery.status},
    }
    return name, json.dumps(content, separators=(",", ":")).encode()


class Webhooks:
    """Calls webhooks, at `hosts` only. Raises BadRequest for what is no host, and without readable
    secrets. For use from one asyncio loop."""

    def __init__(self, hosts: Sequence[str], secret_file: Path | None) -> None:
        self._hosts = [listed_host(host) for host in hosts]
        self._client: httpx.Client | None = None
        if hosts:
            once = httpx.Limits(max_keepalive_connections=0)  # connections are cut after a call
            self._client = httpx.Client(follow_redirects=False, timeout=LIMIT_S, limits=once)
        self._threads = Threads("webhooks", CALLS)  # names of hosts are looked up there, too
        if hosts and secret_file is None:
            raise BadRequest(
                "webhook_hosts is set, and webhook_secret_file is not: webhooks must be signed. "
                f"`echo {PREFIX}$(openssl rand -base64 32) > FILE` makes a secret."
            )
        self._secrets = [] if secret_file is None else read_secrets(secret_file)

    def check(self, url: str) -> None:
        """Raises ApiError unless webhooks may be sent to a URL."""
        check_url(url, self._hosts)

    async def call(self, delivery: Delivery) -> tuple[str | None, float | None]:
        """Call a webhook once. Returns its outcome if that is final, else None and the seconds
        after which to call again. Raises TooManyHang if it was not called."""
        try:
            self.check(delivery.webhook)  # the setting may have changed
        except ApiError as error:
            log.warning("The webhook of %s is given up: %s", delivery.id, error.detail)
            return GIVEN_UP, None
        status = await self._status(delivery)
        if status is not None and 200 <= status < 300:
            return DELIVERED, None
        if status == HTTPStatus.GONE or delivery.tries > len(AGAIN_S):
            log.warning("The webhook of %s is given up after %d calls; the last answer was %s",
                        delivery.id, delivery.tries, status)  # fmt: skip
            return GIVEN_UP, None
        return None, AGAIN_S[delivery.tries - 1] * (1 + JITTER * random.random())

    async def _status(self, delivery: Delivery) -> int | None:
        """The status of the receiver's answer, None without one."""
        name, body = event(delivery)
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "webhook-id": name,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._secrets, name, timestamp, body),
        }
        sockets: list[socket.socket] = []
        try:
            return await self._threads.run(
                lambda: self._post(delivery.webhook, headers, body, sockets), LIMIT_S
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            log.info("The webhook of %s failed (%s)", delivery.id, type(error).__name__)
            return None
        finally:
            for one in sockets:  # a receiver that sends a byte now and then would keep the thread
                with suppress(OSError):
                    socket.socket.shutdown(one, socket.SHUT_RDWR)

    def _post(
        self, url: str, headers: dict[str, str], body: bytes, sockets: list[socket.socket]
    ) -> int:
        """The status of the answer, of which no more is read. The connection's sockets are added to
        `sockets`."""
        assert self._client is not None  # else `check` fails

        def trace(name: str, info: dict[str, Any]) -> None:
            if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
                sockets.append(info["return_value"].get_extra_info("socket"))

        with self._client.stream(
            "POST", url, content=body, headers=headers, extensions={"trace": trace}
        ) as answer:
            return answer.status_code

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
