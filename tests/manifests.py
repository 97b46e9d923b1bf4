"""Kubernetes manifests: rendered by the real programs, checked by the schemas of their kinds."""

import functools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from tests import custom_kinds
from tests.services import program

Manifest = dict[str, Any]

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
CHART = DEPLOY / "helm" / "saccade"
OVERLAYS = ("cpu", "gpu", "multi-gpu")

# The oldest and the newest supported release of Kubernetes.
VERSIONS = ("1.30", "1.37")


def kustomize(folder: Path) -> list[Manifest]:
    return _documents([program("kubectl"), "kustomize", folder])


def overlay_with(name: str, components: Sequence[str], scratch: Path) -> list[Manifest]:
    """An overlay with further components, like a user's own kustomization."""

    def relative(path: Path) -> str:
        return os.path.relpath(path, scratch)

    text = {
        "namespace": "saccade",
        "resources": [relative(KUBERNETES / "overlays" / name)],
        "components": [relative(KUBERNETES / "components" / each) for each in components],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return kustomize(scratch)


def chart(*arguments: str | Path, release: str = "saccade") -> list[Manifest]:
    command: list[str | Path] = [
        program("helm"),
        "template",
        release,
        CHART,
        "--namespace",
        "saccade",
    ]
    return _documents([*command, *arguments])


def values_of(overlay: str) -> tuple[str | Path, ...]:
    """The helm arguments with which the chart must render the overlay's manifests."""
    return () if overlay == "cpu" else ("--values", CHART / f"values-{overlay}.yaml")


def _documents(command: Sequence[str | Path]) -> list[Manifest]:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def check_schema(manifest: Manifest) -> None:
    """Check that the kind has all these fields and that their values are valid.

    Raises:
        kubernetes_validate.ValidationError, jsonschema.ValidationError, ValueError: it is invalid;
            the message names the field.
    """
    if custom_kinds.is_known(manifest["kind"]):
        custom_kinds.check(manifest)
        for name, template in custom_kinds.templates(manifest):
            check_schema(_deployment(name, template))
        return
    custom = _custom_kinds().get(manifest["kind"])
    if custom is None:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    known = custom.model_validate(manifest).model_dump(
        mode="json", by_alias=True, exclude_unset=True
    )
    if known != manifest:
        raise ValueError(f"of {manifest}, the kind knows only {known}")


@functools.cache
def _custom_kinds() -> dict[str, Any]:
    # Imported on use: it takes seconds, and pytest imports this file for every test.
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    return {"PodMonitor": PodMonitor, "ScaledObject": ScaledObject}


def one(manifests: Sequence[Manifest], kind: str, name: str = "saccade") -> Manifest:
    found = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]


def pods(manifests: Sequence[Manifest]) -> list[Manifest]:
    """The `spec` of each pod that would be created."""
    found = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
    for manifest in manifests:
        found += [template["spec"] for _, template in custom_kinds.templates(manifest)]
    return found


def _deployment(name: str, template: Manifest) -> Manifest:
    """A deployment of these pods, for which there is a schema."""
    spec = {"selector": {"matchLabels": template["metadata"]["labels"]}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def server(manifests: Sequence[Manifest]) -> Manifest:
    """The server's container."""
    (container,) = one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def volume_of(manifests: Sequence[Manifest], folder: str | Path) -> Manifest:
    """The volume that contains `folder` of the server's container."""
    mounts = {
        Path(mount["mountPath"]): mount["name"] for mount in server(manifests)["volumeMounts"]
    }
    on = max(path for path in mounts if Path(folder).is_relative_to(path))
    volumes = one(manifests, "Deployment")["spec"]["template"]["spec"]["volumes"]
    (volume,) = (volume for volume in volumes if volume["name"] == mounts[on])
    return dict(volume)


def environment(container: Manifest, secret: str = "s3cret") -> dict[str, str]:
    """`env` as the kubelet resolves it: fields, secrets, and $(NAME) of earlier variables."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        source = variable.get("valueFrom", {})
        if "secretKeyRef" in source:
            value = secret
        elif "resourceFieldRef" in source:
            kind, name = source["resourceFieldRef"]["resource"].split(".")
            value = container["resources"][kind][name]
        else:
            value = variable["value"]
        values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda m: values.get(m[1], m[0]), value)
    return values


def probes(container: Manifest) -> Iterator[tuple[str, Manifest]]:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield name, container[name]


def nbytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << 10 * (" KMGT".index(unit[0]))
