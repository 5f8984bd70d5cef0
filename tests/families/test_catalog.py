from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from argus.control.variants import DeviceType, variant_table
from argus.core.errors import ModelError
from argus.engine.sources import family_fingerprint, model_folder
from argus.families.catalog import default_family, list_families, read_family

GOOD = """
name: mine
description: A family of my own.
models: {large: owner/large, small: owner/small}
exact: {model: large, sampler: ddim, width: 512, height: 512, steps: 40, guidance: 6}
skips: {10: 0.8, 5: 0.7}
variants:
  quick: {steps: 20}
  light: {model: small}
scorer: {kind: clip, source: owner/clip}
"""


def test_the_default_family_is_bundled() -> None:
    assert default_family().bundled
    assert next(iter(list_families().values())) == default_family()


def test_a_family_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    family = read_family(tmp_path / "mine.yaml")
    assert family.exact.steps == 40
    assert {name: family.strategy(name) for name in family.variants} == {
        "exact": "exact", "skip-5": "cache", "skip-10": "cache", "quick": "steps", "light": "model",
    }  # fmt: skip
    assert family.variants["light"] == replace(family.exact, model="small")
    assert family.variants["skip-10"] == replace(family.exact, skip=10)
    assert not family.bundled


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 40, ", "", "steps"),
        ("model: large", "model: huge", "'exact' the model 'huge'"),
        ("name: mine", "nom: mine", "nom"),
        ("name: mine", "name: [", "cannot be used"),
        ("steps: 20", "steps: 0", "greater than or equal to 1"),
        ("model: small", "model: huge", "'light' the model 'huge'"),
        ("skips: {10:", "skips: {40:", "skips 40 of 40 steps; a skip must be from 1 to 39"),
        ("  light:", "  exact:", "two exact variants"),
        ("{steps: 20}", "{steps: 40}", "two exact variants: 'quick' differs"),
        ("  light:", "  skip-3:", "kept for its skips"),
        ("  light:", "  quick:", "'quick' is given twice"),
        ("kind: clip", "kind: beauty", "scorer.kind"),
        ("  quick:", "  schnell-für-alle:", "should match pattern"),
        ("name: mine", "sizes: {native: [60x64]}\nname: mine", "60x64; sides must be multiples"),
        (
            "name: mine",
            "sizes: {native: [4096x64], other: resize}\nname: mine",
            "its limit of 2048",
        ),
    ],
)
def test_a_wrong_family_file_says_what_is_wrong(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(ModelError, match=message):
        read_family(tmp_path / "mine.yaml")


UPSTREAM = """
name: gateway
description: Models of other servers.
models: {large: upstream, small: upstream}
exact: {model: large, sampler: default, width: 512, height: 512, steps: 40, guidance: 6}
variants:
  gated: {steps: 30, extra: {cfg_gate_step: 10}}
  light: {model: small}
"""


def test_a_family_of_upstreams_has_no_weights_and_the_default_family_s_encoder(
    tmp_path: Path,
) -> None:
    (tmp_path / "gateway.yaml").write_text(UPSTREAM)
    family = read_family(tmp_path / "gateway.yaml")
    assert family.variants["gated"].job("a fish", 0).extra == {"cfg_gate_step": 10}
    assert family.encoder_source == default_family().encoder_source
    plain = UPSTREAM.replace(", extra: {cfg_gate_step: 10}", "")
    (tmp_path / "plain.yaml").write_text(plain)
    assert family_fingerprint(family) != family_fingerprint(read_family(tmp_path / "plain.yaml"))
    with pytest.raises(ModelError, match="only an upstream has them"):
        model_folder(family.models["large"])


def test_a_smaller_picture_costs_by_its_area(tmp_path: Path) -> None:
    text = UPSTREAM.replace("{model: small}", "{scale: 0.3}")
    (tmp_path / "gateway.yaml").write_text(text)
    family = read_family(tmp_path / "gateway.yaml")
    light = family.variants["light"]
    assert (light.width, light.height) == (152, 152)  # a multiple of 8
    assert light.work_steps == pytest.approx(40 * 0.09)
    assert light.sides(1024, 512) == (304, 152)
    table = variant_table(family, [DeviceType("upstream")])
    assert table.steps.tolist() == pytest.approx([40, 30, 3.6])
    (tmp_path / "mine.yaml").write_text(
        text.replace("small: upstream", "small: folder").replace(
            "{scale: 0.3}", "{model: small, scale: 0.3}"
        )
    )
    with pytest.raises(ModelError, match="'light' a scale, but only upstreams make smaller"):
        read_family(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("variants:", "skips: {10: 0.8}\nvariants:", "resume from cached latents; leave skips"),
        ("sampler: default", "sampler: ddim", "a sampler, which upstreams cannot be told"),
        ("{cfg_gate_step: 10}", "{seed: 1}", "seed in the extra fields of 'gated'"),
        ("model: small}", "scale: 1.5}", "less than 1"),
    ],
)
def test_what_upstreams_cannot_do_is_said(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "gateway.yaml").write_text(UPSTREAM.replace(old, new))
    with pytest.raises(ModelError, match=message):
        read_family(tmp_path / "gateway.yaml")
