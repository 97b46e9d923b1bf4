"""deploy/kubernetes: the overlays for Ray Serve, and for llm-d's router."""

import os
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from prometheus_client import REGISTRY

import server.telemetry.metrics  # noqa: F401 - registers the metrics in REGISTRY
from server.engine.arguments import parse
from server.settings import Settings
from tests import custom_kinds, manifests
from tests.manifests import KUBERNETES, Manifest, one

NAMES = ("ray", "llm-d")
# How long the engine and the workers take to stop after the last request.
STOP_S = 30
PICKER = "saccade-endpoint-picker"


@pytest.fixture(scope="module")
def ray() -> list[Manifest]:
    return manifests.kustomize(KUBERNETES / "overlays" / "ray")


@pytest.fixture(scope="module")
def llm_d() -> list[Manifest]:
    return manifests.kustomize(KUBERNETES / "overlays" / "llm-d")


@pytest.fixture(params=NAMES)
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    found: list[Manifest] = request.getfixturevalue(request.param.replace("-", "_"))
    return found


def test_manifests_obey_their_schemas(overlay: list[Manifest]) -> None:
    for manifest in overlay:
        manifests.check_schema(manifest)


@pytest.mark.parametrize("kind", ["InferencePool", "HTTPRoute"])
def test_a_misspelt_field_violates_the_schema(kind: str, llm_d: list[Manifest]) -> None:
    manifest = one(llm_d, kind)
    with pytest.raises(jsonschema.ValidationError, match="slector"):
        manifests.check_schema({**manifest, "spec": {**manifest["spec"], "slector": {}}})


def test_a_misspelt_field_of_a_pod_of_ray_violates_the_schema(ray: list[Manifest]) -> None:
    service = one(ray, "RayService")
    template = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    with (
        mock.patch.dict(template["spec"], {"containrs": []}),
        pytest.raises(Exception, match="containrs"),
    ):
        manifests.check_schema(service)


def test_pods_are_restricted(overlay: list[Manifest]) -> None:
    labels = one(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = manifests.pods(overlay)
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounts == {volume["name"] for volume in pod.get("volumes", ())}


# ---------------------------------------------------------------------- Ray Serve


@pytest.fixture(scope="module")
def application(ray: list[Manifest]) -> dict[str, Any]:
    """The application of the configuration of Ray Serve, which Ray's own schema has read."""
    schema = pytest.importorskip("ray.serve.schema")
    text = one(ray, "RayService")["spec"]["serveConfigV2"]
    read = schema.ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert read.http_options.port == 8000
    (found,) = read.applications
    return dict(found.model_dump())


@pytest.fixture(scope="module")
def groups(ray: list[Manifest]) -> dict[str, Manifest]:
    cluster = one(ray, "RayService")["spec"]["rayClusterConfig"]
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def settings_of(application: dict[str, Any], group: Manifest) -> tuple[Namespace, Settings]:
    """What a replica in the pods of `group` has."""
    (container,) = group["template"]["spec"]["containers"]
    with mock.patch.dict(os.environ, manifests.environment(container)):
        return parse(shlex.split(application["args"]["flags"]), "deploy")


def test_ray_serve_builds_the_application(application: dict[str, Any]) -> None:
    module, name = application["import_path"].split(":")
    build = getattr(pytest.importorskip(module), name)
    built = build(application["args"])
    assert type(built).__name__ == "Application"


def test_pods_of_ray_have_room_for_their_replicas(
    application: dict[str, Any], groups: dict[str, Manifest]
) -> None:
    args, settings = settings_of(application, groups["front"])
    deploy = settings.deploy
    cpus = {name: int(group["rayStartParams"]["num-cpus"]) for name, group in groups.items()}
    assert cpus == {"front": deploy.front_cpus, "engine": deploy.engine_cpus}
    assert cpus["engine"] < cpus["front"], "else a front takes the place of an engine"
    assert groups["front"]["minReplicas"] == deploy.front_replicas
    assert groups["engine"]["minReplicas"] == deploy.engine_replicas
    assert deploy.front_max_replicas is not None
    assert groups["front"]["maxReplicas"] > deploy.front_max_replicas
    assert groups["engine"]["maxReplicas"] == deploy.engine_max_replicas
    (container,) = groups["engine"]["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == args.tensor_parallel_size * args.pipeline_parallel_size
    for group in groups.values():
        (volume,) = (v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm")
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store < manifests.nbytes(volume["emptyDir"]["sizeLimit"])


def test_pods_of_ray_end_after_the_drain(
    application: dict[str, Any], groups: dict[str, Manifest]
) -> None:
    for group in groups.values():
        _, settings = settings_of(application, group)
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= settings.http.drain_timeout_s + STOP_S


def test_the_version_of_ray_is_that_of_the_package(ray: list[Manifest], repository: Path) -> None:
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (line,) = project["optional-dependencies"]["ray"]
    version = one(ray, "RayService")["spec"]["rayClusterConfig"]["rayVersion"]
    assert version in Requirement(line).specifier
    comment = (KUBERNETES / "overlays" / "ray" / "kustomization.yaml").read_text()
    assert f"'ray[serve]=={version}'" in comment


def test_network_policies_select_the_pods_of_ray(ray: list[Manifest]) -> None:
    everything = one(ray, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    head = one(ray, "NetworkPolicy", "saccade-head")["spec"]["podSelector"]["matchLabels"]
    assert head == {**everything, "ray.io/node-type": "head"}  # KubeRay adds the second
    for _, template in custom_kinds.templates(one(ray, "RayService")):
        assert template["metadata"]["labels"] == everything


# ---------------------------------------------------------------------- llm-d


def test_the_pool_has_the_servers(llm_d: list[Manifest]) -> None:
    pool = one(llm_d, "InferencePool")["spec"]
    labels = one(llm_d, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert pool["selector"]["matchLabels"] == labels
    ports = [port["containerPort"] for port in manifests.server(llm_d)["ports"]]
    assert [port["number"] for port in pool["targetPorts"]] == ports
    reference = pool["endpointPickerRef"]
    service = one(llm_d, "Service", reference["name"])
    assert [port["port"] for port in service["spec"]["ports"]] == [reference["port"]["number"]]
    (rule,) = one(llm_d, "HTTPRoute")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", "saccade")


def test_the_picker_may_reach_the_servers_and_reads_its_configuration(
    llm_d: list[Manifest],
) -> None:
    pod = one(llm_d, "Deployment", PICKER)["spec"]["template"]["spec"]
    (volume,) = pod["volumes"]
    (config,) = (m for m in llm_d if m["kind"] == "ConfigMap")
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (container,) = pod["containers"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    (mount,) = container["volumeMounts"]
    assert Path(flags["config-file"]).parent == Path(mount["mountPath"])
    assert Path(flags["config-file"]).name in config["data"]
    pool = one(llm_d, "InferencePool")["metadata"]
    assert (flags["pool-name"], flags["pool-namespace"]) == (pool["name"], pool["namespace"])
    peers = [
        (peer.get("podSelector"), [port["port"] for port in rule["ports"]])
        for rule in one(llm_d, "NetworkPolicy", PICKER)["spec"]["egress"]
        for peer in rule.get("to", ())
    ]
    labels = one(llm_d, "InferencePool")["spec"]["selector"]["matchLabels"]
    assert ({"matchLabels": labels}, [8000]) in peers


def test_each_plugin_of_the_picker_is_declared_and_used(llm_d: list[Manifest]) -> None:
    (config,) = (m for m in llm_d if m["kind"] == "ConfigMap")
    read = yaml.safe_load(config["data"]["config.yaml"])
    (profile,) = read["schedulingProfiles"]
    used = {each["pluginRef"] for each in profile["plugins"]}
    for source in read["dataLayer"]["sources"]:
        used |= {source["pluginRef"], *(each["pluginRef"] for each in source["extractors"])}
    declared = [plugin["type"] for plugin in read["plugins"]]
    assert len(declared) == len(set(declared))
    assert used == {*declared} - {"single-profile-handler"}


# ---------------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    components = ["shared-cache", "encoders"]
    return manifests.overlay_with("gpu", components, tmp_path_factory.mktemp("encoders"))


def parsed(rendered: list[Manifest], name: str) -> tuple[Namespace, Settings]:
    (container,) = one(rendered, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    with mock.patch.dict(os.environ, manifests.environment(container)):
        return parse(container["args"])


def test_encoders_store_what_decoders_read(encoders: list[Manifest]) -> None:
    for manifest in encoders:
        manifests.check_schema(manifest)
    (args, settings), (theirs, decoders) = (
        parsed(encoders, name) for name in ("saccade-encoder", "saccade")
    )
    assert settings.caches.encode_only
    assert not decoders.caches.encode_only
    assert settings.caches.embedding_cache_url == decoders.caches.embedding_cache_url is not None
    for flag in ("model", "dtype", "quantization", "tensor_parallel_size", "mm_processor_kwargs"):
        assert getattr(args, flag) == getattr(theirs, flag)
    policy = one(encoders, "NetworkPolicy", "saccade-cache")["spec"]["ingress"][0]["from"]
    labels = [
        one(encoders, "Deployment", name)["spec"]["template"]["metadata"]["labels"]
        for name in ("saccade", "saccade-encoder")
    ]
    assert policy == [{"podSelector": {"matchLabels": each}} for each in labels]


def test_encoders_are_scaled_by_their_own_work(encoders: list[Manifest]) -> None:
    labels = one(encoders, "Deployment", "saccade-encoder")["spec"]["template"]["metadata"][
        "labels"
    ]
    monitor = one(encoders, "PodMonitor", "saccade-encoder")["spec"]
    assert monitor["selector"]["matchLabels"] == labels
    scaled = one(encoders, "ScaledObject", "saccade-encoder")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "saccade-encoder"
    ours = {metric.name for metric in REGISTRY.collect()}
    for trigger in scaled["triggers"]:
        query = trigger["metadata"]["query"]
        assert set(re.findall(r'job="([^"]+)"', query)) == {labels[monitor["jobLabel"]]}
        assert set(re.findall(r"saccade_\w+", query)) <= ours
