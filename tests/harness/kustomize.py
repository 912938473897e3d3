"""What `kubectl apply -k` applies."""

import subprocess

import yaml

from .project import env


def build(folder):
    """Return the documents that the kustomization.yaml in this folder stands for."""
    command = ["kubectl", "kustomize", folder]
    printed = subprocess.run(command, env=env(), check=True, stdout=subprocess.PIPE, text=True)
    return list(yaml.safe_load_all(printed.stdout))
