"""The template's own pages."""

import subprocess
from pathlib import Path

from harness.bake import TEMPLATE
from harness.checks import check_links


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
