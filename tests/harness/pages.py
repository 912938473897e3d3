"""The output's pages as their reader sees them: headings, prose and blocks of code."""

import re
from dataclasses import dataclass
from pathlib import Path

from .checks import parse


@dataclass
class Block:
    """A block of code with the prose around it. A heading is a block without code."""

    page: str
    heading: str
    code: str
    before: str  # the prose since the last block or heading
    after: str = ""  # the prose until the next one

    @property
    def key(self):
        """Page, heading and first line, which identify a block."""
        return self.page, self.heading, self.code.partition("\n")[0]

    def said(self, sentence):
        """Return the code that the prose has in place of each {} of a sentence."""
        pattern = re.escape(sentence).replace(r"\{\}", "`([^`]+)`")
        found = set(re.findall(pattern, self.before + self.after))
        assert len(found) == 1, f"{self.page}, {self.heading}: {sentence!r} has {found}"
        return found.pop()


def blocks(page, markdown):
    """Return the blocks of a page from top to bottom."""
    found, is_heading = [], False
    for token in parse(markdown):
        if token.type in ("fence", "code_block"):
            last = found[-1]
            found.append(Block(page, last.heading, token.content, before=last.after))
        elif token.type == "inline" and is_heading:
            found.append(Block(page, token.content, "", before=""))
        elif token.type == "inline":  # a paragraph, an item of a list or a cell of a table
            found[-1].after += f"{token.content}\n"
        is_heading = token.type == "heading_open"
    return found


def read_pages(project):
    """Return all blocks of a baked project: README.md, AGENTS.md, then docs/, then jobs/."""
    files = sorted(Path(project).glob("*/*.md"))
    names = ["README.md", "AGENTS.md", *(str(file.relative_to(project)) for file in files)]
    return [block for name in names for block in blocks(name, (project / name).read_text("utf-8"))]
