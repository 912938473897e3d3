"""python -m load.send FILE RATE KIND…: send RATE tasks a second, of these kinds in turn.

It ends when FILE.stop exists.
A line of FILE is JSON: [kind, id of the task, error].
"""

import itertools
import json
import sys
import time
from pathlib import Path

import django

django.setup()
from django.db import close_old_connections  # noqa: E402

from .kinds import KINDS  # noqa: E402


def send(kind):
    close_old_connections()  # as at the start of a request
    try:
        return [kind, str(KINDS[kind]()), None]
    except Exception as error:
        name = f"{type(error).__module__}.{type(error).__name__}"
        return [kind, None, f"{name}: {error}"]


def main(path, rate, *kinds):
    due = time.monotonic()
    with open(path, "a") as file:
        for kind in itertools.cycle(kinds):
            if Path(f"{path}.stop").exists():
                return
            print(json.dumps(send(kind)), file=file, flush=True)
            now = time.monotonic()
            due = max(now, due + 1 / int(rate))
            time.sleep(due - now)


main(*sys.argv[1:])
