"""ask.py MODULE FUNCTION ARGUMENTS: call it in a contestant. Arguments and result are JSON."""

import json
import os
import sys
from importlib import import_module

if os.environ.get("DJANGO_SETTINGS_MODULE"):
    import django

    django.setup()
else:
    import bare  # noqa: F401

module, function, arguments = sys.argv[1:]
print(json.dumps(getattr(import_module(module), function)(*json.loads(arguments))))
