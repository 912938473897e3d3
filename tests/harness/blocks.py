"""The blocks of code on a page. What a block says it is decides how it is run.

A block says it in its info string:

    python file=reports/tasks.py    is written to that file, or appended if the file exists
    python shell                    runs in `manage.py shell`; as a doctest if it has `>>>`
    sh                              runs in a shell, with the project's tools on PATH
    sh no-run, yaml no-run, text    is read only, or run by a test of its own
"""

from contextlib import ExitStack
from typing import NamedTuple

from .checks import parse

PICTURES = ("text", "mermaid")
CURL = 'curl() { command curl --fail-with-body --silent "$@"; }'  # an error 404 is one
DOCTEST = """
import doctest
found = doctest.DocTestParser().get_doctest({code!r}, dict(globals()), "page", None, 0)
failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found)
assert not failed
"""


class Block(NamedTuple):
    use: str  # "file", "shell", "sh" or "no-run"; None if it does not say how it is run
    code: str
    file: str = None  # that it belongs to


def blocks(markdown):
    """Return the blocks of a page from top to bottom."""
    tokens = [token for token in parse(markdown) if token.type in ("fence", "code_block")]
    return [block(token.content, *token.info.partition(" ")[::2]) for token in tokens]


def block(code, language, words):
    """Return a block with this code, whose info string consists of the language and the words."""
    if words == "no-run" or (language in PICTURES and not words):
        return Block("no-run", code)
    if words.startswith("file="):
        return Block("file", code, words.removeprefix("file="))
    uses = {("python", "shell"): "shell", ("sh", ""): "sh"}
    return Block(uses.get((language, words)), code)


def code(markdown, words):
    """Return the code of the one block of a page that contains these words."""
    [found] = [block.code for block in blocks(markdown) if words in block.code]
    return found


def check_blocks(page, markdown):
    for block in blocks(markdown):
        assert block.use, f"{page}: say in the info string how to run this\n{block.code}"


class Reader(ExitStack):
    """Types the blocks of a project's pages, one after the other, until it is closed."""

    def __init__(self, project, **variables):
        super().__init__()
        self.project, self.variables = project, variables
        self.site, self.must_start = None, False

    def read(self, page):
        for block in blocks(self.project.read(page)):
            self.run(block.use, block.code, block.file)

    def run(self, use, code, file=None):
        """Do what a reader does with a block of this use."""
        if use == "file":
            (self.project / file).parent.mkdir(parents=True, exist_ok=True)
            self.project.append(file, code)
            self.must_start = self.site is not None  # again: a worker has the code of its start
        elif use == "shell":
            code = DOCTEST.format(code=code) if ">>> " in code else code
            self.call(".venv/bin/python", "manage.py", "shell", "-v0", "-c", code)
        elif use == "sh":
            lines = [line.removeprefix("$ ") for line in code.splitlines()]
            others = [line for line in lines if line.split()[:2] != ["make", "run"]]
            self.must_start |= others != lines and not self.site  # `make run` does not end
            self.call("bash", "-euo", "pipefail", "-c", "\n".join([CURL, *others]))

    def call(self, *command):
        """Run a command. It reaches the site, which has other ports after each start."""
        if self.must_start:
            self.close()
            self.site = self.enter_context(self.project.up(**self.variables))
            self.must_start = False
        if self.site:
            for address, own in (
                ("http://127.0.0.1:8000", self.site.web),
                ("http://localhost:8000", self.site.web),
                ("Token …", f"Token {self.site.token}"),
            ):
                command = [word.replace(address, own) for word in command]
        variables = self.site.environment if self.site else self.variables
        self.project.call(*command, **{**variables, "PATH": self.project.search_path})
