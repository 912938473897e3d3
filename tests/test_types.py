"""A type checker knows the public names of the library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.bake import LIBRARY, TEMPLATE

USES = (TEMPLATE / "tests/harness/typed.py").read_text()


@pytest.fixture
def folder(tmp_path):
    """A folder in which basedpyright finds the library and the packages of this environment."""
    python = Path(sys.prefix)
    paths = [str(LIBRARY / "src")]
    options = {"extraPaths": paths, "venvPath": str(python.parent), "venv": python.name}
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({**options, "typeCheckingMode": "standard"})
    )
    return tmp_path


def test_a_type_checker_reports_wrong_uses_and_no_right_ones(folder):
    (folder / "typed.py").write_text(USES)
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "typed.py"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = json.loads(checked.stdout)["generalDiagnostics"]
    errors = [error for error in found if error["severity"] == "error"]
    lines = USES.splitlines()
    wrong = {number for number, line in enumerate(lines) if line.endswith("# wrong")}
    assert {error["range"]["start"]["line"] for error in errors} == wrong, errors
