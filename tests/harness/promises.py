"""Which tests prove which promise of durable-jobs/README.md: they have the mark `promise`.

python -m harness.promises  # writes the table in durable-jobs/docs/reliability.md
"""

import ast
import re

from harness.bake import LIBRARY, TEMPLATE

README, PAGE = LIBRARY / "README.md", LIBRARY / "docs/reliability.md"
START, END = "<!-- promises -->\n", "<!-- end -->"


def promises():
    """Return the first words of each promise, which are bold."""
    section = README.read_text("utf-8").partition("## Promises\n")[2].partition("\n## ")[0]
    return [text.strip(",.") for text in re.findall(r"^- \*\*(.+?)\*\*", section, re.M)]


def proofs():
    """Return {promise: the paths and names of its tests}."""
    found = {}
    for folder in LIBRARY / "tests", TEMPLATE / "tests/integration":
        for path in sorted(folder.glob("test_*.py")):
            for node in ast.parse(path.read_text("utf-8")).body:
                for mark in getattr(node, "decorator_list", []):
                    if ast.unparse(mark).startswith("pytest.mark.promise("):
                        name = f"{path.relative_to(TEMPLATE)}::{node.name}"
                        found.setdefault(mark.args[0].value, []).append(name)
    return found


def table():
    tests = {each: "<br>".join(f"`{name}`" for name in names) for each, names in proofs().items()}
    rows = [f"| {each} | {tests[each]} |" for each in promises()]
    return "\n".join(["| promise | tests |", "|---|---|", *rows, ""])


def page():
    """Return the page with the table of today."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    return f"{before}{START}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
