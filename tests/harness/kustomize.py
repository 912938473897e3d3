"""What `kubectl kustomize` prints, for the features that an output's manifests use.

So the tests of the manifests need no kubectl; integration/test_kubectl.py compares the two.
"""

import base64
import re
from copy import deepcopy

import yaml


def build(folder):
    """Return the documents that the kustomization.yaml in this folder stands for."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    documents = []
    for name in settings.pop("resources") + settings.pop("components", []):
        path = folder / name
        documents += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    for patch in settings.pop("patches", []):
        change = yaml.safe_load(patch["patch"])
        for document in documents:
            if re.fullmatch(patch["target"]["kind"], document["kind"]):
                merge(document["spec"], change["spec"])
    for label in settings.pop("labels", []):
        for document in documents:
            document["metadata"].setdefault("labels", {}).update(label["pairs"])
    for each in settings.pop("configMapGenerator", []):
        data = dict(pair.split("=", 1) for pair in each.get("literals", []))
        data |= {name: (folder / name).read_text() for name in each.get("files", [])}
        config = {**head("ConfigMap", each["name"]), "data": data}
        if labels := each.get("options", {}).get("labels"):
            config["metadata"]["labels"] = labels
        documents.append(config)
    for each in settings.pop("secretGenerator", []):
        lines = "".join((folder / file).read_text() for file in each["envs"]).splitlines()
        values = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
        data = {name: base64.b64encode(text.encode()).decode() for name, text in values.items()}
        documents.append({**head("Secret", each["name"]), "data": data, "type": "Opaque"})
    if namespace := settings.pop("namespace", None):
        for document in documents:
            document["metadata"]["namespace"] = namespace
    for image in settings.pop("images", []):
        for container in containers(documents):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    assert set(settings) == {"apiVersion", "kind"}, f"unknown to this module: {settings}"
    return documents


def head(kind, name):
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}


def containers(documents):
    """Yield all containers of all pods, also those that run first."""
    for document in documents:
        if document["kind"] in ("Deployment", "Job"):
            spec = document["spec"]["template"]["spec"]
            yield from spec["containers"] + spec.get("initContainers", [])


def merge(target, change):
    """Merge as a strategic merge patch: elements of lists are the same if their names are."""
    for key, value in change.items():
        if isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        elif isinstance(value, list) and isinstance(value[0], dict):
            known = {element.get("name"): element for element in target.setdefault(key, [])}
            for element in value:
                if element.get("name") in known:
                    merge(known[element["name"]], element)
                else:
                    target[key].append(deepcopy(element))
        else:
            target[key] = value
