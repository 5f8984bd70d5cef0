"""`argus load`: send requests to a server and print what came back."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from argus.cli.consoles import err, out
from argus.core.errors import BadRequest

SEED = 0


def load(
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = (
        "http://127.0.0.1:8000"
    ),
    trace: Annotated[
        str | None,
        typer.Option(
            help="File of requests as vLLM-Omni's Request(...) lines or JSON lines, with times; or "
            "gentd26:FILE, a production service's requests, which get the prompts given or made up."
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests to send; 100, or the whole trace.")
    ] = None,
    request_rate: Annotated[
        float, typer.Option(min=0.0, help="Requests a second, a Poisson process; inf: at once.")
    ] = math.inf,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests at a time.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=1e-6, help="How much faster than its times a trace is sent.")
    ] = 1.0,
    model: Annotated[str | None, typer.Option(help="The model that requests name.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of requests without one.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="num_inference_steps of requests without them.")
    ] = None,
    quality: Annotated[str | None, typer.Option(help="The `quality` that requests name.")] = None,
    slo: Annotated[
        float | None,
        typer.Option(help="Seconds that answers may take, for requests whose trace has no slo_ms."),
    ] = None,
    warmup: Annotated[bool, typer.Option(help="Send one request before.")] = True,
    api_key: Annotated[str | None, typer.Option(envvar="ARGUS_API_KEY")] = None,
    output_file: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send requests to a server and print throughput, latencies and attainment.

    The figures are those of vLLM-Omni's and SGLang's benchmark clients, under the same names in
    JSON. Without a trace or prompts, they are of the bundled family's own kind.
    """
    from argus.lab.prompts import prompt_lines
    from argus.loadgen.sender import Target, figures, send, warm_up
    from argus.loadgen.traces import TraceRequest, read_gentd26, read_trace
    from argus.simulator.traces import GENTD26

    gentd26 = trace is not None and trace.startswith(GENTD26)
    if trace is not None and prompts is not None and not gentd26:
        raise BadRequest("Give --trace or --prompts, not both.")
    if request_rate <= 0:
        raise BadRequest("--request-rate must be above 0, or inf.")
    if trace is not None and gentd26:
        words = _own_prompts() if prompts is None else itertools.cycle(prompt_lines(prompts))
        requests = read_gentd26(Path(trace.removeprefix(GENTD26)), words)[:num_prompts]
    elif trace is not None:
        requests = read_trace(Path(trace))[:num_prompts]
    else:
        own = itertools.islice(_own_prompts(), num_prompts or 100)
        known = list(own) if prompts is None else prompt_lines(prompts)
        sent = itertools.islice(itertools.cycle(known), num_prompts or len(known))
        requests = [TraceRequest({"prompt": prompt}) for prompt in sent]
    if slo is not None:
        requests = [
            one if one.slo_ms is not None else replace(one, slo_ms=1000 * slo) for one in requests
        ]
    given = {"model": model, "size": size, "num_inference_steps": steps, "quality": quality}
    body = {name: value for name, value in given.items() if value is not None}
    base = url.rstrip("/").removesuffix("/v1")
    target = Target(base, api_key, {"response_format": "b64_json"} | body)
    if warmup:
        asyncio.run(warm_up(target, requests[0]))
    rate = None if math.isinf(request_rate) else request_rate
    err.print(f"Sending {len(requests)} requests to {base} ...", highlight=False)
    answers, duration_s = asyncio.run(send(target, requests, rate, max_concurrency, speed, SEED))
    found = figures(answers, duration_s)
    if output_file is not None:
        output_file.write_text(json.dumps(found, indent=2))
    if as_json:
        out.print_json(json.dumps(found))
    else:
        out.print(_table(found, len(requests)))


def _own_prompts() -> Iterator[str]:
    """Prompts as users of the bundled family send them, without an end."""
    from argus.families.catalog import default_family
    from argus.lab.prompts import ideas_of
    from argus.lab.workload import workload

    return (one.prompt for one in workload(ideas_of(default_family()), SEED))


def _table(found: dict[str, Any], sent: int) -> Table:
    table = Table(show_header=False)
    rows = [
        ("Benchmark duration (s)", f"{found['duration']:.2f}"),
        ("Successful requests", f"{found['completed_requests']}/{sent}"),
        ("Request throughput (req/s)", f"{found['throughput_qps']:.2f}"),
        ("Latency Mean (s)", f"{found['latency_mean']:.4f}"),
        ("Latency Median (s)", f"{found['latency_median']:.4f}"),
        ("Latency P95 (s)", f"{found['latency_p95']:.4f}"),
        ("Latency P99 (s)", f"{found['latency_p99']:.4f}"),
    ]
    if "slo_attainment_rate" in found:
        rows.append(
            ("On time by --slo (SLO Attainment Rate, all)", f"{found['slo_attainment_rate']:.2%}")
        )
    if found["failures"]:
        rows.append(("Failures", _counts(found["failures"])))
    if "variants" in found:
        rows += [
            ("Variants", _counts(found["variants"])),
            ("On time by the server's deadline", str(found["on_time"])),
            ("GPU-seconds", f"{found['gpu_seconds']:.2f}"),
            ("GPU-seconds saved", f"{found['saved_gpu_seconds']:.2f}"),
        ]
    if "predicted_quality" in found:
        rows.append(("Predicted quality", f"{found['predicted_quality']:.3f}"))
    if "cost" in found:
        rows.append(("Cost", f"{found['cost']:.6f} {found['currency']}"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _counts(of: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in of.items())
