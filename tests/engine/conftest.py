"""The fixtures that an output has, and one for greenlets."""

import runpy

import pytest
from settings import OUTPUT

from jobs.pools import pool

fixtures = runpy.run_path(str(OUTPUT / "conftest.py"))
globals().update({name: fixtures[name] for name in fixtures if not name.startswith("__")})


@pytest.fixture(autouse=True)
def one_connection(monkeypatch):
    """Query in the test's own transaction, which the native threads of gevent's pool cannot see."""
    monkeypatch.setattr(pool, "query", lambda function, *args, **kw: function(*args, **kw))
