"""Checks of what a server listens on and talks to: its port, keys, upstreams, Ray, a collector."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

from argus.config import Settings, Upstream, WorkerType, without_passwords
from argus.core.errors import BadRequest
from argus.core.family import Family
from argus.server.doctor.finding import Finding, ok, problem, warning

CONNECT_S = 3.0
LOOK_S = 2.0


def port(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """Whether the address can be listened on."""
    host, number = settings.host, settings.port
    if number == 0:
        yield ok("port", f"a free one on {host}")
        return
    try:
        address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address[4])
    except OSError as error:
        who = " by an Argus" if _is_argus(host, number) else ""
        if isinstance(error, PermissionError):
            says = f"{host}:{number} needs a privileged user"
        elif isinstance(error, socket.gaierror):
            says = f"there is no host {host}"
        else:
            says = f"{host}:{number} is taken{who} ({error.strerror})"
        yield problem("port", says, "Choose another with --port, or end what listens there.")
        return
    yield ok("port", f"{host}:{number} is free: no server runs there (--port for another)")


def _is_argus(host: str, number: int) -> bool:
    import httpx

    with suppress(httpx.HTTPError, httpx.InvalidURL, ValueError):
        return "version" in httpx.get(f"http://{host}:{number}/health", timeout=LOOK_S).json()
    return False


def keys(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """The files of API keys and of webhooks' secrets."""
    from argus.server.keys import read_keys
    from argus.server.webhooks import read_secrets

    if settings.api_key_file is not None:
        names = read_keys(settings.api_key_file)
        if names:
            yield ok("keys", f"{len(names)} API keys in {settings.api_key_file}")
        else:
            yield warning(
                "keys", f"{settings.api_key_file} has no key: nobody may ask for pictures",
                f"argus key NAME --file {settings.api_key_file}",
            )  # fmt: skip
        for name in settings.admin_keys:
            if name not in names:
                yield warning("keys", f"admin_keys names {name}, which is no key", "Add the key.")
    elif settings.only_local:
        yield ok("keys", "none: only this machine reaches the server")
    else:
        yield warning(
            "keys", f"none: whoever reaches {settings.host} may make pictures",
            "argus key NAME makes one; then set api_key_file. Or let a proxy ask for keys.",
        )  # fmt: skip
    if settings.webhook_secret_file is not None:
        read_secrets(settings.webhook_secret_file)
        yield ok("keys", f"webhooks are signed by {settings.webhook_secret_file}")
    elif settings.webhook_hosts:
        advice = "Set webhook_secret_file: docs/jobs.md says how to make it."
        yield problem("keys", "webhook_hosts are given, and no webhook_secret_file", advice)


def upstreams(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """Whether each upstream works, and has the model that it is asked for."""
    from argus.server.upstreams import groups_of

    if family is not None:
        try:
            groups_of(settings, family)
        except BadRequest as error:  # what does not fit together
            yield problem("upstreams", str(error))
    if not settings.upstreams:
        return
    for one, wrong in zip(settings.upstreams, asyncio.run(_asked(settings)), strict=True):
        if wrong is None:
            model = one.served_model or "its model"
            yield ok("upstreams", f"{one.url} works, and serves {model}")
        else:
            yield problem(
                "upstreams", f"{one.url}: {wrong}",
                "Start it, or correct url, health, served_model or key_env.",
            )  # fmt: skip


async def _asked(settings: Settings) -> list[str | None]:
    """For each upstream, what is wrong with it."""
    from argus.workers.images_api import ImagesApi

    async def ask(one: Upstream) -> str | None:
        api = ImagesApi(one)
        try:
            return await api.problem() or await api.unserved()
        finally:
            await api.close()

    return list(await asyncio.gather(*map(ask, settings.upstreams)))


def ray_cluster(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """Whether the Ray cluster lets us in, and has room for workers."""
    if settings.workers != "ray":
        return
    address = settings.ray_address
    if address == "local":
        yield ok("Ray", "a cluster of this machine is started with the server")
        return
    if address != "auto":
        wrong = _unreachable(address)
        if wrong is not None:
            advice = "Start it with `ray start --head`, or correct ray_address (HOST:PORT)."
            yield problem("Ray", f"{address} cannot be reached: {wrong}", advice)
            return
    yield from _joined(settings)


def _joined(settings: Settings) -> Iterator[Finding]:
    from argus.server.cluster import open_cluster

    types = settings.worker_types or {"gpu": WorkerType(gpus=1), "cpu": WorkerType()}
    cluster = open_cluster(settings.model_copy(update={"worker_types": types}))
    assert cluster is not None  # `workers` is ray
    try:
        count = len(cluster.slots())
    finally:
        cluster.close()
    if count:
        yield ok("Ray", f"the cluster has room for {count} workers")
    else:
        yield warning(
            "Ray", "the cluster lets us in, and has no node for a worker yet",
            "Start nodes (`ray start --address HEAD:6379`), or correct worker_types.",
        )  # fmt: skip


def collector(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """Whether the collector of traces can be reached."""
    if settings.otlp_endpoint is None:
        return
    parts, shown = urlsplit(settings.otlp_endpoint), without_passwords(settings.otlp_endpoint)
    number = parts.port or (443 if parts.scheme == "https" else 80)
    wrong = _unreachable(f"{parts.hostname}:{number}")
    if wrong is None:
        yield ok("traces", f"{shown} can be reached")
    else:
        yield warning(
            "traces", f"{shown} cannot be reached: {wrong}",
            "Start the collector (OTLP over HTTP, port 4318). Pictures are made without it.",
        )  # fmt: skip


def _unreachable(address: str) -> str | None:
    """Why HOST:PORT takes no connection; None if it does. Raises BadRequest for another form."""
    host, colon, number = address.rpartition(":")
    if not colon or not number.isdigit():
        raise BadRequest(f"{address!r} is not HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(number)), CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
