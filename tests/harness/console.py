"""Runs code in a project: reads Python as JSON, one text a line, and writes results as JSON."""

import json
import sys
import traceback

import django

django.setup()
from django.db import connection  # noqa: E402

for line in sys.stdin:
    names = {"result": None}
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"]}
    except Exception:
        answer = {"error": traceback.format_exc()}
    connection.close()
    print("=>" + json.dumps(answer, default=str), flush=True)
