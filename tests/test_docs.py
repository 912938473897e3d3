"""The template's own pages, the code on the output's pages, and the version on both sides."""

import re
import subprocess
from pathlib import Path

from harness.bake import TEMPLATE
from harness.checks import check_links
from harness.pages import read_pages
from harness.reader import ELSEWHERE, NOT_RUN, RUN, TYPED


def test_every_link_leads_somewhere():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TEMPLATE, capture_output=True, text=True, check=True)
    paths = [Path(name) for name in listed.stdout.split("\0") if (TEMPLATE / name).is_file()]
    files = {
        path: (TEMPLATE / path).read_text("utf-8") if path.suffix == ".md" else "" for path in paths
    }
    pages = [path for path in files if path.suffix == ".md" and "{" not in str(path)]
    assert Path("README.md") in pages and Path("docs/reliability.md") in pages
    check_links(pages, files)


def test_each_block_of_code_that_is_tested_stands_on_a_page(bake):
    """test_bake.py asserts the opposite: each block on a page is tested, or we say why not."""
    outputs = [
        {"deployment": "kubernetes"},
        {"broker": "rabbitmq", "result_backend": "dynamodb"},
        {"broker": "sqs"},
    ]
    keys = {block.key for answers in outputs for block in read_pages(bake(**answers))}
    tables = [{**TYPED, **RUN}, ELSEWHERE, NOT_RUN]
    assert sum(map(len, tables)) == len(set().union(*tables)), "a block is in two tables"
    assert set().union(*tables) <= keys
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (TEMPLATE / file).read_text("utf-8"), test


def test_a_project_says_which_version_of_the_template_wrote_it(bake):
    """It is the newest in CHANGELOG.md, or while that is Unreleased, a .dev version."""
    [version] = re.findall('__version__ = "(.+)"', bake().read("jobs/__init__.py"))
    newest = re.search(r"^## (\S+)", (TEMPLATE / "CHANGELOG.md").read_text("utf-8"), re.M)[1]

    assert version == newest or (newest == "Unreleased" and version.endswith(".dev"))


def test_each_bullet_of_reliability_has_its_tests():
    """tests/README.md has a row for each, with tests that exist, or says why it has none."""
    page = (TEMPLATE / "docs/reliability.md").read_text("utf-8")
    found, heading = [], None
    for line in page.splitlines():
        if started := re.match(r"##+ (.+)", line):
            heading = started[1]
        elif bullet := re.match(r"- \*\*(.+?)[.,]?\*\*", line):
            found.append((heading, bullet[1]))
        elif heading == "Plain tasks" and (row := re.match(r"\| (.+?) \|", line)):
            found.append((heading, row[1]))
    found.remove(("Plain tasks", "fault"))  # the head of the table

    proved = []
    page = (TEMPLATE / "tests/README.md").read_text("utf-8")
    for heading, file, table in re.findall(r"### (.+): `(.+)`\n\n([^#]+)", page):
        for bullet, tests in re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE)[1:]:
            proved.append((heading, bullet))
            names = re.findall("`(.+?)`", tests)
            assert names or "No test: " in tests, bullet
            for name in names:
                module, _, test = name.rpartition("::")
                folder, _, module = module.rpartition("/")
                path = f"{folder or 'integration'}/test_{module}.py" if module else file
                assert f"def test_{test}(" in (TEMPLATE / "tests" / path).read_text("utf-8"), name
    assert proved == found
