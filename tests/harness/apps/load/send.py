"""python -m load.send FILE KIND…: send tasks of these kinds in turn, until FILE.stop exists.

A line of FILE is JSON: [kind, id of the task, error].
"""

import json
import sys
import time
from pathlib import Path

import django

django.setup()
from django.db import close_old_connections  # noqa: E402

from .kinds import KINDS  # noqa: E402

PAUSE = 0.25  # seconds


def send(kind):
    close_old_connections()  # as at the start of a request
    try:
        return [kind, str(KINDS[kind]()), None]
    except Exception as error:
        name = f"{type(error).__module__}.{type(error).__name__}"
        return [kind, None, f"{name}: {error}"]


def main(path, *kinds):
    with open(path, "a") as file:
        while True:
            for kind in kinds:
                if Path(f"{path}.stop").exists():
                    return
                print(json.dumps(send(kind)), file=file, flush=True)
                time.sleep(PAUSE)


main(*sys.argv[1:])
