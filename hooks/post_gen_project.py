"""Give the project its secrets, remove folders that stayed empty, say what comes next."""

import os
import re


def secret(match):
    """Hexadecimal digits, which no shell, URL or .env parser reads otherwise."""
    return os.urandom(12).hex()


with open(".env.example", encoding="utf-8") as example:
    # What comes before the first empty line is for development.
    development = example.read().split("\n\n")[0].splitlines()[1:]
try:
    # "x" leaves alone an .env that is already there: its secrets are in use.
    with open(".env", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as env:
        env.writelines(re.sub("change-me", secret, line) + "\n" for line in development)
except FileExistsError:
    pass

# Folders that an answer may leave without files. Other empty folders are the owner's.
kubernetes = ("deploy/kubernetes/base", "deploy/kubernetes/overlays/production")
for folder in (".github/workflows", "orders/migrations", *kubernetes):
    if os.path.realpath(folder) == os.path.abspath(folder):  # a link may lead out of the project
        try:
            os.removedirs(folder)  # and its parents up to the project, where they are empty too
        except OSError:  # it has files
            pass

print(f"\nNext:\n\n    cd {os.path.basename(os.getcwd())}\n    make run\n")
