"""Which tests prove which promise of durable-jobs/README.md: they have the mark `promise`.

python -m harness.promises  # writes the table in durable-jobs/docs/reliability.md
"""

import ast
import re

from harness.bake import LIBRARY, TEMPLATE

PAGE = LIBRARY / "docs/reliability.md"


def proofs():
    """Return {the first words of a promise, which are bold: the paths and names of its tests}."""
    readme = (LIBRARY / "README.md").read_text("utf-8")
    section = readme.partition("## Promises\n")[2].partition("\n## ")[0]
    found = {text.strip(",."): [] for text in re.findall(r"^- \*\*(.+?)\*\*", section, re.M)}
    files = *LIBRARY.glob("tests/test_*.py"), *TEMPLATE.glob("tests/integration/*/test_*.py")
    for path in sorted(files):
        for node in ast.parse(path.read_text("utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if ast.unparse(mark).startswith("pytest.mark.promise("):
                    name = f"{path.relative_to(TEMPLATE)}::{node.name}"
                    found[mark.args[0].value].append(name)
    return found


def page():
    """Return the page with the table of today."""
    rows = [f"| {promise} | `{'`<br>`'.join(tests)}` |\n" for promise, tests in proofs().items()]
    table = "".join(["| promise | tests |\n|---|---|\n", *rows])
    before, start, rest = PAGE.read_text("utf-8").partition("<!-- promises -->\n")
    return before + start + table + rest[rest.index("<!-- end -->") :]


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
