import subprocess
import sys
from pathlib import Path

import pytest


class Project(type(Path())):
    """The path of a baked project, which can also run commands."""

    def run(self, *command):
        """Run a command of the test environment, say `ruff check`, and return what it prints."""
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=self, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def files(self):
        return [path for path in self.rglob("*") if path.is_file()]


@pytest.fixture
def bake(cookies):
    """Bake a project: `bake(project_name="Shop").run("ruff", "check")`."""

    def bake(**answers):
        result = cookies.bake(extra_context=answers)
        if result.exception:
            raise result.exception
        return Project(result.project_path)

    return bake
