"""What deploy/ says to Argus is what Argus understands, and to others what they do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from compose_spec import PyCompose

from argus.config import Settings, read_settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
END_S = 15  # for the process to end after the last step, as docs/deployment.md says
LEAST_S = END_S + sum(Settings.model_fields[name].default for name in ("drain_s", "grace_s"))


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def server() -> dict[str, Any]:
    """The container of the server in kuberay.yaml."""
    clusters = yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    (cluster,) = [one for one in clusters if one["kind"] == "RayCluster"]
    containers = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = next(one for one in containers if one["name"] == "argus")
    return found


def test_the_environment_of_the_server_is_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in server()["env"]:
        if one["name"].startswith("ARGUS_"):
            monkeypatch.setenv(one["name"], one["value"])
    settings, origins = read_settings({})
    assert set(origins.values()) == {"the environment"}
    assert settings.workers == "ray" and settings.worker_types["gpu"].gpus == 1


def settings_of(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that variables make, of which every ARGUS_ one must be a setting."""
    ours = {name: value for name, value in variables.items() if name.startswith("ARGUS_")}
    for name, value in ours.items():
        assert name.removeprefix("ARGUS_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    return read_settings({})[0]


def test_dockerfiles_pass_hadolint() -> None:
    files = [DEPLOY / "Dockerfile", DEPLOY / "ray.Dockerfile"]
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--failure-threshold", "info", *files],
        capture_output=True, text=True,
    )  # fmt: skip
    assert linted.returncode == 0, linted.stdout + linted.stderr


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and their arguments."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_runs_as_a_user_of_its_own_and_says_when_it_is_ready() -> None:
    last = instructions("Dockerfile")
    names = [name for name, _ in last]
    last = last[len(names) - names[::-1].index("FROM") :]  # of the stage that is the image
    known = dict(last)
    assert known["USER"] == "10001:10001"
    assert "/ready" in known["HEALTHCHECK"]
    assert known["ENTRYPOINT"] == '["argus"]' and known["CMD"] == '["serve"]'


def test_the_image_s_variables_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = " ".join(what for name, what in instructions("Dockerfile") if name == "ENV")
    variables = dict(pair.split("=", 1) for pair in given.split())
    settings = settings_of(variables, monkeypatch)
    assert settings.host == "0.0.0.0" and settings.data == Path("/data/argus")
    assert not [name for name in variables if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


def test_the_image_is_built_of_what_the_context_has() -> None:
    """.dockerignore lets in what the package is built from, and nothing else."""
    let_in = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert set(let_in) == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "src"}
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_keep_to_the_specification(name: str) -> None:
    compose = PyCompose.from_yaml((DEPLOY / name).read_text())
    compose.validate()
    compose.to_spec()


def test_the_composed_server_is_configured_and_has_time_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argus = read("compose.yaml")["services"]["argus"]
    settings = settings_of(argus["environment"], monkeypatch)
    assert settings.cache_catalogue == "postgresql://argus@postgres/argus"
    assert int(argus["stop_grace_period"].removesuffix("s")) >= LEAST_S


def test_composed_services_mount_what_is_there_and_listen_on_this_machine_alone() -> None:
    content = read("compose.yaml")
    for name, service in content["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (DEPLOY / source).exists() if source.startswith(".") else True
            assert there, f"{name} mounts {source}"
            assert source.startswith(".") or source in content["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        assert "build" in service or re.search(r":v?\d", service["image"]), "a pinned image"
        for variable, value in service.get("environment", {}).items():
            assert "PASSWORD" not in variable or value.startswith("${"), "no secret in the file"


def test_the_composed_prometheus_scrapes_the_server_as_the_other_one_does() -> None:
    content, alone = read("compose.yaml"), read("prometheus/prometheus.yaml")
    composed = yaml.safe_load(content["configs"]["prometheus"]["content"])
    (job,), (other,) = composed.pop("scrape_configs"), alone.pop("scrape_configs")
    assert composed == alone and job["job_name"] == other["job_name"]
    assert job["static_configs"] == [{"targets": ["argus:8000"]}]
    assert "argus" in content["services"]


def test_grafana_shows_the_dashboard_from_the_prometheus_that_is_composed() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/argus.yaml").read_text())["providers"]
    mounts = read("compose.yaml")["services"]["grafana"]["volumes"]
    assert any(f":{provider['options']['path']}/argus.json" in mount for mount in mounts)


@pytest.fixture(params=["base", "gpu", "monitoring"])
def resources(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What an overlay of deploy/kubernetes makes, by kind."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, for its kustomize")
    made = subprocess.run(
        [kubectl, "kustomize", DEPLOY / "kubernetes" / request.param],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {one["kind"]: one for one in yaml.safe_load_all(made.stdout)}


def test_kubernetes_resources_keep_to_its_schemas(resources: dict[str, Any]) -> None:
    for kind, one in resources.items():
        if kind != "ServiceMonitor":  # of the Prometheus operator
            kubernetes_validate.validate(one, "1.37", strict=True)


def test_pods_are_found_by_the_service_and_stop_in_time(resources: dict[str, Any]) -> None:
    spec = resources["StatefulSet"]["spec"]
    pod = spec["template"]
    for kind in ("Service", "PodDisruptionBudget"):
        selector = resources[kind]["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert wanted.items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["terminationGracePeriodSeconds"] >= LEAST_S
    assert resources["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    mounted = {one["name"] for one in container["volumeMounts"]}
    given = {one["name"] for one in pod["spec"]["volumes"]}
    assert mounted == given | {one["metadata"]["name"] for one in spec["volumeClaimTemplates"]}


def test_the_monitor_finds_the_service(resources: dict[str, Any]) -> None:
    monitor, service = resources.get("ServiceMonitor"), resources["Service"]
    if monitor is None:
        pytest.skip("of the overlay monitoring")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]


def test_the_settings_in_the_config_map_are_settings(resources: dict[str, Any]) -> None:
    file = DEPLOY / "kubernetes" / "base" / "argus.yaml"
    assert resources["ConfigMap"]["data"]["argus.yaml"] == file.read_text()
    settings, origins = read_settings({}, file)
    assert set(origins.values()) == {str(file)}
    assert settings.host == "0.0.0.0" and settings.data == Path("/data/argus")
