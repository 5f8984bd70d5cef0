"""What does a resumed picture save, seen through the API?

    python benchmarks/api.py [--prompts 12] [--json] [--picture docs/resumed.png]

Starts `argus serve` on a free port and an empty data folder. Every prompt is first asked as it is
(a full run, which is cached), then in another wording: once from noise and once pinned to every
skip. Latencies are medians over the prompts as a client sees them, the ratio is against the same
wording from noise. --picture saves the pictures of the first prompts beside one another.
"""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import httpx
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from argus.families.pictogram.train.sheet import lay_out

PROMPTS = (  # as it is, in another wording
    ("a red house in the snow", "snow, and a red house"),
    ("a large yellow sun in the sky", "a big yellow sun in the sky"),
    ("three small blue fish in the sea", "the sea with three little blue fish"),
    ("a green tree left of a pink house, meadow", "a pink house right of a green tree, meadow"),
    ("a purple umbrella on paper", "a violet umbrella on paper"),
    ("two orange stars at night", "at night, two orange stars"),
    ("a black key in a room", "one black key in a room"),
    ("a blue boat in the sea", "a single blue boat at sea"),
    ("a pink flower above a red cup, desert", "a red cup below a pink flower, desert"),
    ("a yellow moon at night", "a moon in yellow at night"),
    ("a striped green mushroom in a meadow", "in a meadow, a striped green mushroom"),
    ("four red hearts on paper", "4 red hearts on paper"),
)
COMMAND = [sys.executable, "-c", "from argus.cli.main import main; main()"]


def main(
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = len(PROMPTS),
    picture: Annotated[Path | None, typer.Option(help="Save pictures side by side.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    seen: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    shown: list[tuple[Image.Image, str]] = []
    with _served() as http:
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        family, exact, *others = names
        skips = [name for name in others if name.startswith(f"{family}/skip-")]
        _ask(http, "a warm-up", model=exact, argus={"cache": False})
        for i, (first, second) in enumerate(PROMPTS[:prompts]):
            row = [(_ask(http, first, model=exact, seed=i)[2], first)]
            _wait_until_cached(http, i + 1)
            seconds, report, image = _ask(
                http, second, model=exact, seed=100 + i, argus={"cache": False}
            )
            seen.setdefault(exact, []).append((seconds, report))
            row.append((image, f"{second} (from noise)"))
            for name in skips:
                seconds, report, image = _ask(http, second, model=name, seed=100 + i)
                seen.setdefault(name, []).append((seconds, report))
                row.append((image, f"{report['steps_skipped']} steps skipped"))
            if i < 4:
                shown += row
    rows = [_row(seen[name], seen[exact]) for name in (exact, *skips)]
    table = Table("K", "steps run", "latency ms", "denoising ms", "of exact", "similarity")
    for one in rows:
        table.add_row(
            f"{one['skip']:.0f}", f"{one['steps']:.0f}", f"{one['latency_ms']:.0f}",
            f"{one['denoise_ms']:.0f}", f"{one['ratio']:.2f}", f"{one['similarity']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if picture is not None:
        lay_out([image for image, _ in shown], [label for _, label in shown], 2 + len(skips)).save(
            picture
        )
    if as_json:
        print(json.dumps({"rows": rows}))


@contextmanager
def _served() -> Iterator[httpx.Client]:
    with tempfile.TemporaryDirectory() as data:
        server = subprocess.Popen(
            [*COMMAND, "serve", "--data", data, "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert server.stderr is not None
            url = next(line.split()[-1] for line in server.stderr if "Serving" in line)
            Thread(target=server.stderr.read, daemon=True).start()  # so that its log never blocks
            with httpx.Client(base_url=url, timeout=300) as http:
                while http.get("/ready").status_code != 200:
                    time.sleep(0.2)
                yield http
        finally:
            server.terminate()
            server.wait()


def _ask(
    http: httpx.Client, prompt: str, **fields: Any
) -> tuple[float, dict[str, Any], Image.Image]:
    begun = time.perf_counter()
    answer = http.post("/v1/images/generations", json={"prompt": prompt, **fields})
    seconds = time.perf_counter() - begun
    content = answer.raise_for_status().json()
    data = base64.b64decode(content["data"][0]["b64_json"])
    return seconds, content["argus"][0], Image.open(io.BytesIO(data)).convert("RGB")


def _wait_until_cached(http: httpx.Client, entries: int) -> None:
    """Until the latents are stored behind the answer."""
    pattern = re.compile(r"argus_cache_entries (\d+)")
    while int(pattern.findall(http.get("/metrics").text)[0]) < entries:
        time.sleep(0.02)


def _row(
    made: list[tuple[float, dict[str, Any]]], exact: list[tuple[float, dict[str, Any]]]
) -> dict[str, float]:
    latency = statistics.median(seconds for seconds, _ in made)
    reports = [report for _, report in made]
    return {
        "skip": statistics.median(report["steps_skipped"] for report in reports),
        "steps": statistics.median(report["steps_run"] for report in reports),
        "latency_ms": 1000 * latency,
        "denoise_ms": statistics.median(report["timings_ms"]["denoise"] for report in reports),
        "ratio": latency / statistics.median(seconds for seconds, _ in exact),
        "similarity": statistics.median(report.get("similarity") or 0.0 for report in reports),
    }


if __name__ == "__main__":
    typer.run(main)
