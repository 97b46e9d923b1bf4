"""Fields of Kubernetes' custom kinds for which no package has a schema: those that our manifests
use, as in KubeRay 1.6, Gateway API 1.4 and its inference extension 1.5. Pods and services in them
are checked by the schemas of Kubernetes."""

from collections.abc import Iterator
from typing import Any

import jsonschema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANY: Schema = {"type": "object"}


def _fields(required: str, **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def _each(schema: Schema) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


_WORKERS = _fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=ANY,
)
_CLUSTER = _fields(
    "headGroupSpec workerGroupSpecs rayVersion",
    rayVersion=TEXT,
    enableInTreeAutoscaling=BOOLEAN,
    authOptions=_fields("mode", mode=_one_of("disabled", "token")),
    autoscalerOptions=_fields("", securityContext=ANY),
    headGroupSpec=_fields("template rayStartParams", rayStartParams=TEXTS, template=ANY),
    workerGroupSpecs=_each(_WORKERS),
)
_MATCH = _fields(
    "path", path=_fields("type value", type=_one_of("Exact", "PathPrefix"), value=TEXT)
)
_SPECS: dict[str, tuple[str, Schema]] = {
    "RayService": (
        "ray.io/v1",
        _fields(
            "serveConfigV2 rayClusterConfig",
            excludeHeadPodFromServeSvc=BOOLEAN,
            upgradeStrategy=_fields("type", type=_one_of("NewCluster", "None")),
            serveService=_fields("metadata spec", metadata=ANY, spec=ANY),
            serveConfigV2=TEXT,
            rayClusterConfig=_CLUSTER,
        ),
    ),
    "InferencePool": (
        "inference.networking.k8s.io/v1",
        _fields(
            "selector targetPorts endpointPickerRef",
            selector=_fields("matchLabels", matchLabels=TEXTS),
            targetPorts=_each(_fields("number", number=COUNT)),
            endpointPickerRef=_fields(
                "name port",
                name=TEXT,
                port=_fields("number", number=COUNT),
                failureMode=_one_of("FailOpen", "FailClose"),
            ),
        ),
    ),
    "HTTPRoute": (
        "gateway.networking.k8s.io/v1",
        _fields(
            "parentRefs rules",
            parentRefs=_each(_fields("name", name=TEXT, namespace=TEXT)),
            rules=_each(
                _fields(
                    "matches backendRefs",
                    matches=_each(_MATCH),
                    backendRefs=_each(_fields("name", group=TEXT, kind=TEXT, name=TEXT)),
                    timeouts=_fields("request", request={"pattern": r"^(\d{1,5}(h|m|s|ms)){1,4}$"}),
                )
            ),
        ),
    ),
}


def is_known(kind: str) -> bool:
    return kind in _SPECS


def check(manifest: Schema) -> None:
    """Raises jsonschema.ValidationError if the manifest has another field or a wrong value."""
    version, spec = _SPECS[manifest["kind"]]
    schema = _fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind=TEXT,
        metadata=_fields("name namespace", name=TEXT, namespace=TEXT, labels=TEXTS),
        spec=spec,
    )
    jsonschema.validate(manifest, schema)


def templates(manifest: Schema) -> Iterator[tuple[str, Schema]]:
    """The pods of a RayService: the name of the group, and the template."""
    if manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
