"""Write what was measured to docs/NAME.json, with its date, commit, versions and machine, and a page with its table."""

import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def write(name, text, rows, columns, key):
    """Replace the rows that have the values of these ones under `key`, and write the page.

    It has this text, then a table. `columns` are {heading: the key in a row, or a function of the row}.
    """
    DOCS.mkdir(exist_ok=True)
    path = DOCS / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    new = {tuple(map(row.get, key)): row | about() for row in rows}
    rows = [row for row in old if tuple(map(row.get, key)) not in new] + list(new.values())
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")  # a line each
    (DOCS / f"{name}.md").write_text(page(text, rows, columns))


def about():
    git = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.check_output(git, text=True, cwd=HERE).strip(),
        "versions": {name: version(name) for name in ("celery", "kombu", "redis")},
        "machine": f"{os.cpu_count()} processors, Python {platform.python_version()}",
    }


def page(text, rows, columns):
    lines = [text, "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [each(row) if callable(each) else row[each] for each in columns.values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for day, commit, machine, versions in dict.fromkeys(
        (row["date"], row["commit"], row["machine"], tuple(row["versions"].items())) for row in rows
    ):
        found = ", ".join(f"{name}=={number}" for name, number in versions)
        lines.append(f"\n{day}, commit {commit}, {machine}, {found}.")
    return "\n".join(lines) + "\n"
