"""The fields of KubeRay's kinds that manifests may use, and their types, after the Go types of its
release 1.7. Pod templates are Kubernetes' own and are left to its schema.
"""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_FLAG: Schema = {"type": "boolean"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number", "minimum": 0}
_CORE: Schema = {"type": "object"}
"""A type of Kubernetes itself."""


def _one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def _closed(*required: str, **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


_GROUP: dict[str, Schema] = {
    "template": _CORE,
    "rayStartParams": _TEXTS,
    "resources": _TEXTS,
    "labels": _TEXTS,
}
_HEAD = _closed(
    "template",
    **_GROUP,
    serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer"),
    headService=_CORE,
    enableIngress=_FLAG,
)
_WORKERS = _closed(
    "groupName",
    "template",
    "minReplicas",
    "maxReplicas",
    **_GROUP,
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    idleTimeoutSeconds=_COUNT,
    priority=_COUNT,
    numOfHosts=_COUNT,
    suspend=_FLAG,
)
_CREDENTIAL = _closed("valueFrom", valueFrom=_CORE)
_CLUSTER = _closed(
    "headGroupSpec",
    "rayVersion",
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
    rayVersion=_TEXT,
    authOptions=_closed("mode", mode=_one_of("disabled", "token"), secretName=_TEXT),
    gcsFaultToleranceOptions=_closed(
        "redisAddress",
        redisAddress=_TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=_TEXT,
    ),
    enableInTreeAutoscaling=_FLAG,
    autoscalerOptions=_closed(
        version=_one_of("v1", "v2"),
        idleTimeoutSeconds=_COUNT,
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        image=_TEXT,
        resources=_CORE,
        securityContext=_CORE,
        env={"type": "array", "items": _CORE},
        envFrom={"type": "array", "items": _CORE},
    ),
    upgradeStrategy=_closed("type", type=_one_of("Recreate", "None")),
    suspend=_FLAG,
)
_SERVICE = _closed(
    "rayClusterConfig",
    rayClusterConfig=_CLUSTER,
    serveConfigV2=_TEXT,
    serveService=_CORE,
    upgradeStrategy=_closed("type", type=_one_of("NewCluster", "None")),
    rayClusterDeletionDelaySeconds=_COUNT,
    excludeHeadPodFromServeSvc=_FLAG,
)
_JOB = _closed(
    "entrypoint",
    entrypoint=_TEXT,
    entrypointNumCpus=_NUMBER,
    entrypointNumGpus=_NUMBER,
    clusterSelector=_TEXTS,
    rayClusterSpec=_CLUSTER,
    submissionMode=_one_of("K8sJobMode", "HTTPMode"),
    submitterPodTemplate=_CORE,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=_COUNT,
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished=_COUNT,
    runtimeEnvYAML=_TEXT,
    metadata=_TEXTS,
    suspend=_FLAG,
)


def _kind(name: str, spec: Schema) -> Schema:
    return _closed(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": name},
        metadata=_CORE,
        spec=spec,
    )


SCHEMAS = {
    "RayCluster": _kind("RayCluster", _CLUSTER),
    "RayService": _kind("RayService", _SERVICE),
    "RayJob": _kind("RayJob", _JOB),
}
