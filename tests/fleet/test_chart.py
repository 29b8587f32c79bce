"""The Helm chart, rendered and checked against Kubernetes' schemas, and Envoy's configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imprompt_serving.pipeline.shared_cache import VARIABLE

yaml = pytest.importorskip("yaml", reason="needs the extra `fleet`: make fleet")
helm = pytest.importorskip("helm_python.chart", reason="needs the extra `fleet`: make fleet")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the extra `fleet`: make fleet")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/imprompt"
CUSTOM = {"ScaledObject", "ServiceMonitor", "ServingRuntime", "InferenceService"}
"""Kinds whose schemas are not part of Kubernetes."""
HPA: dict[str, Any] = {
    "autoscaling": {"kind": "hpa"},
    "server": {"repository": {"claim": "models"}, "sharedCacheSecret": "cache"},
    "gateway": {"keysSecret": "keys"},
}


def gpu() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / "values-gpu.yaml").read_text())
    return values


def rendered(values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Render the chart and return its objects by kind and name."""
    files = helm.Chart.load(CHART).render(values, name="pictures", namespace="default")
    objects = [each for name, text in files.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text)]
    return {(each["kind"], each["metadata"]["name"]): each for each in objects if each}


@pytest.mark.parametrize("values", [{}, gpu(), HPA], ids=["cpu", "gpu", "hpa"])
def test_objects_fit_their_schemas(values: dict[str, Any]) -> None:
    objects = rendered(values)
    for (kind, _), each in objects.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(each, "1.33", strict=True)
    kinds = {"keda": "ScaledObject", "hpa": "HorizontalPodAutoscaler"}
    scaling = kinds.get(values.get("autoscaling", {}).get("kind"))
    assert [kind for kind, _ in objects if kind in kinds.values()] == ([scaling] if scaling else [])
    assert ("replicas" in objects["Deployment", "pictures-server"]["spec"]) == (not scaling)


def test_chart_has_no_lint() -> None:
    report = helm.lint(CHART)
    assert not report["errors"]
    assert all(message["severity"] < 2 for message in report["messages"]), report


def test_values_are_checked() -> None:
    with pytest.raises(Exception, match="autoscaling"):
        rendered({"autoscaling": {"kind": "magic"}})


@pytest.mark.parametrize("values", [{}, gpu(), HPA], ids=["cpu", "gpu", "hpa"])
def test_pods_are_hardened(values: dict[str, Any]) -> None:
    pods = [each["spec"]["template"]["spec"] for (kind, _), each in rendered(values).items() if kind == "Deployment"]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["resources"]["limits"]["memory"]


def test_servers_get_the_url_of_the_shared_cache() -> None:
    variables = []
    for values in ({}, HPA):
        (container,) = rendered(values)["Deployment", "pictures-server"]["spec"]["template"]["spec"]["containers"]
        variables.append({each["name"]: each.get("valueFrom") for each in container["env"]})
    assert VARIABLE not in variables[0]
    assert variables[1][VARIABLE] == {"secretKeyRef": {"name": "cache", "key": "url"}}


def test_selectors_find_pods_and_ports_have_names() -> None:
    objects = rendered(HPA)
    pods = {name: each["spec"]["template"] for (kind, name), each in objects.items() if kind == "Deployment"}
    ports = {port["name"] for pod in pods.values() for c in pod["spec"]["containers"] for port in c["ports"]}
    for (kind, name), each in objects.items():
        selector = each["spec"].get("selector") if kind == "Service" else None
        if kind == "PodDisruptionBudget":
            selector = each["spec"]["selector"]["matchLabels"]
        if selector:
            found = [p for p in pods.values() if selector.items() <= p["metadata"]["labels"].items()]
            assert len(found) == 1, (kind, name)
        if kind == "Service":
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports


@pytest.mark.parametrize("name", ["serving-runtime", "inference-service"])
def test_kserve_examples_serve_as_the_chart_does(name: str) -> None:
    each = yaml.safe_load((ROOT / f"deploy/kserve/{name}.yaml").read_text())
    assert each["apiVersion"].startswith("serving.kserve.io/")
    if name == "serving-runtime":
        (container,) = each["spec"]["containers"]
        (server,) = rendered({})["Deployment", "pictures-server"]["spec"]["template"]["spec"]["containers"]
        assert container["command"][:2] == server["command"][:2]
        assert set(container["args"]) == set(server["args"])


def test_envoy_takes_both_configurations(tmp_path: Path) -> None:
    pytest.importorskip("envoy", reason="needs the extra `fleet`: make fleet")
    chart = rendered({})["ConfigMap", "pictures-envoy"]["data"]["envoy.yaml"]
    command = [sys.executable, str(ROOT / "deploy/envoy/configure.py"), "gpu-1", "gpu-2:8011:8013"]
    hosts = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for text in (chart, hosts):
        file = tmp_path / "envoy.yaml"
        file.write_text(text)
        envoy = Path(sys.executable).with_name("envoy")
        subprocess.run([str(envoy), "--mode", "validate", "-c", str(file)], check=True, capture_output=True)
        (listener,) = yaml.safe_load(text)["static_resources"]["listeners"]
        assert listener["address"]["socket_address"]["port_value"] == 8001


@pytest.mark.parametrize("member", ["", ":8001", "host:0", "host:x", "host:1:2:3"])
def test_members_are_checked(member: str) -> None:
    command = [sys.executable, str(ROOT / "deploy/envoy/configure.py"), member]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "is not HOST[:GRPC_PORT[:HEALTH_PORT]]" in run.stderr
