"""The page on decisions says what the command above its tables prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_page_s_tables_are_those_of_a_run() -> None:
    ran = subprocess.run(
        [sys.executable, DOCS / "tools" / "worked_example.py"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    printed = {tuple(row.strip("| ").split(" | ")) for row in ran.stdout.splitlines()}
    page = (DOCS / "decision.md").read_text().replace("**", "")
    variants = r"exact|skip-\d+|steps-\d|small(?:-\d)?"
    rows = re.findall(rf"^\| ((?:{variants}) \|.*) \|$", page, re.MULTILINE)
    assert len(rows) == 13
    for row in rows:
        assert tuple(row.split(" | ")) in printed
    chosen = re.findall(r"price [\d.]+: (\S+)$", ran.stdout, re.MULTILINE)
    assert chosen == ["exact", "exact", "steps-4", "steps-4", "small-3", "steps-2"]
