"""Finds the families that come with the package: one `family.yaml` or `NAME.yaml` each."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from argus.core.errors import ModelError
from argus.core.family import (
    EXACT,
    SIDE_STEP,
    UPSTREAM,
    Family,
    ScorerSpec,
    Sizes,
    Variant,
    skip_name,
)
from argus.core.job import MAX_STEPS

HERE = Path(__file__).parent
RESERVED = {"prompt", "model", "n", "size", "seed", "num_inference_steps"}  # of a job itself
NAME = r"^[A-Za-z0-9_.-]+$"  # of families and variants, which headers have


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ExactFile(_Part):
    model: str
    sampler: str
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    steps: int = Field(ge=1, le=MAX_STEPS)
    guidance: float = Field(ge=0, le=100)
    extra: dict[str, Any] = {}


class _CheaperFile(_Part):
    """What is not given is as in the exact variant."""

    model: str | None = None
    sampler: str | None = None
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=100)
    extra: dict[str, Any] | None = None
    scale: float | None = Field(None, gt=0, lt=1)


class _ScorerFile(_Part):
    kind: str = Field(pattern=r"^(clip|pickscore|[\w.]+:\w+)$")
    source: str | None = None
    unrelated: float | None = None
    score: str | None = None


class _SizesFile(_Part):
    """`native` are such as 64x64; `other` ones are refused if they are far from the exact
    variant's, or resized from a native one, up to `limit` pixels a side."""

    native: list[Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]] = []
    other: Literal["refuse", "resize"] = "refuse"
    limit: int = Field(2048, gt=0, le=8192)


class _FamilyFile(_Part):
    name: str = Field(pattern=NAME)
    description: str
    models: dict[str, str]
    exact: _ExactFile
    skips: dict[int, float] = {}
    variants: dict[Annotated[str, Field(pattern=NAME)], _CheaperFile] = {}
    scorer: _ScorerFile | None = None
    encoder: str | None = None
    ideas: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    examples: list[str] = []
    sizes: _SizesFile = _SizesFile()


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

    Prompts of a family whose exact model only an upstream has are embedded by the default family's
    text encoder, unless the file names another. Raises ModelError if the file is not as it should
    be.
    """
    try:
        content = _FamilyFile.model_validate(yaml.load(path.read_text(), _UniqueKeys))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ModelError(f"The family file {path} cannot be used: {error}") from error
    exact = Variant(**content.exact.model_dump())
    cheaper = {name: _cheaper(exact, variant) for name, variant in content.variants.items()}
    for problem in _problems(content, exact, cheaper):
        raise ModelError(f"The family file {path} {problem}")
    models = {name: _source(path.parent, source) for name, source in content.models.items()}
    encoder = None if content.encoder is None else _source(path.parent, content.encoder)
    if encoder is None and models[exact.model] == UPSTREAM:
        encoder = default_family().encoder_source
    return Family(
        name=content.name,
        description=content.description,
        models=models,
        exact=exact,
        skips=dict(sorted(content.skips.items())),
        cheaper=cheaper,
        scorer=None if content.scorer is None else ScorerSpec(**content.scorer.model_dump()),
        encoder=encoder,
        ideas=content.ideas,
        examples=tuple(content.examples),
        folder=str(path.parent),
        bundled=all(Path(source).is_dir() for source in models.values()),
        sizes=_sizes(content.sizes, exact),
    )


def _cheaper(exact: Variant, content: _CheaperFile) -> Variant:
    variant = replace(exact, **content.model_dump(exclude_none=True))
    width, height = variant.sides(exact.width, exact.height)
    return replace(variant, width=width, height=height)


def _sizes(content: _SizesFile, exact: Variant) -> Sizes:
    native = {(exact.width, exact.height): None}
    for size in content.native:
        width, height = map(int, size.split("x"))
        native[width, height] = None
    return Sizes(tuple(native), content.limit if content.other == "resize" else None)


def _size_problems(content: _SizesFile) -> Iterator[str]:
    for size in content.native:
        sides = [int(side) for side in size.split("x")]
        if any(side % SIDE_STEP for side in sides):
            yield f"has the native size {size}; sides must be multiples of {SIDE_STEP}."
        if content.other == "resize" and max(sides) > content.limit:
            yield f"has the native size {size}, beyond its limit of {content.limit} pixels a side."


def _problems(content: _FamilyFile, exact: Variant, cheaper: dict[str, Variant]) -> Iterator[str]:
    """What is wrong with a family beyond the form of its file."""
    yield from _size_problems(content.sizes)
    known = ", ".join(content.models)
    for name, variant in {EXACT: exact, **cheaper}.items():
        if variant.model not in content.models:
            yield f"gives {name!r} the model {variant.model!r}, but its models are {known}."
    if content.skips and content.models.get(exact.model) == UPSTREAM:
        yield (
            f"skips steps of {exact.model!r}, which only an upstream has: only Argus's own engines "
            "resume from cached latents; leave skips out."
        )
    for name, variant in {EXACT: exact, **cheaper}.items():
        upstream = content.models.get(variant.model) == UPSTREAM
        if upstream and variant.sampler != "default":
            yield f"gives {name!r} a sampler, which upstreams cannot be told; write default."
        if not upstream and variant.scale != 1.0:
            yield f"gives {name!r} a scale, but only upstreams make smaller pictures; leave it out."
        if RESERVED & set(variant.extra):
            named = ", ".join(sorted(RESERVED & set(variant.extra)))
            yield f"has {named} in the extra fields of {name!r}, which Argus sets itself."
    for k in content.skips:
        if not 0 < k < exact.steps:
            yield f"skips {k} of {exact.steps} steps; a skip must be from 1 to {exact.steps - 1}."
    for name, variant in cheaper.items():
        if name == EXACT:
            yield "has two exact variants: leave 'exact' out of its variants."
        if name.startswith(skip_name(1)[:-1]):
            yield f"calls a variant {name!r}; such names are kept for its skips."
        if variant == exact:
            yield f"has two exact variants: {name!r} differs from 'exact' in nothing."


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _source(folder: Path, source: str) -> str:
    beside = folder / source
    return str(beside) if beside.is_dir() else source
