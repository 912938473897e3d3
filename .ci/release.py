"""`make release`: test, commit and tag each product whose changelog has an unreleased version.

It pushes nothing. The address on the pages is that of the remote `origin` on GitHub.
"""

import os
import re
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

# The folder of each product, by what its tags begin with
PRODUCTS = {
    "v": Path("."),
    "celery-steady-": Path("celery-steady"),
    "durable-jobs-": Path("durable-jobs"),
}
ABOUT = Path("durable-jobs/pyproject.toml")
UNRELEASED = r"(?ms)^## (\d+\.\d+\.\d+) \(unreleased\)\n(.*?)(?=^## |\Z)"
GITHUB = r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$"


def git(*command):
    result = subprocess.run(["git", *command], stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout.strip()


def replace(path, old, new):
    path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")


def unreleased():
    """Return {tag: (folder, version, its notes)} of what to release."""
    found = {}
    for prefix, folder in PRODUCTS.items():
        changelog = (folder / "CHANGELOG.md").read_text("utf-8")
        if match := re.search(UNRELEASED, changelog):
            found[prefix + match[1]] = folder, match[1], match[2].strip()
    return found


def repository(address):
    """Return `owner/name` of an address, or None if it is not on GitHub."""
    match = re.search(GITHUB, address)
    return match and match[1]


def refusal(releases):
    """Return why these can't be released, or None."""
    if git("status", "--porcelain"):
        return "There are changes without a commit: commit or stash them."
    if not releases:
        return "No changelog has a heading such as `## 1.1.0 (unreleased)`."
    for tag, (folder, version, notes) in releases.items():
        if git("tag", "--list", tag):
            return f"The tag {tag} exists: write a newer version into {folder / 'CHANGELOG.md'}."
        if not notes:
            return f"{folder / 'CHANGELOG.md'} says nothing about {version}."
        for code in folder.glob("src/*/__init__.py"):
            if f'"{version}.dev"' not in code.read_text("utf-8"):
                return f"The version in {code} must be {version}.dev, as in its changelog."
    if not repository(git("ls-remote", "--get-url", "origin")):
        return "The remote `origin` isn't a repository on GitHub: the pages would have no address."
    return None


def write_address():
    """Replace the address on every page, and in the libraries, with that of `origin`."""
    old = repository(tomllib.loads(ABOUT.read_text("utf-8"))["project"]["urls"]["Repository"])
    new = repository(git("ls-remote", "--get-url", "origin"))
    for name in git("grep", "-Ilz", "--fixed-strings", old).split("\0")[:-1]:
        text = Path(name).read_text("utf-8")
        Path(name).write_text(text.replace(old, new), "utf-8")


def main():
    releases = unreleased()
    if reason := refusal(releases):
        sys.exit(f"No release. {reason}")
    try:
        write_address()
        for folder, version, _ in releases.values():
            replace(
                folder / "CHANGELOG.md", f"{version} (unreleased)", f"{version} ({date.today()})"
            )
            for code in folder.glob("src/*/__init__.py"):
                replace(code, f'"{version}.dev"', f'"{version}"')
        environment = {**os.environ, "DEMAND_ALL": "1"}
        subprocess.run(["make", "wheel", "test", "prove", "dist"], env=environment, check=True)
    except (KeyboardInterrupt, subprocess.CalledProcessError):
        git("reset", "--quiet", "--hard")
        git("clean", "--quiet", "--force", "-d")
        sys.exit("No release, because the tests did not pass. All files are as before.")
    git("add", "--all")  # the wheels have new names
    git("commit", "--message", f"Release {', '.join(releases)}")
    for tag in releases:
        git("tag", "--annotate", "--message", f"Release {tag}", tag)  # for `git describe`
    print(f"{', '.join(releases)}: a commit with tags. To publish it:")
    print(f"    git push --atomic origin {git('branch', '--show-current')} {' '.join(releases)}")


main()
