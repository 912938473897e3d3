"""`make wheel`: build the libraries whose source has changed into the output's vendor/.

A page or a changelog that has changed waits for the release: each wheel is kept in Git forever.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VENDOR = Path("{{cookiecutter.project_slug}}/vendor")
NAMES = Path("templates/versions.jinja")


def source(wheel):
    """Return the files of a wheel, {name: bytes}, without the text of pages and what hashes it."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name in files:
        if name.endswith((".md", "/RECORD")):
            files[name] = b""
        elif name.endswith("/METADATA"):
            files[name] = files[name].partition(b"\n\n")[0]  # then comes the README
    return files


def vendor(built):
    """Replace the wheel in vendor/ with this one, if its source or its version differs."""
    package = built.name.partition("-")[0]
    old = list(VENDOR.glob(f"{package}-*.whl"))
    same_name = VENDOR / built.name
    if same_name in old:
        if source(same_name) == source(built):
            return
        if ".dev" not in built.name:
            sys.exit(
                f"{built.name} is released, but its source has changed. Begin the next version: "
                "`## 1.1.0 (unreleased)` in its changelog, and 1.1.0.dev in its __init__.py."
            )
    for wheel in old:
        wheel.unlink()
    same_name.write_bytes(built.read_bytes())
    names = NAMES.read_text("utf-8")
    NAMES.write_text(re.sub(rf"{package}-[^/\"]+\.whl", built.name, names), "utf-8")


def main(*libraries):
    uv = Path(sys.executable).with_name("uv")
    for library in libraries:
        with tempfile.TemporaryDirectory() as folder:
            build = [uv, "build", "--quiet", "--wheel", "--out-dir", folder, library]
            subprocess.run(build, check=True)
            [built] = Path(folder).glob("*.whl")
            vendor(built)


if __name__ == "__main__":
    main(*sys.argv[1:])
