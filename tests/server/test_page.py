"""The page at `/ui`: its files, what the API tells it, and a person who uses it."""

from __future__ import annotations

import base64
import gzip
import io
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from argus.config import Settings, SloClass
from argus.quality.predictor import Prediction
from argus.server import scoring
from argus.server.keys import add_key
from argus.server.page import FOLDER
from argus.server.scoring import ScoringThread
from tests.server.running import Running, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

VARIANTS = ["exact", "skip-2", "skip-3", "quick", "other"]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Alice's key, and the file that has its hash."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    return add_key(file, "alice"), file


@pytest.fixture(scope="module")
def argus(
    measured_family: Path, key: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with `price`, a scorer, two workers and an API key, which the client sends."""
    settings = Settings(
        family=str(measured_family),
        data=tmp_path_factory.mktemp("page"),
        workers=2,
        api_key_file=key[1],
        slo={"default": SloClass(latency="60s"), "fine": SloClass(latency="90s", quality=0.85)},
        truth_share=0.0,
    )
    with running(settings, headers={"Authorization": f"Bearer {key[0]}"}) as server:
        yield server


def account_of(server: Running, prompt: str, **fields: Any) -> dict[str, Any]:
    answer = server.generate(prompt, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["argus"][0])


# --- files


def test_the_page_and_the_documentation_need_no_key_and_no_other_server(argus: Running) -> None:
    http = argus.http
    for path in ("/", "/ui"):
        assert http.get(path, headers={"Authorization": ""}).headers["location"] == "ui/"
    types = {"ui/": "text/html", "docs": "text/html", "ui/app.js": "text/javascript",
             "ui/style.css": "text/css", "ui/icon.svg": "image/svg+xml"}  # fmt: skip
    for path, kind in types.items():
        answer = http.get(f"/{path}", headers={"Authorization": ""})
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-cache"
        known = {"If-None-Match": answer.headers["etag"]}
        if path != "docs":
            assert http.get(f"/{path}", headers=known).status_code == 304
    missing = http.get("/ui/nothing.js")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert http.get("/ui/../app.py").status_code == 404


def test_a_compressed_script_is_sent_as_what_it_is_compressed_from(argus: Running) -> None:
    path = "vendor/swagger-ui/swagger-ui-bundle.js.gz"
    answer = argus.http.get(f"/ui/{path}")
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert answer.content == gzip.decompress((FOLDER / path).read_bytes())


# --- what the API tells it


def test_the_api_says_what_can_be_asked_for(argus: Running) -> None:
    assert argus.http.get("/health").json()["keys"] is True
    refused = argus.http.get("/v1/argus/served", headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401
    served = argus.http.get("/v1/argus/served").json()
    assert (served["family"], served["policy"], served["ready"]) == ("tiny", "price", True)
    assert (served["key"], served["admin"]) == ("alice", False)
    assert [one["name"] for one in served["variants"]] == VARIANTS
    skip = served["variants"][1]
    assert (skip["strategy"], skip["steps"], skip["skip"]) == ("cache", 6, 2)
    assert served["slo"] == [
        {"name": "default", "deadline_ms": 60000, "quality": 0.0},
        {"name": "fine", "deadline_ms": 90000, "quality": 0.85},
    ]
    assert served["sizes"] == ["32x32"]
    assert "size_limit" not in served


def test_an_answer_tells_what_was_known_of_every_variant_if_asked(argus: Running) -> None:
    alone = {"cache": False}  # so that the cache stays empty
    assert "candidates" not in account_of(argus, "a silent fish", argus=alone)
    made = account_of(argus, "an explained fish", argus={"explain": True})
    found = {one["variant"]: one for one in made["candidates"]}
    assert list(found) == VARIANTS
    exact = found[made["variant"]]
    assert (exact["predicted_quality"], exact["quality_bound"]) == (1.0, 1.0)
    assert exact["worth"] == pytest.approx(1 - exact["paid"] - exact["risk"], abs=1e-3)
    quick = found["quick"]
    assert (quick["predicted_quality"], quick["quality_bound"]) == (0.8, 0.7)
    assert quick["cost_ms"] < exact["cost_ms"]
    assert quick["worth"] < exact["worth"]
    assert "excluded" not in quick
    assert found["skip-2"]["excluded"] == "no neighbour in the cache"
    assert "worth" not in found["skip-2"]


@pytest.mark.parametrize(
    ("fields", "variant", "excluded"),
    [
        ({"argus": {"min_quality": 0.75}}, "quick", "its bound is below the least quality, 0.75"),
        ({"argus": {"slo": "fine"}}, "quick", "its bound is below the least quality, 0.85"),
        ({"argus": {"cache": False}}, "skip-2", "the cache is not used"),
        ({"num_inference_steps": 2}, "quick", "the request's fields rule it out"),
        ({"guidance_scale": 5.0}, "other", "the request's fields rule it out"),
    ],
)
def test_a_variant_that_could_not_serve_says_why(
    argus: Running, fields: dict[str, Any], variant: str, excluded: str
) -> None:
    options = {"explain": True, **fields.get("argus", {})}
    made = account_of(argus, f"a fish without {variant}", **{**fields, "argus": options})
    found = {one["variant"]: one for one in made["candidates"]}
    assert found[variant]["excluded"] == excluded


def test_a_variant_below_the_floor_says_so(argus: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = argus.service.predictions.predict

    def worse(*known: Any) -> Prediction:
        found = predict(*known)
        assert found is not None
        mean = np.where(np.array(VARIANTS) == "quick", -0.2, found.mean)
        return replace(found, mean=mean)

    monkeypatch.setattr(argus.service.predictions, "predict", worse)
    made = account_of(argus, "a fish that quick spoils", argus={"explain": True, "cache": False})
    found = {one["variant"]: one for one in made["candidates"]}
    assert found["quick"]["excluded"] == "its predicted quality is below the SLO class's floor, 0"


def test_a_pin_excludes_no_variant_and_weighs_none(argus: Running) -> None:
    made = account_of(argus, "a pinned fish", argus={"variant": "quick", "explain": True})
    found = {one["variant"]: one for one in made["candidates"]}
    assert "excluded" not in found["exact"]
    assert "excluded" not in found["quick"]
    assert not any("worth" in one for one in made["candidates"])


def test_a_picture_is_scored_if_asked(argus: Running) -> None:
    assert "score" not in account_of(argus, "an unscored fish")
    answer = argus.generate("a scored fish", argus={"score": True}).json()
    made = answer["argus"][0]
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    score = argus.service.scorer._score("a scored fish", [image])[0]
    assert made["score"] == pytest.approx(score, abs=1e-3)
    predictor = argus.service.predictions.predictor
    assert predictor is not None
    assert made["judged_quality"] == pytest.approx(predictor.quality_of(made["score"]), abs=1e-3)


def test_a_scorer_that_fails_hangs_or_is_busy_costs_no_picture(
    argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"prompt": "a doubtful fish", "argus": {"score": True}}
    with monkeypatch.context() as failing:
        failing.setattr(ScoringThread, "_score", lambda *_: 1 / 0)
        assert "score" not in account_of(argus, **asked)
    with monkeypatch.context() as busy:
        busy.setattr(scoring, "MOST_ASKED", 0)
        assert "score" not in account_of(argus, **asked)
    going_on = threading.Event()
    with monkeypatch.context() as hanging:
        hanging.setattr(scoring, "ASKED_LIMIT_S", 0.01)
        hanging.setattr(ScoringThread, "_score", lambda *_: [float(going_on.wait(60))])
        assert "score" not in account_of(argus, **asked)
    going_on.set()
    assert "score" in account_of(argus, **asked)


def test_a_family_without_a_scorer_refuses_to_score(
    argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(argus.service.scorer, "_spec", None)
    answer = argus.generate("a fish", argus={"score": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "argus.score"


# --- a person


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A person at the page; what the browser's console says, and what is fetched elsewhere."""

    def __init__(self, browser: Browser, server: Running, key: str | None, **look: Any) -> None:
        self.context = browser.new_context(**look)
        self.context.set_default_timeout(60_000)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.elsewhere: list[str] = []
        self._url = server.url
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", self._see)
        if key is not None:
            self.context.add_init_script(f"sessionStorage.setItem('argus-key', '{key}')")

    def _hear(self, message: ConsoleMessage) -> None:
        self.said.append(message.text)

    def _see(self, request: Request) -> None:
        if not request.url.startswith((self._url, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def go(self, path: str = "/") -> Page:
        self.page.goto(self._url + path)
        return self.page

    def paint(self, prompt: str) -> None:
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.keyboard.press("Enter")
        self.page.locator(".title .variant").wait_for()


@pytest.fixture
def visit(browser: Browser, argus: Running, key: tuple[str, Path]) -> Iterator[Visit]:
    """A person who is logged in. Nothing is in the console, or comes from another server."""
    visit = Visit(browser, argus, key[0])
    yield visit
    visit.context.close()
    assert visit.said == []
    assert visit.elsewhere == []


def test_a_person_makes_a_picture_and_sees_how_it_was_made(visit: Visit) -> None:
    page = visit.go()
    page.get_by_label("Use the cache").uncheck()
    visit.paint("a painted fish")
    shown = page.get_by_label("The picture and how it was made")
    assert shown.locator(".title").inner_text().split() == ["exact", "on", "time"]
    assert shown.get_by_role("img", name="a painted fish").evaluate("one => one.naturalWidth") == 32
    assert shown.locator(".stack").get_attribute("aria-label").startswith("queue ")  # type: ignore[union-attr]
    known = page.get_by_role("table")
    assert known.locator("tbody .variant").all_inner_texts() == VARIANTS
    assert known.locator("tr.chosen .variant").inner_text() == "exact"
    assert known.locator("tr", has_text="skip-2").locator(".why").last.inner_text() == (
        "the cache is not used"
    )
    assert page.locator(".sum").inner_text().startswith("exact: 1.000 quality − ")


def test_an_example_is_written_into_the_prompt_and_not_painted(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, argus: Running
) -> None:
    family = replace(argus.service.family, examples=("an exemplary fish",))
    monkeypatch.setattr(argus.service, "family", family)
    page = visit.go()
    page.get_by_role("button", name="an exemplary fish").click()
    prompt = page.get_by_label("Prompt", exact=True)
    assert prompt.input_value() == "an exemplary fish"
    assert prompt.evaluate("one => one === document.activeElement")
    assert not page.locator(".made").count()
    page.keyboard.press("Enter")
    page.locator(".title .variant").wait_for()


def test_unfinished_pictures_are_shown_while_one_is_painted(visit: Visit) -> None:
    page = visit.go()
    page.evaluate("""() => {
      window.previews = [];
      new MutationObserver((changes) => {
        for (const { target } of changes)
          if (target.matches(".frame.waiting img")) window.previews.push(target.src);
      }).observe(document.body, { attributes: true, attributeFilter: ["src"], subtree: true });
    }""")
    page.get_by_label("Variant", exact=True).select_option("exact")
    visit.paint("a fish that appears")
    previews = page.evaluate("window.previews")
    assert previews and all(one.startswith("data:image/png;base64,") for one in previews)


def test_the_page_says_which_words_the_family_does_not_know(
    visit: Visit, argus: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(argus.service.words, "unknown", lambda prompt: ["cat"])
    page = visit.go()
    visit.paint("a fish and a cat")
    page.get_by_text("The model does not know “cat”").wait_for()


def test_a_resumed_picture_shows_its_neighbour_and_stands_beside_the_exact_one(
    visit: Visit,
) -> None:
    page = visit.go()
    visit.paint("a cached fish")
    page.get_by_label("Variant", exact=True).select_option("skip-3")
    page.get_by_role("button", name="Paint", exact=True).click()
    neighbour = page.locator(".neighbour")
    assert "a cached fish" in neighbour.inner_text()
    neighbour.get_by_role("button", name="Paint it").click()
    neighbour.get_by_role("img").wait_for()
    page.get_by_role("button", name="Make it exact").click()
    beside = page.get_by_label("Beside the exact picture")
    beside.get_by_text("measured quality").wait_for()
    assert beside.locator("figure .variant").all_inner_texts() == ["skip-3", "exact"]
    assert beside.locator("dt", has_text="Score").count() == 2


def test_every_variant_paints_the_same_prompt(visit: Visit) -> None:
    page = visit.go()
    visit.paint("a laddered fish")
    page.get_by_role("button", name="All variants").click()
    ladder = page.get_by_label("All variants", exact=True)
    ladder.get_by_text("Quality is measured").wait_for()
    assert ladder.locator("figure .variant").all_inner_texts() == VARIANTS
    assert ladder.locator("figure img").count() == len(VARIANTS)


def test_several_pictures_are_shown_one_at_a_time(visit: Visit) -> None:
    page = visit.go()
    page.get_by_label("Pictures", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).fill("5")
    visit.paint("three fish")
    page.get_by_role("button", name="Picture 3").click()
    assert page.locator(".grid").get_by_text("7", exact=True).count() == 1


def test_the_page_fits_a_phone_in_the_dark(
    browser: Browser, argus: Running, key: tuple[str, Path]
) -> None:
    phone = Visit(
        browser, argus, key[0], viewport={"width": 360, "height": 740}, color_scheme="dark"
    )
    page = phone.go()
    phone.paint("a pocket fish")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
    assert (phone.said, phone.elsewhere) == ([], [])
    phone.context.close()


def test_the_api_s_documentation_is_whole(visit: Visit) -> None:
    page = visit.go("/docs")
    page.get_by_text("/v1/images/generations").first.wait_for()
    page.get_by_text("/v1/argus/served").first.wait_for()


def test_a_server_with_keys_asks_for_one(
    browser: Browser, argus: Running, key: tuple[str, Path]
) -> None:
    guest = Visit(browser, argus, None)
    page = guest.go()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill("argus-wrong")
    assert guest.said == []
    dialog.get_by_role("button", name="Log in").click()
    dialog.get_by_text("Missing or wrong API key.").wait_for()
    dialog.get_by_label("Key", exact=True).fill(key[0])
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Key: alice").wait_for()
    assert not dialog.is_visible()
    guest.paint("a guest's fish")
    page.evaluate("sessionStorage.setItem('argus-key', 'argus-expired')")
    page.get_by_role("button", name="Paint", exact=True).click()
    dialog.get_by_text("Missing or wrong API key.").wait_for()
    guest.context.close()


def test_what_goes_wrong_is_said_in_the_server_s_words(
    browser: Browser, argus: Running, key: tuple[str, Path]
) -> None:
    visit = Visit(browser, argus, key[0])
    page = visit.go()
    page.get_by_label("Size", exact=True).fill("7x7")
    page.get_by_label("Prompt", exact=True).fill("a fish of another size")
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    alert.get_by_text("size is '7x7'; it must be auto or WIDTHxHEIGHT").wait_for()
    visit.context.close()
