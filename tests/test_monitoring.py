"""The dashboard and the alert rules of deploy/ use what a real server's /metrics has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from argus.config import Settings, Upstream
from tests.server.running import running, wait_until
from tests.workers.upstreams import upstream

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "argus.json"
PROMETHEUS = ROOT / "deploy" / "prometheus"
RUNBOOK = ROOT / "docs" / "operating.md"

SELECTOR = re.compile(r"\b((?:argus_|process_|vllm:)[a-z_:]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\bby \(([^)]*)\)")
LEGEND = re.compile(r"\{\{\s*(\w+)\s*\}\}")
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


@dataclass
class Exposed:
    """The metrics of servers: the values that each label of each sample's name was seen with."""

    labels: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    def read(self, text: str) -> None:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                seen = self.labels.setdefault(sample.name, {})
                for name, value in sample.labels.items():
                    seen.setdefault(name, set()).add(value)


@pytest.fixture(scope="module")
def exposed(
    measured_family: Path, tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exposed:
    """The metrics of a server that made pictures of all kinds, and of one with an upstream."""
    found, data = Exposed(), tmp_path_factory.mktemp("data")
    settings = Settings(
        family=str(measured_family), data=data / "own", workers=2, window_s=1.0, truth_share=1.0,
        cost_per_hour=2.5,
    )  # fmt: skip
    with running(settings) as server:
        server.generate("a red fish", argus={"variant": "exact"})
        wait_until(lambda: len(server.service.cache) > 0)
        server.generate("a red fish", argus={"variant": "other"})
        wait_until(lambda: server.metric("argus_measured_quality_count") > 0)

        def planned() -> bool:
            server.generate("a red fish")
            return server.metric("argus_plans_total", source="solver") > 0

        wait_until(planned)
        found.read(server.http.get("/metrics").text)
    family = data / "remote.yaml"
    family.write_text(
        "name: remote\ndescription: Elsewhere.\nmodels: {large: upstream}\n"
        "exact: {model: large, sampler: default, width: 64, height: 64, steps: 4, guidance: 3}\n"
        f"encoder: {tiny_sd}\n"
    )
    with (
        upstream("vllm-omni", model="acme/large", step_s=0.01) as one,
        running(
            Settings(
                family=str(family), data=data / "remote", upstreams=[Upstream(url=one.url)]
            )
        ) as server,
    ):  # fmt: skip
        wait_until(lambda: "argus_upstream_requests" in server.http.get("/metrics").text)
        found.read(server.http.get("/metrics").text)
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str, str]]:
    """Where each query of the dashboard is, the query, and the legend of its series."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]


def wrong(expression: str, exposed: Exposed, shown: str = "") -> list[str]:
    """What an expression, or the text shown beside its value, uses that no server has."""
    problems = []
    grouped = [one.split(", ") for one in GROUPING.findall(expression)]
    for name, matchers in SELECTOR.findall(expression):
        if name not in exposed.labels:
            problems.append(f"there is no {name}")
            continue
        known = exposed.labels[name]
        for label, value in MATCHER.findall(matchers):
            if label in SCRAPED:
                continue
            for one in value.split("|"):
                if one not in known.get(label, ()):
                    problems.append(f"{name} has no {label}={one}")
        used = {label for labels in grouped for label in labels}
        if not grouped:
            used |= set(LEGEND.findall(shown))
        problems += [f"{name} has no label {one}" for one in used - set(known) - SCRAPED]
    if grouped:
        lost = set(LEGEND.findall(shown)) - {label for labels in grouped for label in labels}
        problems += [f"{label} is grouped away" for label in lost]
    return problems


def test_every_query_of_the_dashboard_finds_what_it_asks_for(exposed: Exposed) -> None:
    found = {title: wrong(query, exposed, legend) for title, query, legend in queries()}
    assert {title: problems for title, problems in found.items() if problems} == {}
    assert len(found) > 30


def test_every_alert_finds_what_it_asks_for(exposed: Exposed) -> None:
    found = {}
    for rule in rules():
        said = " ".join(rule["annotations"].values())
        labels = " ".join(f"{{{{{one}}}}}" for one in re.findall(r"\$labels\.(\w+)", said))
        found[rule["alert"]] = wrong(rule["expr"], exposed, labels)
    assert {alert: problems for alert, problems in found.items() if problems} == {}


def test_a_query_of_what_is_not_there_is_found(exposed: Exposed) -> None:
    assert wrong("argus_nothing > 0", exposed) == ["there is no argus_nothing"]
    assert wrong('argus_drift{test="all"}', exposed) == ["argus_drift has no test=all"]
    assert wrong("sum by (slo) (argus_ready)", exposed) == ["argus_ready has no label slo"]
    assert wrong("sum(argus_ready)", exposed, "{{variant}}") == ["argus_ready has no label variant"]
    assert wrong("sum by (slo) (argus_slo_quality_floor)", exposed, "{{type}}") != []


def test_metrics_have_usual_names_and_labels_of_no_client(exposed: Exposed) -> None:
    assert not any("fish" in value for by in exposed.labels.values() for seen in by.values()
                   for value in seen)  # fmt: skip
    assert exposed.labels["argus_gpu_seconds_total"]["key"] == {""}
    for name in exposed.labels:
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", name)


def test_every_alert_says_what_to_do() -> None:
    headings = re.findall(r"^#+ (.+)$", RUNBOOK.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in headings}
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} <= set(rule["annotations"])
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (ROOT / page, anchor in anchors) == (RUNBOOK, True), rule["alert"]


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool (of Prometheus) is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fire_when_they_should_and_not_on_a_healthy_server() -> None:
    promtool("check", "rules", str(PROMETHEUS / "alerts.yaml"))
    promtool("test", "rules", str(PROMETHEUS / "alerts.test.yaml"))
    promtool("check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yaml"))
    tested = yaml.safe_load((PROMETHEUS / "alerts.test.yaml").read_text())["tests"]
    fired = {one["alertname"] for test in tested for one in test["alert_rule_test"]
             if one["exp_alerts"]}  # fmt: skip
    assert fired == {rule["alert"] for rule in rules()}


def test_the_dashboard_s_queries_are_promql(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__rate_interval", "5m", query)}
        for number, (_, query, _) in enumerate(queries())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool("check", "rules", str(file))


def test_the_dashboard_lets_its_viewer_choose_the_source_and_the_server() -> None:
    content = json.loads(DASHBOARD.read_text())
    variables = {one["name"]: one["type"] for one in content["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    for panel in content["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"]
    assert len({panel["id"] for panel in content["panels"]}) == len(content["panels"])
