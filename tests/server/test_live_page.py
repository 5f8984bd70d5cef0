"""The live view in a browser: a burst is watched, the policy switched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from argus.config import Settings, SloClass
from argus.server.live import EVENTS, LIVE
from tests.server.running import Running, running, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = Path("/usr/bin/chromium")

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists() or find_spec("playwright") is None,
    reason="needs Debian's chromium and Python's playwright",
)


@pytest.fixture(scope="module")
def argus(family_with_ideas: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(
        family=str(family_with_ideas),
        data=tmp_path_factory.mktemp("live-page"),
        workers=2,
        slo={"default": SloClass(latency="60s")},
    )
    with running(settings) as server:
        yield server


@pytest.fixture
def page(argus: Running) -> Iterator[Page]:
    """The live view on a phone. What the browser's console says fails the test."""
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 780})
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{argus.url}/ui#live")
        page.get_by_role("button", name="Start burst").wait_for()
        yield page
        browser.close()
    assert said == []


def test_a_burst_is_watched_from_its_first_request_to_its_last(argus: Running, page: Page) -> None:
    page.locator(".burst", has_text="The rate rises over").wait_for()
    page.locator("#live-rate").fill("40")
    page.locator("#live-seconds").fill("3")
    page.get_by_role("button", name="Start burst").click()
    page.locator(".burst", has_text=re.compile(r"^A burst.*: [1-9]\d* sent")).wait_for()
    assert page.get_by_role("button", name="Start burst").is_disabled()
    page.locator(".burst", has_text=re.compile(r"^The last burst: \d+ sent, .*on time")).wait_for()

    report = argus.service.bursts.report
    assert report is not None
    assert page.locator(".burst", has_text=f"The last burst: {report.sent} sent").is_visible()
    load = page.get_by_role(
        "img", name=re.compile(r"^Load and outcomes, pictures a second: on time")
    )
    variants = page.get_by_role("img", name=re.compile(r"^Variants, share of pictures: .*%"))
    assert load.locator("canvas").is_visible() and variants.locator("canvas").is_visible()
    made = {name for name, count in _made(argus).items() if count}
    legend = page.locator("figure", has_text="Variants").locator(".keys").inner_text()
    assert made and all(name in legend for name in made)
    assert page.locator(".workers tbody tr").count() == 2


def test_a_burst_is_stopped_and_one_beyond_the_limits_not_sent(argus: Running, page: Page) -> None:
    page.locator("#live-rate").fill("5")
    page.locator("#live-seconds").fill("600")
    page.get_by_role("button", name="Start burst").click()
    page.get_by_role("button", name="Stop").click()
    page.locator(".burst", has_text=re.compile("^The last burst")).wait_for()
    assert not argus.service.bursts.running

    page.locator("#live-rate").fill("1000")  # the browser's own check, of the most there may be
    page.get_by_role("button", name="Start burst").click()
    assert not page.locator("#live-rate").evaluate("input => input.checkValidity()")
    assert not argus.service.bursts.running


def test_the_policy_is_chosen_by_keyboard(argus: Running, page: Page) -> None:
    policy = page.get_by_label("Policy")
    wait_until(lambda: policy.input_value() == "price")  # once the state is read
    assert page.locator("option[value=oracle]").is_disabled()
    assert page.get_by_role("button", name="Switch").is_disabled()
    policy.focus()
    page.keyboard.press("ArrowDown")
    assert policy.input_value() == "price-blind"
    assert argus.service.policy == "price"  # a choice is not in force until it is sent
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(argus.url)))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_until(lambda: argus.service.policy == "price-blind")
    page.locator("#facts", has_text="policy price-blind").wait_for()
    assert "/v1/argus/served" not in asked  # which is read now and then
    argus.service.loop.call_soon_threadsafe(argus.service.switch, "price")  # by somebody else
    wait_until(lambda: policy.input_value() == "price")


def test_a_hidden_page_pauses_and_catches_up(argus: Running, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(argus.url)))
    hide = """hidden => {
      Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    assert argus.generate("a fish that nobody watches").status_code == 200
    wait_until(lambda: sum(map(sum, argus.http.get(LIVE).json()["history"]["variants"])) > 0)
    assert not [path for path in asked if path.startswith(LIVE)]
    with page.expect_request(f"**{EVENTS}"), page.expect_request(f"**{LIVE}"):
        page.evaluate(hide, False)
    page.locator(".keys", has_text="offered").wait_for()


def test_small_and_large_prices_are_drawn_in_one_chart(page: Page) -> None:
    page.evaluate("""async () => {
      const { newChart } = await import("/ui/charts.js");
      const range = (_, high) => [0, high];
      const chart = newChart({ title: "Far", unit: "q", format: String, range, curved: true });
      document.body.append(chart.element);
      const prices = { name: "base", values: [0.02, 70], colour: "navy" };
      chart.show([1, 2], [prices], [1, 2], { bands: [], lines: [] });
    }""")
    page.get_by_role("img", name="Far, q: base 70.").locator("canvas").wait_for()


def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    page.get_by_role("table").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def _made(server: Running) -> dict[str, int]:
    found = server.http.get(LIVE).json()
    names = [one["name"] for one in found["variants"]]
    return dict(zip(names, map(sum, zip(*found["history"]["variants"], strict=True)), strict=True))
