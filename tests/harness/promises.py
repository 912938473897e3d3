"""Which tests prove which promise of a README: they have the mark `promise`.

python -m harness.promises  # writes the tables
"""

import ast
import re

from harness import results
from harness.bake import LIBRARY, TEMPLATE

TABLES = {  # {the page with the table: (the README, the heading of its promises)}
    LIBRARY / "docs/reliability.md": (LIBRARY / "README.md", "## Promises\n"),
    TEMPLATE / "tests/README.md": (TEMPLATE / "README.md", "## What sets it apart\n"),
}


def proofs():
    """Return {page: {the first, bold words of a promise: the paths and names of its tests}}."""
    found = {}
    for page, (readme, heading) in TABLES.items():
        section = readme.read_text("utf-8").partition(heading)[2].partition("\n## ")[0]
        promises = re.findall(r"^- \*\*(.+?)\*\*", section, re.M)
        found[page] = {text.strip(",."): [] for text in promises}
    of_all = {promise: tests for each in found.values() for promise, tests in each.items()}
    files = [*LIBRARY.glob("tests/test_*.py"), *TEMPLATE.glob("tests/**/test_*.py")]
    for path in sorted(files):
        for node in ast.parse(path.read_text("utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if ast.unparse(mark).startswith("pytest.mark.promise("):
                    name = f"{path.relative_to(TEMPLATE)}::{node.name}"
                    of_all[mark.args[0].value].append(name)
    return found


def pages():
    """Return {page: its text with the table of today}."""
    written = {}
    for page, promises in proofs().items():
        rows = [[promise, f"`{'`<br>`'.join(tests)}`"] for promise, tests in promises.items()]
        table = results.table(["promise", "tests"], rows)
        written[page] = results.quote(page.read_text("utf-8"), "promises", table)
    return written


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, "utf-8")
