"""The documentation is whole: it says of every setting, route, error code and policy what it is,
and a browser fetches nothing of it from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from argus.config import PREFIX, Settings
from argus.control.policies import POLICIES
from argus.server import app
from argus.server.schema import ArgusOptions, GenerationRequest, PictureReport

ROOT = Path(__file__).parents[2]
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
ELSEWHERE = re.compile(r"""['"]?(https?:)?//""")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return folder


def words(page: Path) -> set[str]:
    """What a page has in code."""
    return {unescape(one) for one in re.findall(r"<code>([^<]*)</code>", page.read_text())}


def test_every_setting_is_described_with_its_variable_and_default(site: Path) -> None:
    page = site / "configuration.html"
    text = page.read_text()
    for name, field in Settings.model_fields.items():
        assert {name, PREFIX + name.upper()} <= words(page)
        assert f'id="{name}"' in text
        assert field.description, f"{name} has no description"
    for model in ("SloClass", "QualityLevel", "WorkerType", "Upstream"):
        assert f'id="{model.lower()}"' in text


def test_every_route_field_and_error_is_described(site: Path) -> None:
    page = site / "http-api.html"
    said = words(page)
    assert {f"POST {app.GENERATIONS}", f"GET {app.JOBS}", "GET /ready", "GET /metrics"} <= said
    for model in (GenerationRequest, ArgusOptions, PictureReport):
        assert set(model.model_fields) <= said
        assert f'id="{model.__name__.lower()}"' in page.read_text()
    assert {"shed", "queue_full", "expired", "invalid_api_key", "not_an_admin_key"} <= said


def test_every_policy_has_a_section(site: Path) -> None:
    sections = re.findall(r'<h2 id="([a-z-]+)"', (site / "policies.html").read_text())
    assert sections == list(POLICIES)


class Text(HTMLParser):
    """What a page says, without its tags."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.said = ""
        self.feed(page.read_text())

    def handle_data(self, data: str) -> None:
        self.said += data


def test_every_example_is_shown_whole(site: Path) -> None:
    said = Text(site / "extending.html").said
    examples = [one for one in (ROOT / "docs" / "examples").iterdir() if one.is_file()]
    assert len(examples) == 6
    for example in examples:
        assert f"docs/examples/{example.name}" in said
        assert example.read_text().strip() in said


class Fetched(HTMLParser):
    """What a browser fetches of a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls.append(dict(attrs).get(FETCHED.get(tag, ""), "") or "")


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text())
        assert any(parser.urls)
        assert not [url for url in parser.urls if ELSEWHERE.match(url)], page
        assert 'class="mermaid"' not in page.read_text()  # the theme would fetch what draws it
    for style in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import)\s*([^;)]*)", style.read_text())
        assert not [one for one in fetched if ELSEWHERE.match(one)], style
