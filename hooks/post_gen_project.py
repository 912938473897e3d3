"""Write .env with random secrets, remove folders that stayed empty, print the next steps."""

import os
import re


def secret(match):
    """Return hexadecimal digits: they have no special meaning in a shell, a URL or .env."""
    return os.urandom(12).hex()


def create_for_its_owner(path, flags):
    return os.open(path, flags, 0o600)


with open(".env.example", encoding="utf-8") as example:
    # For development: the lines up to the first empty one, without the comment on top.
    development = example.read().split("\n\n")[0].splitlines()[1:]
try:
    # "x" does not touch an existing .env: its secrets are in use.
    # Docker and WSL, which read it, know no Windows line ends.
    with open(".env", "x", newline="\n", opener=create_for_its_owner) as env:
        env.writelines(re.sub("change-me", secret, line) + "\n" for line in development)
except FileExistsError:
    pass

# Folders that some answers leave without files. Other empty folders belong to the owner.
root = os.path.realpath(".")
kubernetes = ("deploy/kubernetes/base", "deploy/kubernetes/overlays/production")
for folder in (".github/workflows", "orders/migrations", *kubernetes):
    # A link may lead out of the project.
    if os.path.realpath(folder) == os.path.normpath(f"{root}/{folder}"):
        try:
            os.removedirs(folder)  # and its parents, if they are empty too
        except OSError:  # it has files, or does not exist
            pass

print(f"\nNext:\n\n    cd {os.path.basename(os.getcwd())}\n    make run\n")
