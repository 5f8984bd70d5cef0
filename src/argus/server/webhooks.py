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
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path

import httpx

from argus.core.errors import BadRequest
from argus.server.errors import ApiError, invalid
from argus.server.job_store import DELIVERED, GIVEN_UP, Delivery
from argus.server.threads import Threads, TooManyHang

log = logging.getLogger(__name__)

PREFIX = "whsec_"
SECRET_BYTES = (24, 64)  # the least and the most, by the specification
MAX_URL = 2048
LIMIT_S = 20.0  # for the receiver's answer; the specification has 15 to 30 s
AGAIN_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)  # the specification's example, for a day
CALLS = 8  # at a time
JITTER = 0.2  # of a pause at most, added


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


def check_url(url: str, hosts: Collection[str]) -> None:
    """Raises ApiError unless webhooks may be sent to a URL: over https to one of `hosts`, or to one
    that is listed as http://HOST."""
    param = "argus.webhook"
    if not hosts:
        raise invalid(
            "This server sends no webhooks: leave webhook out, or have the operator set "
            "webhook_hosts.",
            param,
        )
    try:
        parsed = httpx.URL(url) if len(url) <= MAX_URL else httpx.URL()
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("https", "http") or not parsed.host or parsed.userinfo:
        raise invalid("webhook must be a URL such as https://example.com/hook.", param)
    place = parsed.netloc.decode("ascii")  # with the port, unless it is the scheme's own
    listed = place if parsed.scheme == "https" else f"http://{place}"
    if listed not in hosts:
        raise invalid(
            f"Webhooks cannot be sent to {parsed.scheme}://{place}; the hosts are "
            f"{', '.join(hosts)}.",
            param,
        )


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
    """Calls webhooks, at `hosts` only. Raises BadRequest without readable secrets. For use from one
    asyncio loop."""

    def __init__(self, hosts: Sequence[str], secret_file: Path | None) -> None:
        self._hosts = hosts
        self._client = httpx.Client(follow_redirects=False, timeout=LIMIT_S) if hosts else None
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
        after which to call again."""
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
        try:
            return await self._threads.run(
                lambda: self._post(delivery.webhook, headers, body), LIMIT_S
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, TooManyHang) as error:
            log.info("The webhook of %s failed (%s)", delivery.id, type(error).__name__)
            return None

    def _post(self, url: str, headers: dict[str, str], body: bytes) -> int:
        """The status of the answer, of which no more is read."""
        assert self._client is not None  # else `check` fails
        with self._client.stream("POST", url, content=body, headers=headers) as answer:
            return answer.status_code

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
