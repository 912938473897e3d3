"""kubectl builds from the manifests what test_kubernetes.py tests."""

import re
import shutil

import pytest
import yaml

from harness import kustomize, missing
from harness.bake import CHOICES

PRODUCTION = "deploy/kubernetes/overlays/production"


@pytest.mark.parametrize("durable_jobs", CHOICES["durable_jobs"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_kubectl_builds_the_same_as_the_tests(bake, broker, durable_jobs):
    """It also adds a hash to the names of ConfigMap and Secret, so a changed value restarts all."""
    if not shutil.which("kubectl"):
        missing("kubectl is not installed")
    answers = {"broker": broker, "durable_jobs": durable_jobs, "deployment": "kubernetes"}
    for include_example in CHOICES["include_example"]:
        project = bake(**answers, include_example=include_example)
        file = project / PRODUCTION / "kustomization.yaml"
        file.write_text(
            file.read_text().replace("# - ../../../monitoring", "- ../../../monitoring")
        )
        shutil.copy(project / PRODUCTION / ".env.example", project / PRODUCTION / ".env")
        printed = project.call("kubectl", "kustomize", PRODUCTION)
        name = project.name.replace("_", "-")
        unhashed, count = re.subn(rf"\b{name}-[a-z0-9]{{10}}\b", name, printed)
        assert count > 10
        assert by_name(yaml.safe_load_all(unhashed)) == by_name(
            kustomize.build(project / PRODUCTION)
        )


def by_name(documents):
    """Return {(kind, name): document}, without the line breaks of long values in a Secret."""
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    for each in found.values():
        if each["kind"] == "Secret":
            each["data"] = {name: "".join(value.split()) for name, value in each["data"].items()}
    return found
