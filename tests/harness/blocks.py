"""The blocks of code on a page. What a block says it is decides how it is run.

A block says it in its info string:

    python file=reports/tasks.py    is written to that file, or appended if the file exists
    python shell                    runs in `manage.py shell`; as a doctest if it has `>>>`
    sh                              runs in a shell, with the project's tools on PATH
    sh no-run, yaml no-run, text    is read only, or run by a test of its own
"""

import os
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass

from .checks import parse
from .project import env

SHELLS = ("sh", "console")
PICTURES = ("text", "mermaid")
CURL = 'curl() { command curl --fail-with-body --silent "$@"; }'  # an error 404 is one
DOCTEST = """
import doctest
found = doctest.DocTestParser().get_doctest({code!r}, dict(globals()), "page", None, 0)
failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found)
assert not failed
"""


@dataclass
class Block:
    language: str
    words: list  # of the info string, after the language
    code: str

    @property
    def file(self):
        """The file that it belongs to, or None."""
        named = [word.removeprefix("file=") for word in self.words if word.startswith("file=")]
        return named[0] if named else None

    @property
    def use(self):
        """How it is run: "file", "shell", "sh" or "no-run"; else None."""
        if "no-run" in self.words or self.language in PICTURES:
            return "no-run"
        if self.file:
            return "file"
        if self.language == "python" and self.words == ["shell"]:
            return "shell"
        return "sh" if self.language in SHELLS and not self.words else None


def blocks(markdown):
    """Return the blocks of a page from top to bottom."""
    found = []
    for token in parse(markdown):
        if token.type in ("fence", "code_block"):
            language, *words = token.info.split() or [""]
            found.append(Block(language, words, token.content))
    return found


def code(markdown, words):
    """Return the code of the one block of a page that contains these words."""
    [found] = [block.code for block in blocks(markdown) if words in block.code]
    return found


def check_blocks(page, markdown):
    for block in blocks(markdown):
        assert block.use, f"{page}: say in the info string how to run this\n{block.code}"


class Reader:
    """Types the blocks of a project's pages, one after the other."""

    def __init__(self, project, **variables):
        self.project, self.variables = project, variables
        self.site, self.running, self.is_stale = None, ExitStack(), False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.running.close()

    def read(self, page):
        for block in blocks(self.project.read(page)):
            getattr(self, f"run_{block.use}".replace("-", "_"))(block.code, block.file)

    def run_no_run(self, code, file):
        pass

    def run_file(self, code, file):
        path = self.project / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as opened:
            opened.write(code)
        self.is_stale = self.site is not None  # a worker has the code of its start

    def run_shell(self, code, file):
        code = DOCTEST.format(code=code) if ">>> " in code else code
        self.call(self.project / ".venv/bin/python", "manage.py", "shell", "-v0", "-c", code)

    def run_sh(self, code, file):
        """`make run`, which does not end, runs until the last page is read."""
        lines = [line.removeprefix("$ ") for line in code.splitlines()]
        if any(line.split()[:2] == ["make", "run"] for line in lines):
            self.site or self.start()
        self.refresh()
        code = "\n".join(line for line in lines if line.split()[:2] != ["make", "run"])
        if self.site:
            for address, own in (
                ("http://127.0.0.1:8000", self.site.web),
                ("http://localhost:8000", self.site.web),
                ("Token …", f"Token {self.site.token}"),
            ):
                code = code.replace(address, own)
        self.call("bash", "-euo", "pipefail", "-c", f"{CURL}\n{code}")

    def start(self):
        self.is_stale = False
        self.site = self.running.enter_context(self.project.up(**self.variables))

    def refresh(self):
        """Start the site again, on other ports, if files were written since its start."""
        if self.is_stale:
            self.running.close()
            self.start()

    def call(self, *command):
        self.refresh()
        variables = self.site.environment if self.site else self.variables
        path = f"{self.project}/.venv/bin:{os.environ['PATH']}"
        result = subprocess.run(
            command,
            cwd=self.project,
            env=env(**{**variables, "PATH": path}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        log = self.site.log if self.site else ""
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}\n{log[-5000:]}"
