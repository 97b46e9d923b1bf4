"""deploy/helm: the chart renders the same manifests as the kustomize overlays."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import manifests, promtool
from tests.manifests import CHART, KUBERNETES, OVERLAYS, Manifest, one
from tests.services import program

# Absent from kustomize: the release, in labels and queries, and helm's own annotations.
HELMS = (
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "helm.sh/chart",
    "annotations",
    "podTargetLabels",
)
MODELS = "saccade-models"
OF_THE_RELEASE = ', app_kubernetes_io_instance="saccade"'
# Lists whose order has no meaning, with the key that names their items.
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
    if isinstance(value, str):
        return " ".join(value.split()).replace(OF_THE_RELEASE, "")
    return value


def named(rendered: list[Manifest]) -> Iterator[tuple[tuple[str, str], Manifest]]:
    for manifest in rendered:
        if manifest["kind"] != "Namespace":
            yield (manifest["kind"], manifest["metadata"]["name"]), normalized(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_renders_the_manifests_of_the_overlay(overlay: str) -> None:
    ours = dict(named(manifests.kustomize(KUBERNETES / "overlays" / overlay)))
    chart = dict(named(manifests.chart(*manifests.values_of(overlay))))
    assert chart.keys() == ours.keys()
    for name, manifest in ours.items():
        assert chart[name] == manifest, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_chart_obeys_the_schemas(overlay: str) -> None:
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


def test_selectors_match_one_release_only() -> None:
    rendered = manifests.chart(*manifests.values_of("multi-gpu"))
    for manifest in rendered:
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector:
            labels = selector.get("matchLabels", selector)
            assert labels["app.kubernetes.io/instance"] == "saccade"


RELEASES = {"one": 10, "two": 90}  # with the load of each


@pytest.fixture(scope="module")
def releases() -> dict[str, list[Manifest]]:
    """Two of them in one namespace."""
    values = manifests.values_of("multi-gpu")
    return {name: manifests.chart(*values, release=name) for name in RELEASES}


def target_labels(name: str, rendered: list[Manifest]) -> str:
    """The labels that the operator gives the targets of a release in Prometheus."""
    labels = one(rendered, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
    monitor = one(rendered, "PodMonitor", name)["spec"]
    told = {label: labels[label] for label in monitor["podTargetLabels"]}
    told |= {"namespace": "saccade", "job": labels[monitor["jobLabel"]], "pod": f"{name}-0"}
    names = {label.translate(str.maketrans("./-", "___")): value for label, value in told.items()}
    return ", ".join(f'{label}="{value}"' for label, value in names.items())


@pytest.mark.parametrize("workers", [10, 0])
def test_each_release_is_scaled_by_its_own_load(
    workers: int, releases: dict[str, list[Manifest]], tmp_path: Path
) -> None:
    """Without image workers, as for some models, only by requests."""
    series = {}
    for name, load in RELEASES.items():
        labels = target_labels(name, releases[name])
        images = load if workers else 0
        for metric, value in {
            "vllm:num_requests_running": load,
            "vllm:num_requests_waiting": load,
            "saccade_image_workers_busy": images,
            "saccade_image_queue": images,
            "saccade_image_workers": workers,
        }.items():
            series[f"{metric}{{{labels}}}"] = f"{value}x10"
    for name, load in RELEASES.items():
        triggers = one(releases[name], "ScaledObject", name)["spec"]["triggers"]
        queries = {each["name"]: each["metadata"]["query"] for each in triggers}
        asked = {
            each: promtool.values(query, series, tmp_path, at="4m")
            for each, query in queries.items()
        }
        assert asked == {
            "requests": [2 * load],
            "images": [2 * load / workers if workers else 0],
        }


def test_queries_of_the_autoscaler_are_empty_while_nothing_is_scraped(
    releases: dict[str, list[Manifest]], tmp_path: Path
) -> None:
    """KEDA then keeps the replicas; a value of 0 would remove them."""
    for trigger in one(releases["one"], "ScaledObject", "one")["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        assert promtool.values(query, {'up{job="x"}': "1x9"}, tmp_path, at="4m") == []
        assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_the_claim_of_models_is_kept_after_uninstall() -> None:
    claim = one(manifests.chart(*manifests.values_of("gpu")), "PersistentVolumeClaim", MODELS)
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize("values", [("models.storage=1Gi", MODELS), ("models.claim=mine", "mine")])
def test_models_are_stored_on_the_claim(values: tuple[str, str]) -> None:
    setting, claim = values
    rendered = manifests.chart("--set", setting)
    folder = manifests.volume_of(rendered, "/var/cache/saccade")
    assert folder == {"name": "cache", "persistentVolumeClaim": {"claimName": claim}}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://otel-collector.observability.svc:4317", 4317),
        ("https://otel.obs.svc:4318", 4318),
        ("http://10.0.0.1:4318/v1/traces", 4318),
    ],
)
def test_the_network_policy_allows_the_trace_collector(endpoint: str, port: int) -> None:
    rendered = manifests.chart("--set", f"tracing.endpoint={endpoint},tracing.namespace=traces")
    egress = one(rendered, "NetworkPolicy")["spec"]["egress"]
    (rule,) = (rule for rule in egress if "traces" in str(rule["to"]))
    assert rule["ports"] == [{"port": port, "protocol": "TCP"}]


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
        "tracing.endpoint=http://otel-collector",
        "tracing.port=4318",
    ],
)
def test_an_invalid_value_is_refused(value: str) -> None:
    with pytest.raises(RuntimeError, match=value.partition("=")[0].rpartition(".")[2]):
        manifests.chart("--set", value)


def test_a_number_of_replicas_with_an_autoscaler_is_refused() -> None:
    assert manifests.one(manifests.chart("--set", "replicas=3"), "Deployment")["spec"][
        "replicas"
    ] == (3)
    with pytest.raises(RuntimeError, match="replicas must be null"):
        manifests.chart("--set", "replicas=3,autoscaling.enabled=true")


def test_helm_lint_reports_nothing() -> None:
    subprocess.run([program("helm"), "lint", "--strict", CHART], check=True, capture_output=True)
