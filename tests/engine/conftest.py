"""The fixtures that an output has."""

import runpy

from settings import OUTPUT

fixtures = runpy.run_path(str(OUTPUT / "conftest.py"))
globals().update({name: fixtures[name] for name in fixtures if not name.startswith("__")})
