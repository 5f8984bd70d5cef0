"""Reads the requests of a trace: lines as vLLM-Omni's `Request(...)`, or JSON lines as SGLang's; or
a production service's table of requests, which has no prompts.

Formats: https://github.com/vllm-project/vllm-omni/tree/main/benchmarks/diffusion (traces), and
python/sglang/multimodal_gen/benchmarks/request_manifest.py of https://github.com/sgl-project/sglang.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argus.core.errors import BadRequest

PROMPTS = ("prompt", "text")
SENT = ("seed", "num_inference_steps", "guidance_scale", "negative_prompt", "n", "quality", "argus")
NESTED = "sampling_params"


@dataclass(frozen=True)
class TraceRequest:
    """A request's `body` without its model. `at_s` is when it is sent, in seconds since the first;
    `slo_ms` the latency that it is promised; None where the trace does not say."""

    body: dict[str, Any]
    at_s: float | None = None
    slo_ms: float | None = None


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, in its order. Raises BadRequest, naming the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"The trace {path} cannot be read: {error}") from error
    found = [_request(line, number, path) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadRequest(f"The trace {path} has no requests.")
    times = [request.at_s for request in found if request.at_s is not None]
    if not times:
        return found
    if len(times) < len(found):
        raise BadRequest(f"The trace {path} gives a timestamp for some of its requests only.")
    first = min(times)
    return [TraceRequest(one.body, (one.at_s or 0.0) - first, one.slo_ms) for one in found]


def read_gentd26(path: Path, prompts: Iterable[str]) -> list[TraceRequest]:
    """The text-to-image requests of GenTD26's table (alibaba/clusterdata) that succeeded, at their
    times. Their prompts are not published: each user's next one is the next of `prompts`, but a
    request with the lengths, model and steps of the same user's last one repeats its prompt.

    Raises BadRequest for another file, and for too few prompts.
    """
    source, last = iter(prompts), dict[str, tuple[tuple[str, ...], str]]()
    found = []
    try:
        with path.open(newline="") as file:
            rows = [one for one in csv.DictReader(file) if _made(one)]
        for row in sorted(rows, key=lambda row: float(row["at_s"])):
            same = tuple(row[name] for name in ("prompt_chars", "negative_chars", "model", "steps"))
            before, prompt = last.get(row["user"], ((), ""))
            if same != before:
                prompt = next(source)
            last[row["user"]] = same, prompt
            body: dict[str, Any] = {"prompt": prompt, "n": max(1, int(float(row["n"] or 1)))}
            if row["steps"]:
                body["num_inference_steps"] = int(float(row["steps"]))
            found.append(TraceRequest(body, float(row["at_s"])))
    except StopIteration:
        raise BadRequest(f"{path} has more requests than there are prompts.") from None
    except (OSError, KeyError, ValueError) as error:
        raise BadRequest(f"{path} is no table of GenTD26's requests: {error!r}") from error
    if not found:
        raise BadRequest(f"{path} has no text-to-image request that succeeded.")
    first = found[0].at_s or 0.0
    return [TraceRequest(one.body, (one.at_s or 0.0) - first) for one in found]


def _made(row: Mapping[str, str]) -> bool:
    return row["type"] == "text" and row["status"] == "succeed"


def _request(line: str, number: int, path: Path) -> TraceRequest:
    row = _parsed(line.strip(), f"Line {number} of {path}")
    if isinstance(row.get(NESTED), dict):
        row = {**row[NESTED], **row}
    prompt = next((row[name] for name in PROMPTS if row.get(name)), None)
    if not isinstance(prompt, str):
        raise BadRequest(f"Line {number} of {path} has no prompt.")
    body: dict[str, Any] = {"prompt": prompt}
    body |= {name: row[name] for name in SENT if row.get(name) is not None}
    if row.get("num_outputs_per_prompt"):
        body["n"] = row["num_outputs_per_prompt"]
    if row.get("size"):
        body["size"] = row["size"]
    elif row.get("width") and row.get("height"):
        body["size"] = f"{row['width']}x{row['height']}"
    return TraceRequest(body, _number(row, "timestamp"), _number(row, "slo_ms"))


def _parsed(line: str, where: str) -> Mapping[str, Any]:
    if line.startswith("Request("):
        try:
            call = ast.parse(line, mode="eval").body
            assert isinstance(call, ast.Call)
            return {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg}
        except (SyntaxError, ValueError, AssertionError) as error:
            raise BadRequest(f"{where} is no Request(name=value, …): {error}") from error
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRequest(f"{where} is neither Request(…) nor a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise BadRequest(f"{where} is not a JSON object.")
    return row


def _number(row: Mapping[str, Any], name: str) -> float | None:
    try:
        return None if row.get(name) is None else float(row[name])
    except (TypeError, ValueError):
        raise BadRequest(f"{name} is {row[name]!r}, not a number.") from None
