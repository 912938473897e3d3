"""`make release`: test, commit and tag the version of durable-jobs, and start the next one.

It pushes nothing. The address on the pages is that of the remote `origin` on GitHub.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

LIBRARY, VENDOR = Path("durable-jobs"), Path("{{cookiecutter.project_slug}}/vendor")
VERSION, ABOUT = LIBRARY / "src/durable_jobs/__init__.py", LIBRARY / "pyproject.toml"
CHANGELOG = Path("CHANGELOG.md")
CHANGELOGS = CHANGELOG, LIBRARY / "CHANGELOG.md"
GITHUB = r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$"


def git(*command):
    result = subprocess.run(["git", *command], stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout.strip()


def replace(path, old, new):
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")


def repository(address):
    """Return `owner/name` of an address, or None if it is not on GitHub."""
    match = re.search(GITHUB, address)
    return match and match[1]


def refusal(version):
    """Return why there can be no release of this version, or None."""
    notes = re.search(r"(?ms)^## Unreleased\n(.*?)(^## |\Z)", CHANGELOG.read_text("utf-8"))
    if git("status", "--porcelain"):
        return "There are changes without a commit: commit or stash them."
    if not version.endswith(".dev"):
        return f"The version in {VERSION} is {version}, but only one with .dev can be released."
    if git("tag", "--list", f"v{version.removesuffix('.dev')}"):
        return f"The tag v{version.removesuffix('.dev')} exists: set a newer version in {VERSION}."
    if not notes or not notes[1].strip():
        return "CHANGELOG.md says nothing under a heading `## Unreleased`."
    if not repository(git("ls-remote", "--get-url", "origin")):
        return "The remote `origin` isn't a repository on GitHub: the pages would have no address."
    return None


def write_address():
    """Replace the address on every page, and in the library, with that of `origin`."""
    old = repository(tomllib.loads(ABOUT.read_text("utf-8"))["project"]["urls"]["Repository"])
    new = repository(git("ls-remote", "--get-url", "origin"))
    for name in git("grep", "-Ilz", "--fixed-strings", old).split("\0")[:-1]:
        text = Path(name).read_text("utf-8")
        Path(name).write_text(text.replace(old, new), "utf-8")


def write_version(old, new):
    replace(VERSION, old, new)
    subprocess.run(["make", "wheel"], check=True)


def commit(message):
    git("add", "--all")  # the wheel has a new name
    git("commit", "--message", message)


def main():
    developed = re.search('__version__ = "(.+)"', VERSION.read_text("utf-8"))[1]
    if reason := refusal(developed):
        sys.exit(f"No release. {reason}")
    version = developed.removesuffix(".dev")
    heading = f"## {version} ({date.today()})"
    try:
        write_address()
        for changelog in CHANGELOGS:
            replace(changelog, "## Unreleased", heading)
        write_version(developed, version)
        subprocess.run(["make", "test", "prove"], env={**os.environ, "DEMAND_ALL": "1"}, check=True)
    except (KeyboardInterrupt, subprocess.CalledProcessError):
        git("reset", "--quiet", "--hard")
        git("clean", "--quiet", "--force", "-d")
        sys.exit("No release, because the tests did not pass. All files are as before.")
    commit(f"Release {version}")
    git("tag", "--annotate", "--message", f"Release {version}", f"v{version}")  # for `git describe`
    shutil.copytree(VENDOR, "dist", dirs_exist_ok=True)

    major, minor, _ = version.split(".")
    for changelog in CHANGELOGS:
        replace(changelog, heading, f"## Unreleased\n\n{heading}")
    write_version(version, f"{major}.{int(minor) + 1}.0.dev")
    commit("Start the next version")
    print(f"{version} is a commit, a tag, and a wheel in dist/. To publish it:")
    print(f"    git push --atomic origin {git('branch', '--show-current')} v{version}")


main()
