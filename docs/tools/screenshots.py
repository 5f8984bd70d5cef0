"""Screenshots of the page: a picture and how it was made, a burst, and both on a phone in the dark.

    python docs/tools/screenshots.py docs/screenshots

Starts a server of the bundled family on a free port, opens its page in headless Chromium, makes
pictures, runs the built-in burst, and saves what a person then sees. Fails if the browser's console
says anything.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import typer
from playwright.sync_api import Browser, Page, expect, sync_playwright

COMMAND = [sys.executable, "-c", "from argus.cli.main import main; main()"]
PROMPTS, SEED = ("a red fish in the sea", "one red fish, in the sea"), 1
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
BURST_S, WATCHED = 60, 0.7  # seconds of the burst, and the share of it before it is photographed
LIMIT_S = 200.0


@contextmanager
def served() -> Iterator[str]:
    """The URL of a server that is ready."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as stderr:
            server = subprocess.Popen(
                [*COMMAND, "serve", "--port", "0", "--data", f"{folder}/data"], stderr=stderr
            )
        try:
            yield _ready(server, log)
        finally:
            server.kill()
            server.wait()


def _ready(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        said = re.search(r"Serving on (\S+)", log.read_text())
        if said and httpx.get(f"{said[1]}/ready").status_code == 200:
            return said[1]
        time.sleep(0.1)
    raise RuntimeError(f"The server is not ready: {log.read_text()[-2000:]}")


def opened(browser: Browser, url: str, dark: bool, phone: bool, said: list[str]) -> Page:
    """A new page of the playground; what its console says goes to `said`."""
    page = browser.new_page(
        viewport=PHONE if phone else DESK,  # type: ignore[arg-type]
        color_scheme="dark" if dark else "light",
        device_scale_factor=1,
    )
    page.set_default_timeout(LIMIT_S * 1000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"{url}/ui")
    return page


def painted(page: Page, prompt: str) -> None:
    """Make a picture in the playground, and wait until it is there with its account."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    seed, settings = page.get_by_label("Seed", exact=True), page.get_by_text("Settings", exact=True)
    if folded := not seed.is_visible():  # on a phone
        settings.click()
    seed.fill(str(SEED))
    if folded:
        settings.click()
    page.get_by_role("button", name="Paint", exact=True).click()
    for there in (
        page.get_by_text(prompt, exact=True).first,
        page.get_by_text("Where the time went"),
        page.get_by_role("button", name="Make it exact"),
    ):
        expect(there).to_be_visible(timeout=LIMIT_S * 1000)


def saved(page: Page, file: Path) -> None:
    """A screenshot of the whole page, in a window that is as high, so that nothing floats in it."""
    height = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": DESK["width"], "height": height})
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=file)


def burst(page: Page, rate: float) -> None:
    """Start the built-in burst in the live view, and wait until most of it is over."""
    page.get_by_role("link", name="Live").click()
    page.get_by_label("Burst, requests/s").fill(f"{rate:.1f}")
    page.get_by_label("for seconds").fill(str(BURST_S))
    page.get_by_role("button", name="Start burst").click()
    page.wait_for_timeout(1000 * WATCHED * BURST_S)


def main(
    folder: Annotated[Path, typer.Argument(help="Where to save them.")],
    times: Annotated[
        float, typer.Option(help="The burst's height, in exact pictures that the server carries.")
    ] = 2.0,
) -> None:
    chromium = shutil.which("chromium")  # Debian's; None: Playwright's own
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        desk = opened(browser, url, dark=False, phone=False, said=said)
        phone = opened(browser, url, dark=True, phone=True, said=said)
        for prompt in PROMPTS:
            painted(desk, prompt)
        saved(desk, folder / "playground.png")
        painted(phone, PROMPTS[0])
        phone.screenshot(path=folder / "phone.png")
        phone.get_by_role("link", name="Live").click()
        carried = httpx.get(f"{url}/v1/argus/live").json()["history"]["exact_rate"][-1]
        burst(desk, times * carried)
        saved(desk, folder / "burst.png")
        phone.screenshot(path=folder / "phone-live.png")
        browser.close()
    if said:
        raise RuntimeError(f"The browser's console says: {said}")
    print(f"wrote {', '.join(file.name for file in sorted(folder.glob('*.png')))}")


if __name__ == "__main__":
    typer.run(main)
