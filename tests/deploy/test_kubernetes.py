"""deploy/kubernetes: rendered by kustomize, and checked against the server and its image."""

import ipaddress
import os
import re
import subprocess
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import yaml
from kubernetes_validate import ValidationError
from prometheus_client import REGISTRY
from vllm import envs
from vllm.v1.metrics import loggers

import server.telemetry.metrics  # noqa: F401 - registers the metrics in REGISTRY
from server import settings as config
from server.engine.arguments import parse
from server.http import routes
from server.ingest import guard
from tests import manifests
from tests.manifests import KUBERNETES, OVERLAYS, Manifest, one
from tests.redis_server import redis_server
from tests.services import program

COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
# How long the engine and the workers take to stop after the last request.
STOP_S = 30

MIB = 1 << 20
# vLLM's message queues: one from the engine, and one from each worker.
BROADCAST_BYTES, RESPONSE_BYTES = 160 * MIB, 240 * MIB


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    return manifests.kustomize(KUBERNETES / "overlays" / request.param)


@pytest.fixture(scope="module")
def multi_gpu() -> list[Manifest]:
    return manifests.kustomize(KUBERNETES / "overlays" / "multi-gpu")


def test_manifests_obey_their_schemas(overlay: list[Manifest]) -> None:
    for manifest in overlay:
        manifests.check_schema(manifest)


@pytest.mark.parametrize("kind", ["Deployment", "ScaledObject", "PodMonitor"])
def test_a_misspelt_field_violates_the_schema(kind: str, multi_gpu: list[Manifest]) -> None:
    manifest = one(multi_gpu, kind)
    with pytest.raises((ValidationError, ValueError), match="replcas"):
        manifests.check_schema({**manifest, "spec": {**manifest["spec"], "replcas": 2}})


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_components_can_be_combined_with_every_overlay(name: str, tmp_path: Path) -> None:
    rendered = manifests.overlay_with(name, COMPONENTS, tmp_path)
    for manifest in rendered:
        manifests.check_schema(manifest)
    arguments = manifests.server(rendered)["args"]
    assert any(word.startswith("--otlp-traces-endpoint=") for word in arguments)
    assert {m["metadata"].get("namespace") for m in rendered if m["kind"] != "Namespace"} == {
        "saccade"
    }


def settings_of(rendered: list[Manifest]) -> tuple[Namespace, config.Settings]:
    container = manifests.server(rendered)
    with mock.patch.dict(os.environ, manifests.environment(container)):
        return parse(container["args"])


def test_the_server_accepts_the_flags_and_variables(overlay: list[Manifest]) -> None:
    container = manifests.server(overlay)
    args, settings = settings_of(overlay)
    assert args.port == container["ports"][0]["containerPort"]
    assert settings.images.image_workers == int(container["resources"]["requests"]["cpu"])
    keys = settings.access.api_keys_file
    assert keys is not None
    assert str(keys.parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", "1")
    assert args.tensor_parallel_size == int(gpus)


def test_the_server_accepts_the_cache_and_tracing_components(tmp_path: Path) -> None:
    args, settings = settings_of(manifests.overlay_with("cpu", COMPONENTS, tmp_path))
    url = settings.caches.embedding_cache_url
    assert url is not None
    assert url.get_secret_value() == "redis://:s3cret@saccade-cache:6379/0"
    assert args.otlp_traces_endpoint.endswith(":4317")


def test_variables_of_kubernetes_services_are_disabled(
    overlay: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would refuse them as misspelt settings."""
    assert one(overlay, "Service")
    monkeypatch.setenv("SACCADE_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ValueError, match="SACCADE_SERVICE_HOST"):
        config.Settings()
    assert all(pod["enableServiceLinks"] is False for pod in manifests.pods(overlay))


def test_probes_request_routes_that_exist(overlay: list[Manifest]) -> None:
    container = manifests.server(overlay)
    known = {route.path for route in routes.status.routes}  # type: ignore[attr-defined]
    asked = {name: probe["httpGet"] for name, probe in manifests.probes(container)}
    assert {get["path"] for get in asked.values()} <= known
    assert asked["readinessProbe"]["path"] == "/ready"
    assert asked["livenessProbe"]["path"] == asked["startupProbe"]["path"] == "/health"
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {get["port"] for get in asked.values()} == set(named)
    ports = one(overlay, "Service")["spec"]["ports"]
    assert [(port["targetPort"], port["port"]) for port in ports] == list(named.items())
    ingress = one(overlay, "NetworkPolicy")["spec"]["ingress"]
    assert [port["port"] for port in ingress[0]["ports"]] == list(named.values())


def test_the_startup_probe_allows_minutes(overlay: list[Manifest]) -> None:
    deployment = one(overlay, "Deployment")["spec"]
    probe = manifests.server(overlay)["startupProbe"]
    patience_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert patience_s >= 900
    assert deployment["progressDeadlineSeconds"] > patience_s


def test_the_termination_grace_period_covers_the_drain(overlay: list[Manifest]) -> None:
    pod = one(overlay, "Deployment")["spec"]["template"]["spec"]
    container = manifests.server(overlay)
    http = settings_of(overlay)[1].http
    drain_s = http.drain_delay_s + http.drain_timeout_s
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s + STOP_S
    readiness = container["readinessProbe"]
    assert pre_stop_s >= readiness["periodSeconds"]


def test_pods_are_restricted(overlay: list[Manifest]) -> None:
    """By the namespace's Pod Security Standard, `restricted`, and further."""
    labels = one(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in manifests.pods(overlay):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume} - {"name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            memory = [container["resources"][kind]["memory"] for kind in ("requests", "limits")]
            assert memory[0] == memory[1]


def test_secrets_are_referenced_but_not_included(overlay: list[Manifest]) -> None:
    assert not [m for m in overlay if m["kind"] == "Secret"]
    for pod in manifests.pods(overlay):
        for container in pod["containers"]:
            for variable in container["env"]:
                if re.search("PASSWORD|TOKEN", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"]


def test_folders_that_the_image_writes_to_are_writable(
    overlay: list[Manifest], repository: Path
) -> None:
    text = (repository / "Dockerfile").read_text()
    folders = {*re.findall(r"\b(?:HOME|\w+_HOME|\w+_CACHE_DIR)=(/\S+)", text), "/tmp"}
    assert len(folders) > 1
    pod = one(overlay, "Deployment")["spec"]["template"]["spec"]
    read_only = {v["name"] for v in pod["volumes"] if "secret" in v}
    mounts = manifests.server(overlay)["volumeMounts"]
    writable = [Path(m["mountPath"]) for m in mounts if m["name"] not in read_only]
    assert {m["name"] for m in mounts} == {v["name"] for v in pod["volumes"]}
    for folder in folders:
        assert any(Path(folder).is_relative_to(path) for path in writable), folder
    user, group = re.findall(r"^USER (\d+):(\d+)$", text, re.M)[-1]
    ids = pod["securityContext"]
    assert ids["runAsUser"] == int(user)
    assert ids["runAsGroup"] == ids["fsGroup"] == int(group)


@pytest.mark.parametrize("name", ["gpu", "multi-gpu"])
def test_models_and_compiled_code_are_on_the_claim(name: str, repository: Path) -> None:
    """So a new pod neither downloads nor compiles again."""
    rendered = manifests.kustomize(KUBERNETES / "overlays" / name)
    text = (repository / "Dockerfile").read_text()
    folders = set(re.findall(r"\b(?:HOME|\w+_HOME|\w+_CACHE_DIR)=(/\S+)", text))
    assert {"/var/cache/saccade", "/var/cache/saccade/huggingface"} <= folders
    for folder in folders:
        volume = manifests.volume_of(rendered, folder)
        assert volume.get("persistentVolumeClaim") == {"claimName": "saccade-models"}, folder


def test_the_server_keeps_connections_longer_than_ingress_controllers(
    overlay: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ingress-nginx, for example, keeps them for 60 s (upstream-keepalive-timeout)."""
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE < 60
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    monkeypatch.setenv(name, manifests.environment(manifests.server(overlay))[name])
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE > 60


def test_shared_memory_has_room_for_the_message_queues(overlay: list[Manifest]) -> None:
    pod = one(overlay, "Deployment")["spec"]["template"]["spec"]
    container = manifests.server(overlay)
    (name,) = {m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"}
    (volume,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == name)
    workers = int(container["resources"]["limits"].get("nvidia.com/gpu", "1"))
    assert volume["medium"] == "Memory"
    room = manifests.nbytes(volume["sizeLimit"])
    assert BROADCAST_BYTES + workers * RESPONSE_BYTES <= room
    assert room < manifests.nbytes(container["resources"]["limits"]["memory"])


def blocks(policy: Manifest) -> list[Manifest]:
    peers = (peer for rule in policy["spec"]["egress"] for peer in rule["to"])
    return [peer["ipBlock"] for peer in peers if "ipBlock" in peer]


def test_the_network_policy_allows_only_public_addresses(overlay: list[Manifest]) -> None:
    """The network policy and the server's guard block the same addresses."""
    open_, closed = [], []
    for block in blocks(one(overlay, "NetworkPolicy")):
        open_.append(ipaddress.ip_network(block["cidr"]))
        closed += [ipaddress.ip_network(network) for network in block["except"]]
    policy = guard.Policy()
    for network in closed:
        for address in (network[0], network[-1]):
            assert not guard.allowed(address, policy), network
    for network in guard._PRIVATE + guard._CLOSED:
        reachable = [n for n in open_ if n.version == network.version and network.overlaps(n)]
        covered = [n for n in closed if n.version == network.version and network.subnet_of(n)]
        assert covered or not reachable, network
    for text in ("1.1.1.1", "100.63.255.255", "172.32.0.1", "2606:4700::1111"):
        address = ipaddress.ip_address(text)
        assert guard.allowed(address, policy)
        assert any(address in n for n in open_)
        assert not any(address in n for n in closed)


def test_only_the_server_can_reach_the_cache(multi_gpu: list[Manifest]) -> None:
    policy = one(multi_gpu, "NetworkPolicy", "saccade-cache")["spec"]
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    server_labels = one(multi_gpu, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert rule["from"] == [{"podSelector": {"matchLabels": server_labels}}]
    (port,) = one(multi_gpu, "Service", "saccade-cache")["spec"]["ports"]
    assert [each["port"] for each in rule["ports"]] == [port["port"]]


def test_redis_accepts_the_arguments_of_the_cache(multi_gpu: list[Manifest]) -> None:
    (container,) = one(multi_gpu, "Deployment", "saccade-cache")["spec"]["template"]["spec"][
        "containers"
    ]
    arguments = [word.replace("$(PASSWORD)", "s3cret") for word in container["args"]]
    with redis_server(*arguments, password="s3cret") as redis, redis.client() as client:
        # One at a time: Redis accepts several names only since version 7.
        names = ("maxmemory", "maxmemory-policy", "save")
        found = {name: client.config_get(name)[name] for name in names}
    assert found["maxmemory-policy"] == "allkeys-lru"
    assert not found["save"]
    limit = manifests.nbytes(container["resources"]["limits"]["memory"])
    assert 0 < int(found["maxmemory"]) < limit


def test_the_autoscaler_queries_existing_metrics(multi_gpu: list[Manifest], tmp_path: Path) -> None:
    triggers = one(multi_gpu, "ScaledObject")["spec"]["triggers"]
    queries = [trigger["metadata"]["query"] for trigger in triggers]
    ours = {metric.name for metric in REGISTRY.collect()}
    vllms = Path(loggers.__file__).read_text()
    named = set(re.findall(r"\b(?:saccade_|vllm:)\w+", " ".join(queries)))
    assert {"saccade_image_queue", "vllm:num_requests_waiting"} <= named
    for name in named:
        assert name in ours if name.startswith("saccade_") else f'"{name}"' in vllms, name
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "autoscaler", "rules": rules}]}))
    subprocess.run([program("promtool"), "check", "rules", file], check=True, capture_output=True)


def test_the_autoscaler_targets_the_deployment(multi_gpu: list[Manifest]) -> None:
    spec = one(multi_gpu, "ScaledObject")["spec"]
    deployment = one(multi_gpu, "Deployment")
    assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    assert 1 < spec["minReplicaCount"] < spec["maxReplicaCount"]
    namespaces = re.findall(r'namespace="(\w+)"', str(spec["triggers"]))
    assert set(namespaces) == {deployment["metadata"]["namespace"]}
    requests = next(t for t in spec["triggers"] if t["name"] == "requests")
    args, _ = settings_of(multi_gpu)
    assert int(requests["metadata"]["threshold"]) < args.max_num_seqs


def test_the_pod_monitor_selects_the_pods(multi_gpu: list[Manifest]) -> None:
    monitor = one(multi_gpu, "PodMonitor")["spec"]
    labels = one(multi_gpu, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"] == labels
    assert labels[monitor["jobLabel"]] == "saccade"
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in manifests.server(multi_gpu)["ports"]}
