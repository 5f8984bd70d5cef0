"""Finds the families that come with the package: one `family.yaml` or `NAME.yaml` each."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from argus.core.errors import ModelError
from argus.core.family import Family, Variant

HERE = Path(__file__).parent


class _VariantFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    sampler: str
    width: int
    height: int
    steps: int
    guidance: float


class _FamilyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[\w.-]+$")
    description: str
    models: dict[str, str]
    exact: _VariantFile
    skips: dict[int, float] = {}


def list_families() -> dict[str, Family]:
    """Every family by name, bundled ones first."""
    files = [*sorted(HERE.glob("*/family.yaml")), *sorted(HERE.glob("*.yaml"))]
    found = [read_family(path) for path in files]
    return {family.name: family for family in sorted(found, key=lambda f: not f.bundled)}


def default_family() -> Family:
    """The family that needs no download."""
    for family in list_families().values():
        if family.bundled:
            return family
    raise ModelError("This installation bundles no family; name one, or give a model's folder.")


def find_family(name: str) -> Family:
    """A known family by name, or one of your own by the path of its YAML file.

    Raises ModelError if there is none.
    """
    if name.endswith((".yaml", ".yml")):
        return read_family(Path(name))
    known = list_families()
    if name not in known:
        raise ModelError(
            f"There is no family {name!r}: use {', '.join(known)}, or the path of a family's YAML."
        )
    return known[name]


def read_family(path: Path) -> Family:
    """Read one family file. A model source that is a folder beside the file counts as bundled.

    Raises ModelError if the file is not as it should be.
    """
    try:
        content = _FamilyFile.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ModelError(f"The family file {path} cannot be used: {error}") from error
    if content.exact.model not in content.models:
        raise ModelError(
            f"The family file {path} names {content.exact.model!r} as the exact model, "
            f"but its models are {', '.join(content.models)}."
        )
    steps = content.exact.steps
    wrong = [k for k in content.skips if not 0 < k < steps]
    if wrong:
        raise ModelError(
            f"The family file {path} skips {wrong[0]} of {steps} steps; "
            f"a skip must be from 1 to {steps - 1}."
        )
    models = {name: _source(path.parent, source) for name, source in content.models.items()}
    return Family(
        name=content.name,
        description=content.description,
        models=models,
        exact=Variant(**content.exact.model_dump()),
        skips=dict(sorted(content.skips.items())),
        bundled=all(Path(source).is_dir() for source in models.values()),
    )


def _source(folder: Path, source: str) -> str:
    beside = folder / source
    return str(beside) if beside.is_dir() else source
