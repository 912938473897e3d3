"""The manifests of outputs, and what KEDA makes of one."""

import shutil

import yaml

PRODUCTION = "deploy/kubernetes/overlays/production"
# What we use of a ScaledObject; KEDA's schemas are not in kubernetes-validate. (KEDA 2.20)
SCALED_OBJECT = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval"}
SCALED_OBJECT |= {"advanced", "triggers"}


def manifests(project):
    """Return what `kubectl apply -k` applies in production, {(kind, name): document}.

    With the values of .env.example, unless the project has others.
    """
    overlay = project / PRODUCTION
    if not (overlay / ".env").exists():
        shutil.copy(overlay / ".env.example", overlay / ".env")
    documents = yaml.safe_load_all(project.call("kubectl", "kustomize", PRODUCTION))
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def of_kind(kind, documents):
    return {name: each for (other, name), each in documents.items() if other == kind}


def only(kind, documents):
    """Return the one document of this kind."""
    [found] = of_kind(kind, documents).values()
    return found


def pods(documents):
    """Return the specifications of all pods, {(kind, name): spec}."""
    return {
        key: document["spec"]["template"]["spec"]
        for key, document in documents.items()
        if key[0] == "Deployment"
    }


def autoscaler(scaled):
    """Return the HorizontalPodAutoscaler that KEDA makes from a ScaledObject."""
    spec = scaled["spec"]
    assert set(spec) <= SCALED_OBJECT
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": scaled["metadata"],
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment"}
            | spec["scaleTargetRef"],
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            **spec["advanced"]["horizontalPodAutoscalerConfig"],
        },
    }
