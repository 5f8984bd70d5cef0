"""Checks of the family: its file, its models, and what was measured of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from argus.config import Settings
from argus.control.policies import POLICIES
from argus.core.errors import ModelError
from argus.core.family import UPSTREAM, Family
from argus.core.profile import Profile
from argus.families.catalog import default_family, find_family
from argus.server.doctor.finding import Finding, ok, problem, warning

DAY_S = 86400.0
OLD_DAYS = 180
HUB_S = 5.0


def of(settings: Settings) -> Family:
    """The family that the settings name. Raises ModelError."""
    return default_family() if settings.family is None else find_family(settings.family)


def described(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The family's file."""
    if family is None:
        of(settings)  # raises what is wrong with it
        return
    used = {one.model for one in family.variants.values()}
    yield ok("family", f"{family.name}: {len(used)} models, {len(family.variants)} variants")
    if family.scorer is None:
        yield warning(
            "family", f"{family.name} names no scorer: no quality can be measured",
            "Give its file a scorer, such as {kind: clip, source: openai/clip-vit-large-patch14}.",
        )  # fmt: skip


def models(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """Where the models' weights and the text encoder are: in folders, in the hub's cache, on the
    hub, at upstreams."""
    if family is None:
        return
    from argus.engine.sources import model_folder

    used = dict.fromkeys(one.model for one in family.variants.values())
    sources = {name: family.models[name] for name in used}
    if family.encoder is not None:
        sources["the text encoder"] = family.encoder
    here, remote = [], {}
    for name, source in sources.items():
        if source == UPSTREAM:
            continue
        if _is_hub_id(source):
            remote[name] = source
        elif name in used:
            model_folder(source)  # raises what is wrong with it
            here.append(name)
    if here:
        yield ok("models", f"in folders of this machine: {', '.join(here)}")
    cached = {name: source for name, source in remote.items() if _cached(source)}
    if cached:
        yield ok("models", f"downloaded already: {', '.join(cached)}")
    for name, source in remote.items():
        if name not in cached:
            yield _on_hub(name, source)


def _is_hub_id(source: str) -> bool:
    folder = Path(source).expanduser().is_dir()
    return not folder and not source.startswith((".", "/", "~")) and source.count("/") == 1


def _cached(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "model_index.json"), str)


def _on_hub(name: str, source: str) -> Finding:
    """Whether the hub gives a model. Asks for its first file's head alone."""
    import httpx
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = hf_hub_url(source, "model_index.json", endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        status = httpx.head(url, headers=headers, timeout=HUB_S, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        return problem(
            "models", f"{name} ({source}) is not here, and the hub cannot be reached "
            f"({type(error).__name__})",
            "Check the network or HF_ENDPOINT, or download it elsewhere and give its folder.",
        )  # fmt: skip
    if status in (401, 403):
        return problem(
            "models", f"the hub does not give {name} ({source}): {status}",
            "See that it exists, accept its terms on the hub, and log in with `hf auth login`.",
        )  # fmt: skip
    if status >= 400:
        advice = "Check the id in the family's file."
        return problem("models", f"the hub has no pipeline {source} ({status})", advice)
    return warning(
        "models", f"{name} ({source}) is downloaded at the first start",
        f"Download it before: hf download {source}",
    )  # fmt: skip


def profile(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The profile for the workers of this machine: whether it fits them."""
    from argus.server.doctor.machine import runs_here

    if family is None or not runs_here(settings, family):
        return
    from argus.engine.sources import settled
    from argus.lab.profiling import describe
    from argus.server.model import PROFILE, profile_of
    from argus.server.upstreams import own_models

    make = f"argus profile {settings.family or family.name} --out profile.json, and set `profile`"
    file = settings.profile or Path(family.folder) / PROFILE
    if not file.is_file():
        if settings.profile is not None:
            yield problem("profile", f"there is no file {file}", make)
        else:
            yield warning("profile", "none: costs are guesses, and the policy is nirvana", make)
        return
    where, dtype = settled(settings.device, settings.dtype)
    found = profile_of(settings.profile, family, where, own_models(family))
    if found is None:
        whole = Profile.read(file)
        lacking = sorted(set(own_models(family)) - set(whole.models))
        what = f"lacks {', '.join(lacking)}" if lacking else f"is of {whole.device['device']}"
        yield warning("profile", f"{file} {what}, and is not used on {where}", make)
        return
    yield from _doubts(file, found, describe(where, dtype), family, make)
    days = (time.time() - file.stat().st_mtime) / DAY_S
    age = "shipped with the family" if settings.profile is None else f"{days:.0f} days old"
    yield ok("profile", f"{file} ({age}), measured on {found.device.get('name')}")
    if settings.profile is not None and days > OLD_DAYS:
        yield warning("profile", f"{file} is {days:.0f} days old", f"Measure again: {make}")


def _doubts(
    file: Path, found: Profile, here: dict[str, object], family: Family, make: str
) -> Iterator[Finding]:
    """In what a profile's device or weights are not those that will be served."""
    for what in ("name", "dtype"):
        there = found.device.get(what)
        if there is not None and there != here[what]:
            yield warning(
                "profile", f"measured on {there}, this machine has {here[what]}: the server scales "
                "all times by what a picture takes here", f"Measure here: {make}",
            )  # fmt: skip
    for name, known in found.weights.items():
        if name in family.models and _weights(family, name) not in (None, known):
            yield warning(
                "profile", f"{name} had other weights when {file} was measured",
                f"Measure again: {make}",
            )  # fmt: skip


def _weights(family: Family, name: str) -> str | None:
    """The fingerprint of a model's weights, None if they are not in a folder here."""
    from argus.engine.sources import fingerprint

    folder = Path(family.models[name]).expanduser()
    return fingerprint(folder) if folder.is_dir() else None


def predictor(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The predictor that a server would use."""
    if family is None:
        return
    from argus.engine.sources import family_fingerprint
    from argus.quality.predictor import Predictor
    from argus.server.model import PREDICTOR

    train = f"argus calibrate and argus train {settings.family or family.name} make one"
    sources = [family.models[one.model] for one in family.variants.values()]
    if any(_is_hub_id(one) and not _cached(one) for one in sources):
        yield ok("predictor", "not checked: it depends on weights that are not downloaded yet")
        return
    places = [settings.data / PREDICTOR, Path(family.folder) / PREDICTOR]
    if settings.predictor is not None:
        places = [settings.predictor]
    made_for = family_fingerprint(family)
    for folder in places:
        if not folder.is_dir() and settings.predictor is None:
            continue
        try:
            found = Predictor.load(folder, made_for)
        except ModelError as error:
            level = problem if settings.predictor is not None else warning
            yield level("predictor", str(error), train)
            continue
        yield ok("predictor", f"{folder}: made for {len(found.variants)} variants of {family.name}")
        return
    if settings.predictor is None:
        yield warning("predictor", "none: quality is not predicted, the policy is nirvana", train)


def table(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The table of measured quality, which `argus train` and `argus simulate` read."""
    if family is None:
        return
    file = Path(family.folder) / "quality.parquet"
    if file.is_file():
        days = (time.time() - file.stat().st_mtime) / DAY_S
        age = "shipped with the family" if family.bundled else f"{days:.0f} days old"
        yield ok("quality table", f"{file} ({age})")
    else:
        yield ok("quality table", "none beside the family's file; a server does not need it")


def policy(settings: Settings, family: Family | None) -> Iterator[Finding]:
    """The policy's name."""
    if settings.policy is not None and settings.policy not in POLICIES:
        yield problem(
            "policy", f"there is no policy {settings.policy!r}", f"Use {', '.join(POLICIES)}."
        )
    elif settings.policy == "oracle":
        yield problem("policy", "oracle knows the future, and is for simulations", "Use price.")
    elif settings.policy is not None:
        yield ok("policy", settings.policy)
    else:
        yield ok("policy", "price, or nirvana without a profile and predictor that fit")
