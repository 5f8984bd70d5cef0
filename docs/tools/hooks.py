"""What mkdocs does beside its own work: it fills in the parts of pages that are read from the code,
and turns links to files of the repository that are not part of the site into their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
PARTS = {
    "<!-- settings -->": reference.settings_table,
    "<!-- settings file variable -->": reference.file_variable,
    "<!-- routes -->": reference.api_reference,
    "<!-- errors -->": reference.error_table,
}
EXAMPLE = re.compile(r"<!-- example (\S+)\.(\w+) -->")
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text as it is rendered. Raises PluginError for a link to no file, and OSError for
    an example that is not there."""
    for marker, part in PARTS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, part())

    def shown(example: re.Match[str]) -> str:
        path = f"docs/examples/{example[1]}.{example[2]}"
        return f'```{example[2]} title="{path}"\n{(ROOT / path).read_text()}```'

    def named(link: re.Match[str]) -> str:
        text, path = link[1], link[2]
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_path} links to {path}, which is not there.")
        return f"`{path}`" if text.strip("`").rstrip("/") in path else f"{text} (`{path}`)"

    return EXAMPLE.sub(shown, OUTSIDE.sub(named, markdown))
