"""deploy/helm: the chart says what the overlays of kustomize say."""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests import manifests
from tests.manifests import CHART, KUBERNETES, OVERLAYS, Manifest
from tests.services import program

# What helm adds to labels, and what kustomize does not have a name for.
HELMS = ("app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart")
# Lists whose order means nothing, by what names their items.
UNORDERED = {"env": "name", "volumes": "name", "volumeMounts": "mountPath"}


def normalized(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in (*HELMS, "namespace")}
        return {k: normalized(v, k) for k, v in kept.items()}
    if isinstance(value, list):
        items = [normalized(item) for item in value]
        if key in UNORDERED:
            return sorted(items, key=lambda item: str(item[UNORDERED[key]]))
        return sorted(items) if key == "args" and "--requirepass" not in items else items
    return " ".join(value.split()) if isinstance(value, str) else value


def named(rendered: list[Manifest]) -> Iterator[tuple[tuple[str, str], Manifest]]:
    for manifest in rendered:
        if manifest["kind"] != "Namespace":
            yield (manifest["kind"], manifest["metadata"]["name"]), normalized(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_is_what_the_overlay_is(overlay: str) -> None:
    ours = dict(named(manifests.kustomize(KUBERNETES / "overlays" / overlay)))
    chart = dict(named(manifests.chart(*manifests.values_of(overlay))))
    assert chart.keys() == ours.keys()
    for name, manifest in ours.items():
        assert chart[name] == manifest, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_fits_the_schemas(overlay: str) -> None:
    everything = [
        *("--set", "monitoring.enabled=true,monitoring.labels.release=prometheus"),
        *("--set", "autoscaling.enabled=true,sharedCache.enabled=true,spread=true"),
        *("--set", "tracing.endpoint=http://otel-collector.observability.svc:4317"),
        *("--set", "models.claim=mine,imagePullSecrets[0].name=registry,nodeSelector.gpu=h200"),
        *("--set", "env[0].name=HF_HUB_OFFLINE,env[0].value=x,tolerations[0].key=gpu"),
        *("--set", "networkPolicy.from[0].podSelector.matchLabels.app=ingress"),
        *("--set", "networkPolicy.egress[0].ports[0].port=8443"),
    ]
    rendered = manifests.chart(*manifests.values_of(overlay), *everything)
    for manifest in rendered:
        manifests.check_schema(manifest)
    container = manifests.server(rendered)
    assert manifests.environment(container)["HF_HUB_OFFLINE"] == "x"
    assert (
        "--otlp-traces-endpoint=http://otel-collector.observability.svc:4317" in (container["args"])
    )


def test_selectors_tell_releases_apart() -> None:
    rendered = manifests.chart(*manifests.values_of("multi-gpu"))
    for manifest in rendered:
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector:
            labels = selector.get("matchLabels", selector)
            assert labels["app.kubernetes.io/instance"] == "saccade"


@pytest.mark.parametrize(
    "value",
    [
        "gpus=-1",
        "gpu=1",
        "resources.memory=8GB",
        "resources.cpu=0.5",
        "startupSeconds=0",
        "autoscaling.prometheus=prometheus:9090",
        "models.accessMode=ReadOnlyMany",
    ],
)
def test_a_wrong_value_is_refused(value: str) -> None:
    with pytest.raises(RuntimeError, match=value.partition("=")[0].rpartition(".")[2]):
        manifests.chart("--set", value)


def test_a_number_of_replicas_and_an_autoscaler_exclude_each_other() -> None:
    assert manifests.one(manifests.chart("--set", "replicas=3"), "Deployment")["spec"][
        "replicas"
    ] == (3)
    with pytest.raises(RuntimeError, match="replicas must be null"):
        manifests.chart("--set", "replicas=3,autoscaling.enabled=true")


def test_the_chart_passes_helms_own_check() -> None:
    subprocess.run([program("helm"), "lint", "--strict", CHART], check=True, capture_output=True)
