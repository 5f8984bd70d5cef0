from __future__ import annotations

from pathlib import Path

import pytest

from argus.core.errors import ModelError
from argus.families.catalog import default_family, list_families, read_family

GOOD = """
name: mine
description: A family of my own.
models: {large: owner/large}
exact: {model: large, sampler: ddim, width: 512, height: 512, steps: 40, guidance: 6}
"""


def test_the_default_family_is_bundled() -> None:
    assert default_family().bundled
    assert next(iter(list_families().values())) == default_family()


def test_a_family_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    family = read_family(tmp_path / "mine.yaml")
    assert family.exact.steps == 40
    assert not family.bundled


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 40, ", "", "steps"),
        ("model: large", "model: huge", "'huge' as the exact model"),
        ("name: mine", "nom: mine", "nom"),
        ("name: mine", "name: [", "cannot be used"),
    ],
)
def test_a_wrong_family_file_says_what_is_wrong(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(ModelError, match=message):
        read_family(tmp_path / "mine.yaml")
