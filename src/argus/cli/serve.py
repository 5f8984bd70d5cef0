"""`argus serve` and `argus key`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from argus.cli.consoles import err, out
from argus.config import read_settings
from argus.workers import forking

log = logging.getLogger(__name__)

EXIT_S = 3.0  # for Python to exit once the server has stopped

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of settings; or ARGUS_CONFIG.")
]
Data = Annotated[Path | None, typer.Option(help="Folder for everything the server keeps.")]
FamilyName = Annotated[
    str | None, typer.Option(help="Name or YAML file of a family. Default: the bundled one.")
]


def serve(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data: Data = None,
    family: FamilyName = None,
    policy: Annotated[
        str | None, typer.Option(help="Routing policy: price, or any of `argus simulate`'s.")
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Number of workers, one per GPU by default; or ray, for a cluster's."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster: auto, HOST:PORT or local.")
    ] = None,
    shadow: Annotated[
        bool | None,
        typer.Option("--shadow", help="Make every picture exactly; record Argus's decisions."),
    ] = None,
    rollout: Annotated[
        str | None, typer.Option(help="Share of requests that Argus decides, e.g. 10%.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Hashed keys, written by `argus key`.")
    ] = None,
    cache_limit: Annotated[str | None, typer.Option(help="Bytes of latents, e.g. 20GB.")] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="Seconds after SIGTERM in which requests are accepted.")
    ] = None,
    grace_s: Annotated[
        float | None, typer.Option(help="Seconds after that in which accepted requests may finish.")
    ] = None,
) -> None:
    """Serve pictures behind the OpenAI Images API.

    Every setting can also be set in the YAML file or the environment (`argus config show`).
    """
    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "data": data,
        "family": family,
        "policy": policy,
        "workers": workers,
        "ray_address": ray_address,
        "shadow": shadow,
        "rollout": rollout,
        "device": device,
        "dtype": dtype,
        "api_key_file": api_key_file,
        "cache_limit": cache_limit,
        "drain_s": drain_s,
        "grace_s": grace_s,
    }
    settings, _ = read_settings(flags, config)
    forking.prepare(settings.device)
    from argus.server.logs import set_up

    set_up(settings.log_level, settings.log_format)
    log.info("Starting: loading PyTorch and diffusers")
    from argus.server import run  # takes seconds

    try:
        run.serve(settings)
    except BaseException as error:
        stopped = isinstance(error, SystemExit) and error.code == 0
        run.exit_within(EXIT_S, status=0 if stopped else 1)
        raise
    run.exit_within(EXIT_S, status=0)


def key(
    name: Annotated[str, typer.Argument(help="Name of the key, and of its cache's namespace.")],
    file: Annotated[Path, typer.Option(help="File of hashed keys to add to.")] = Path("keys.txt"),
) -> None:
    """Make an API key. It is shown once; the file stores its hash."""
    from argus.server.keys import add_key

    made = add_key(file, name)
    err.print(f"Added {escape(name)} to {escape(str(file))}; serve with --api-key-file "
              f"{escape(str(file))}. "
              "This is the key, shown only now:", highlight=False, soft_wrap=True)  # fmt: skip
    out.print(made, highlight=False, soft_wrap=True)
