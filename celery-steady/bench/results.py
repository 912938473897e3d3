"""Files of what was measured, with its date, commit, versions and machine, and the tables that quote them."""

import json
import os
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def write(name, text, rows, columns, key):
    """Store these rows in docs/NAME.json, and write the page with this text and the table of all rows."""
    DOCS.mkdir(exist_ok=True)
    rows = store(DOCS / f"{name}.json", rows, key)
    (DOCS / f"{name}.md").write_text(page(text, rows, columns))


def store(path, rows, key, **versions):
    """Replace the rows of a file that have the values of these ones under `key`; return all rows."""
    old = json.loads(path.read_text()) if path.exists() else []
    new = {tuple(map(row.get, key)): row | about(**versions) for row in rows}
    rows = [row for row in old if tuple(map(row.get, key)) not in new] + list(new.values())
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")  # a line each
    return rows


def about(**versions):
    git = ["git", "rev-parse", "--short", "HEAD"]
    cpu = re.search("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.check_output(git, text=True, cwd=HERE).strip(),
        "versions": {name: version(name) for name in ("celery", "kombu", "redis")} | versions,
        "machine": f"{os.cpu_count()} processors ({cpu[1] if cpu else 'unknown'}), {memory:.0f} GB, "
        f"Python {platform.python_version()}",
    }


def page(text, rows, columns):
    """Return a page with this text, then a table, and when and where its rows were measured.

    `columns` are {heading: the key in a row, or a function of the row}.
    """
    cells = [
        [each(row) if callable(each) else row[each] for each in columns.values()] for row in rows
    ]
    return f"{text}\n{table(columns, cells)}" + "".join(f"\n{line}\n" for line in measured(rows))


def table(headings, rows):
    first, *others = ("| " + " | ".join(map(str, row)) + " |\n" for row in [headings, *rows])
    return "".join([first, "|---" * len(headings) + "|\n", *others])


def measured(rows):
    """Return a line for each machine and its versions, with the days. The files have the commits."""
    days = {}
    for row in rows:
        found = ", ".join(f"{name}=={number}" for name, number in row["versions"].items())
        days.setdefault(f"{row['machine']}, {found}.", {})[row["date"]] = None
    return [f"{' and '.join(dates)}, {rest}" for rest, dates in days.items()]


def quote(text, name, quoted):
    """Return the text of a page with this between `<!-- name -->` and `<!-- end -->`."""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    return before + start + quoted + rest[rest.index("<!-- end -->") :]
