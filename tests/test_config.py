from __future__ import annotations

import re
from pathlib import Path

import pytest

from argus.config import Settings, read_settings
from argus.core.errors import BadRequest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "argus.yaml"
    path.write_text("port: 9000\npolicy: clipper-ha\ncache_limit: 20GB\n")
    return path


def test_flags_beat_the_environment_beats_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_PORT", "9001")
    monkeypatch.setenv("ARGUS_QUEUE_LIMIT", "3")
    settings, origins = read_settings({"queue_limit": 5, "host": None}, file)
    assert settings.policy == "clipper-ha"
    assert settings.cache_limit == 20_000_000_000
    assert settings.port == 9001
    assert settings.queue_limit == 5
    assert settings.host == "127.0.0.1"
    assert origins == {
        "policy": str(file),
        "cache_limit": str(file),
        "port": "the environment",
        "queue_limit": "a flag",
    }


def test_the_environment_can_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGUS_CONFIG", str(file))
    assert read_settings({})[0].port == 9000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "no setting prot .*the settings are host, port"),
        ("port: high", "port is 'high' .*argus.yaml.*valid integer"),
        ("port: 99999", "less than or equal to 65535"),
        ("cache_limit: much", "cache_limit is 'much'"),
        ("cache_scope: all", "'key' or 'shared'"),
        ("grace_s: 0", "greater than 0"),
        ("upstreams: [{url: ftp://here}]", r"upstreams.0.url is 'ftp://here'.*http://host:8000"),
        ("upstreams: [{url: 'http://me:secret@here'}]", r"http://me:\*\*\*@here.*as key_env"),
        ("upstreams: [{url: http://here, key_env: NO_KEY}]", "variable NO_KEY is not set"),
        ("upstreams: [{url: http://here, fields: {steps: s}}]", "steps is not a field that Argus"),
        ("upstreams: [{url: http://here, ca_file: no.pem}]", "no.pem.*there is no such file"),
        ("upstreams: [{url: http://here, health: ready}]", "upstreams.0.health is 'ready'"),
        ("- port", "not a YAML mapping"),
        ("port: [", "not a YAML mapping"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_and_where(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(BadRequest, match=message):
        read_settings({}, file)


def test_a_missing_file_and_a_wrong_variable_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match=r"no configuration file nowhere\.yaml"):
        read_settings({}, Path("nowhere.yaml"))
    monkeypatch.setenv("ARGUS_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(BadRequest, match="from the environment"):
        read_settings({})


@pytest.mark.parametrize("value", ["default=3x", "{default: {latency: 3x}}", ""])
def test_a_variable_that_should_be_json_and_is_not_is_named_with_its_value(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_SLO", value)
    with pytest.raises(BadRequest) as caught:
        read_settings({})
    assert f"ARGUS_SLO is {value!r}" in str(caught.value)
    example = re.search(r"such as '(.*)'", str(caught.value))
    assert example is not None
    monkeypatch.setenv("ARGUS_SLO", example[1])  # what the sentence says is right, is
    assert read_settings({})[0].slo


def test_a_variable_of_json_of_another_kind_is_said_to_be_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARGUS_SLO", '["3x"]')
    with pytest.raises(BadRequest, match=r"slo is \['3x'\] \(from the environment\)"):
        read_settings({})


def test_a_variable_that_nearly_names_a_setting_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ARGUS_QUEUE_LIMT", "3")
    monkeypatch.setenv("ARGUS_SERVICE_HOST", "10.0.0.1")  # Kubernetes' own
    found, _ = read_settings({})
    assert found.queue_limit == Settings.model_fields["queue_limit"].default
    assert [record.getMessage() for record in caplog.records] == [
        "ARGUS_QUEUE_LIMT is not a setting and has no effect; is ARGUS_QUEUE_LIMIT meant?"
    ]
