"""Do other people's clients get pictures from `argus serve`, with nothing changed but a base URL?

    make compat        (in a virtual environment of its own: the clients' packages are many)

Starts a server with its default settings and the names that the clients ask for, has every client
ask for a picture in its own way, and writes the table of docs/compatibility.md. Clients that are
programs of their own, or need a GPU to be installed, are replayed: their request, field by field,
from the source that is named.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

PROMPT = "a red house in the snow"
KEY = "sk-" + secrets.token_hex(16)  # of LiteLLM's proxy, which does not start without one
NAMES = ["default", "dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-2"]
PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- made by `make compat` -->", "<!-- end -->"
OPEN_WEBUI = "open-webui/open-webui backend/open_webui/routers/images.py at 02530d5"
LIBRECHAT = "danny-avila/LibreChat api/app/clients/tools/structured at 00b3bc3"
VLLM_OMNI = "vllm-project/vllm-omni benchmarks/diffusion/backends.py at 0780e45"
SGLANG = "sgl-project/sglang multimodal_gen/benchmarks/bench_serving.py at 00b368b"


@dataclass(frozen=True)
class Check:
    """A client's request. `run` gets the server's URL and returns pictures, in any of the forms
    that clients give; it raises if there are none."""

    client: str
    version: str
    request: str
    run: Callable[[str], list[Any]]
    pictures: int = 1


def image_of(value: Any) -> Image.Image:
    """A picture from a URL, base64, bytes, or an object of a client's."""
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str):
        if value.startswith("http"):
            with urllib.request.urlopen(value) as answer:
                return Image.open(io.BytesIO(answer.read()))
        return Image.open(io.BytesIO(base64.b64decode(value.rpartition(",")[2])))
    given = value if isinstance(value, dict) else vars(value)
    return image_of(given.get("b64_json") or given["url"])


# --- clients that are installed


def openai_sync(url: str) -> list[Any]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    answer = client.images.generate(prompt=PROMPT, model="gpt-image-1", size="1024x1024", n=2)
    return list(answer.data or [])


def openai_async(url: str) -> list[Any]:
    import openai

    async def ask() -> list[Any]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any")
        answer = await client.images.generate(
            prompt=PROMPT, model="dall-e-3", quality="hd", style="vivid"
        )
        assert (answer.data or [])[0].url, "dall-e-3 answers with URLs unless told otherwise"
        return list(answer.data or [])

    return asyncio.run(ask())


def openai_stream(url: str) -> list[Any]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    events = list(
        client.images.generate(
            prompt=PROMPT, model="gpt-image-1", stream=True, partial_images=2, quality="high"
        )
    )
    assert events[-1].type == "image_generation.completed", events[-1].type
    return [event.b64_json for event in events]


def litellm_sdk(url: str) -> list[Any]:
    import litellm

    answer = litellm.image_generation(
        model="openai/gpt-image-1", prompt=PROMPT, api_base=f"{url}/v1", api_key="any"
    )
    return list(answer.data)


def litellm_proxy(url: str) -> list[Any]:
    import openai

    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        params = {"model": "openai/gpt-image-1", "api_base": f"{url}/v1", "api_key": "any"}
        config.write_text(
            json.dumps(
                {
                    "model_list": [{"model_name": "pictures", "litellm_params": params}],
                    "general_settings": {"master_key": KEY},
                }
            )
        )
        command = [Path(sys.executable).parent / "litellm", "--config", config, "--host",
                   "127.0.0.1", "--port", str(port)]  # fmt: skip
        with process(command, f"http://127.0.0.1:{port}/health/liveliness", 180.0):
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY)
            answer = client.images.generate(prompt=PROMPT, model="pictures", size="1024x1024")
            return list(answer.data or [])


def langchain(url: str) -> list[Any]:
    from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

    made = DallEAPIWrapper(base_url=f"{url}/v1", api_key="any").run(PROMPT)
    return str(made).split("\n")


def haystack(url: str) -> list[Any]:
    from haystack.components.generators import openai_image_generator as generators
    from haystack.utils import Secret

    kind = getattr(generators, "OpenAIImageGenerator", None) or generators.DALLEImageGenerator
    client = kind(api_key=Secret.from_token("any"), api_base_url=f"{url}/v1")
    return list(client.run(PROMPT)["images"])


# --- requests of programs


def replayed(*bodies: dict[str, Any]) -> Callable[[str], list[Any]]:
    def run(url: str) -> list[Any]:
        found: list[Any] = []
        for body in bodies:
            headers = {"Authorization": "Bearer EMPTY"}
            answer = httpx.post(
                f"{url}/v1/images/generations", json=body, headers=headers, timeout=120
            )
            assert answer.status_code == 200, answer.text
            found += answer.json()["data"]
        return found

    return run


def the_file(url: str) -> list[Any]:
    body = {"prompt": PROMPT, "response_format": "file"}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)
    assert answer.headers["content-type"] == "image/png", answer.text
    return [answer.content]


def curl(url: str) -> list[Any]:
    body = json.dumps({"model": "dall-e-3", "prompt": PROMPT, "n": 1, "size": "1024x1024"})
    command = ["curl", "-sf", f"{url}/v1/images/generations", "-H",
               "Content-Type: application/json", "-d", body]  # fmt: skip
    return list(json.loads(subprocess.check_output(command))["data"])


def checks() -> list[Check]:
    own = version("openai")
    base = {"model": "default", "prompt": PROMPT, "n": 1, "response_format": "b64_json"}
    webui = {"model": "gpt-image-1", "prompt": PROMPT, "n": 1, "size": "512x512"}
    chat = {"model": "gpt-image-1", "prompt": PROMPT, "n": 1, "background": "auto",
            "output_format": "png", "quality": "auto", "size": "auto"}  # fmt: skip
    dalle = {"model": "dall-e-3", "quality": "standard", "style": "vivid", "size": "1024x1024",
             "prompt": PROMPT, "n": 1}  # fmt: skip
    quality = [{**base, "quality": name} for name in ("lossless", "high", "fast")]
    extras = {**base, "seed": 42, "true_cfg_scale": 4.0, "generator_device": "cpu", "lora": None}
    return [
        Check("openai", own, "images.generate: gpt-image-1, 1024x1024, n = 2", openai_sync, 2),
        Check("openai", own, "async: dall-e-3, hd, vivid; answered with URLs", openai_async),
        Check("openai", own, "streamed with 2 partial images, quality high", openai_stream, 3),
        Check("LiteLLM SDK", version("litellm"), "image_generation", litellm_sdk),
        Check("LiteLLM proxy", version("litellm"), "in front of Argus: 1024x1024", litellm_proxy),
        Check("LangChain", version("langchain-community"), "DallEAPIWrapper.run", langchain),
        Check("Haystack", version("haystack-ai"), "its image generator's run", haystack),
        Check("curl", "", "OpenAI's documented request for dall-e-3", curl),
        Check("Open WebUI", OPEN_WEBUI, "engine openai", replayed(webui)),
        Check("LibreChat", LIBRECHAT, "OpenAIImageTools.js", replayed(chat)),
        Check("LibreChat", LIBRECHAT, "DALLE3.js; reads a URL", replayed(dalle)),
        Check("vLLM-Omni's benchmark", VLLM_OMNI, "its default: 1024x1024, 50 steps",
              replayed({**base, "size": "1024x1024", "num_inference_steps": 50})),
        Check("vLLM-Omni", VLLM_OMNI, "fields that only it knows", replayed(extras)),
        Check("vLLM-Omni", VLLM_OMNI, "response_format file", the_file),
        Check("SGLang's benchmark", SGLANG, "its default", replayed(base)),
        Check("SGLang", SGLANG, "quality lossless, high and fast", replayed(*quality), 3),
    ]  # fmt: skip


# --- the server, and the table


@contextmanager
def process(command: list[Any], ready: str, limit_s: float) -> Iterator[None]:
    """A program that answers at `ready` within `limit_s` seconds."""
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        try:
            until = time.monotonic() + limit_s
            while True:
                try:
                    if httpx.get(ready, timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if running.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} does not start:\n{log.read()[-2000:]}")
                time.sleep(0.5)
            yield
        finally:
            running.terminate()
            running.wait()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def main() -> None:
    argus, port = os.environ["ARGUS"], free_port()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as data:
        os.environ |= {"ARGUS_DATA": data, "ARGUS_SERVED_MODEL_NAMES": json.dumps(NAMES)}
        url = f"http://127.0.0.1:{port}"
        with process([argus, "serve", "--port", port], f"{url}/ready", 180.0):
            for check in checks():
                try:
                    pictures = [image_of(one) for one in check.run(url)]
                    assert len(pictures) == check.pictures, f"{len(pictures)} pictures"
                    result = "works"
                except Exception as error:
                    result, failed = f"**fails**: {type(error).__name__}: {error}"[:200], True
                print(f"{check.client} {check.version} | {check.request} | {result}", flush=True)
                rows.append(f"| {check.client} | {check.version} | {check.request} | {result} |")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(["| client | version or source | request | |", "|---|---|---|---|", *rows])
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
