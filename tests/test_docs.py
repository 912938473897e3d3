"""The template's own pages, and the code on the output's pages."""

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
